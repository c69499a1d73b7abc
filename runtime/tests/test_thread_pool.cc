// The thread pool: every block exactly once, in ranges of the grain, for all sizes; without races (built with
// ThreadSanitizer where there is one).
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "check.h"
#include "thread_pool.h"

namespace {

struct Counts {
  std::vector<int> blocks;  // written without atomics: no two threads may share one
  int64_t grain;
  int threads;
  std::atomic<int64_t> ranges{0};
};

void count(const void* context, int worker, int64_t begin, int64_t end) {
  Counts& counts = *const_cast<Counts*>(static_cast<const Counts*>(context));
  CHECK(worker >= 0 && worker < counts.threads);
  CHECK(begin < end && begin >= 0);
  CHECK(end - begin >= counts.grain || end == static_cast<int64_t>(counts.blocks.size()));
  for (int64_t i = begin; i < end; ++i) ++counts.blocks[static_cast<size_t>(i)];
  ++counts.ranges;
}

void covers(qg::ThreadPool* pool, size_t blocks, int64_t grain) {
  Counts counts;
  counts.blocks.resize(blocks);
  counts.grain = grain;
  counts.threads = pool->threads();
  pool->run(static_cast<int64_t>(blocks), grain, count, &counts);
  for (int n : counts.blocks) CHECK(n == 1);
  if (blocks == 0) CHECK(counts.ranges == 0);
}

// Two workers that only end when both have begun: so work is really shared. The caller, which sleeps
// meanwhile, must be woken again.
struct Meeting {
  mutable std::atomic<int> arrived{0};
};

void meet(const void* context, int, int64_t, int64_t) {
  const Meeting& meeting = *static_cast<const Meeting*>(context);
  ++meeting.arrived;
  while (meeting.arrived < 2) std::this_thread::yield();
}

// The ranges that one thread takes which is left alone: two thirds of a thread's share of what is left, again
// and again, never less than the grain but for the last.
void ranges_shrink() {
  auto alone = [](void*, int32_t count, void (*task)(void*, int32_t), void* data) {
    CHECK(count == 4);
    task(data, 0);
  };
  qg::ThreadPool pool(4, {alone, nullptr});
  std::vector<int64_t> sizes;
  auto record = [](const void* context, int, int64_t begin, int64_t end) {
    const_cast<std::vector<int64_t>*>(static_cast<const std::vector<int64_t>*>(context))
        ->push_back(end - begin);
  };
  pool.run(100, 3, record, &sizes);
  int64_t left = 100;
  for (int64_t size : sizes) {
    CHECK(size == std::min(left, std::max<int64_t>(3, left / 6)));
    left -= size;
  }
  CHECK(left == 0 && sizes.size() > 10);
}

// Threads that take the cores, so that a yield gives them a turn.
class Neighbours {
 public:
  explicit Neighbours(int count) {
    for (int i = 0; i < count; ++i) {
      threads_.emplace_back([this] {
        while (!stop_) {
        }
      });
    }
  }
  ~Neighbours() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

}  // namespace

int main() {
  ranges_shrink();
  for (int threads : {1, 2, 3, 8}) {
    qg::ThreadPool pool(threads);
    CHECK(pool.threads() == threads);
    for (int round = 0; round < 50; ++round) {
      for (size_t blocks : {0, 1, 2, 3, 7, 16, 33, 1000}) {
        for (int64_t grain : {int64_t{1}, int64_t{2}, int64_t{5}, int64_t{100}, INT64_MAX})
          covers(&pool, blocks, grain);
      }
      // Long enough for workers to fall asleep now and then.
      if (round % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    if (threads > 1) {
      for (int round = 0; round < 100; ++round) {
        Meeting meeting;
        pool.run(2, 1, meet, &meeting);
        CHECK(meeting.arrived == 2);
      }
    }
  }
  for (int round = 0; round < 100; ++round) qg::ThreadPool unused(4);
  {
    Neighbours neighbours(2 * qg::available_cores());
    qg::ThreadPool pool(3);
    for (int round = 0; round < 20; ++round) {
      covers(&pool, 50, 1);
      Meeting meeting;
      pool.run(2, 1, meet, &meeting);
      CHECK(meeting.arrived == 2);
    }
  }
  // Pools of several host threads do not know of each other.
  std::vector<std::thread> hosts;
  for (int i = 0; i < 4; ++i) {
    hosts.emplace_back([] {
      qg::ThreadPool pool(3);
      for (size_t round = 0; round < 300; ++round) covers(&pool, 50 + round, 1);
    });
  }
  for (std::thread& host : hosts) host.join();
  CHECK(qg::available_cores() >= 1);
}
