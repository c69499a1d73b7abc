#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <chrono>

#include "float_environment.h"
#include "fork.h"

namespace qg {
namespace {

void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield");
#endif
}

// Blocks all signals while it lives: threads created meanwhile inherit that, and leave the host's signals to
// the host.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    // What a thread does to itself is told to handlers, of crash reports for instance, or ends the process
    // without a word.
    for (int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&all, own);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

int available_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void on_threads(unsigned threads, void (*work)(void* context), void* context) {
  std::vector<std::thread> helpers;
  helpers.reserve(threads);
  try {
    for (unsigned i = 1; i < threads; ++i) helpers.emplace_back(work, context);
  } catch (...) {
    // No more threads to be had: the ones we have do the work.
  }
  work(context);
  for (std::thread& helper : helpers) helper.join();
}

ThreadPool::ThreadPool(int threads, HostPool host)
    : threads_(threads), host_(host), generation_(count_forks()) {
  if (host_.parallel_for) return;
  SignalsBlocked blocked;
  workers_.reserve(static_cast<size_t>(threads) - 1);
  try {
    for (int worker = 1; worker < threads; ++worker) {
      workers_.emplace_back([this, worker] { worker_main(worker); });
    }
  } catch (...) {
    stop_ = true;
    wake(&idle_);
    for (std::thread& thread : workers_) thread.join();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  wake(&idle_);
  for (std::thread& thread : workers_) thread.join();
}

bool ThreadPool::orphaned() const { return !workers_.empty() && generation_ != fork_generation; }

void ThreadPool::run(int64_t blocks, int64_t grain, Work work, const void* context) {
  if (blocks <= 0) return;
  if (threads_ == 1 || blocks <= grain || orphaned()) {
    work(context, 0, 0, blocks);
    return;
  }
  job_ = {work, context, blocks, grain};
  next_block_ = 0;
  if (host_.parallel_for) return run_on_host();
  uint64_t number = ((gate_ >> kNumberShift) + 1) & kMaxNumber;
  gate_ = std::max<uint64_t>(number, 1) << kNumberShift | kOpen;  // 0 is no job's number
  wake(&idle_);
  if (hurried_jobs_ > 0) --hurried_jobs_;
  take_chunks(0);
  gate_ &= ~kOpen;
  wait(&caller_, [this] { return (gate_ & kInside) == 0; });
}

// An index is a worker's number and so names its scratch memory: one that no task has is refused. The chunks
// that the host's threads left, as worker 0: all tasks have returned.
void ThreadPool::run_on_host() {
  auto task = [](void* data, int32_t index) {
    ThreadPool& pool = *static_cast<ThreadPool*>(data);
    if (index < 0 || index >= pool.threads_) return;
    DefaultFloatEnvironment environment;
    pool.take_chunks(index);
  };
  int64_t count = std::min<int64_t>(threads_, (job_.blocks - 1) / job_.grain + 1);
  host_.parallel_for(host_.context, static_cast<int32_t>(count), task, this);
  take_chunks(0);
}

void ThreadPool::take_chunks(int worker) {
  const Job job = job_;
  // Ever smaller ranges, of what is left two thirds of a thread's share: long ones, in which a kernel reads
  // its weights on and on, and small ones at the end, so that threads end together, down to two thirds of the
  // others' speed.
  const int64_t shares = (3 * int64_t{threads()} + 1) / 2;
  for (int64_t begin = next_block_; begin < job.blocks;) {
    const int64_t left = job.blocks - begin;
    const int64_t count = std::min(left, std::max(job.grain, left / shares));
    if (!next_block_.compare_exchange_weak(begin, begin + count)) continue;
    job.work(job.context, worker, begin, begin + count);
    begin = next_block_;
  }
}

void ThreadPool::worker_main(int worker) {
  DefaultFloatEnvironment environment;
  uint64_t seen = 0;
  while ((seen = enter(seen)) != 0) {
    take_chunks(worker);
    // The last one out of a closed job may be what the caller waits for.
    if (((gate_ -= 1) & (kInside | kOpen)) == 0) wake(&caller_);
  }
}

uint64_t ThreadPool::enter(uint64_t seen) {
  for (;;) {
    uint64_t gate = 0;
    wait(&idle_, [&] {
      gate = gate_;
      return stop_ || ((gate & kOpen) != 0 && gate >> kNumberShift != seen);
    });
    if (stop_) return 0;
    if (gate_.compare_exchange_strong(gate, gate + 1)) return gate >> kNumberShift;
  }
}

// Spins for some microseconds, then gives the core to others for some hundreds, then sleeps. The second part
// outlasts the steps of a run that one thread does alone: waking a sleeper costs as much as a small step.
// Spinning on would be worse than useless where threads outnumber free cores: it takes the time of those that
// have work; a yield does not. But where somebody else takes the core that is given, a yield costs a turn of
// the scheduler, milliseconds, and counts as if it had been used, while a sleeper is woken into the turn that
// it has saved: so for the next jobs the second part is left out then.
template <typename Ready>
void ThreadPool::wait(Sleepers* sleepers, Ready ready) {
  constexpr int kSpins = 500, kYields = 1000, kJobs = 50;
  constexpr std::chrono::milliseconds kTaken(1);  // a turn of a program; tasks of the system are shorter
  using Clock = std::chrono::steady_clock;
  for (int i = 0; i < kSpins; ++i) {
    if (ready()) return;
    spin_pause();
  }
  for (int i = 0; i < kYields && hurried_jobs_ == 0; ++i) {
    if (ready()) return;
    Clock::time_point given = Clock::now();
    sched_yield();
    if (Clock::now() - given >= kTaken) hurried_jobs_ = kJobs;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleepers->count;
  while (!ready()) sleepers->condition.wait(lock);
  --sleepers->count;
}

// To be called after the change that makes somebody ready. No wake-up is lost: all of these atomics are
// sequentially consistent, so either the waiter, having counted itself, sees the change, or we see the waiter
// here; and the mutex is ours only before its check or once it sleeps.
void ThreadPool::wake(Sleepers* sleepers) {
  if (sleepers->count == 0) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
  }
  sleepers->condition.notify_all();
}

}  // namespace qg
