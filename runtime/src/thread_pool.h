// Threads that share the blocks of a kernel.
#ifndef QGRAPH_SRC_THREAD_POOL_H_
#define QGRAPH_SRC_THREAD_POOL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "host.h"

namespace qg {

// Cores that this process may use: at least 1.
int available_cores();

// Calls work(context) on `threads` threads at once, or fewer where the system has no more: this one, at
// least. Returns when all have returned. `work` must not throw.
void on_threads(unsigned threads, void (*work)(void* context), void* context);

// The caller of run() is worker 0 and takes blocks like the others. It never waits for a thread that has not
// begun: when the blocks are used up the job closes, and a worker that the operating system wakes late finds
// nothing to do. So a busy machine costs help, not time. Blocks are handed out by a counter; which thread
// does which is open, so work whose blocks are independent gives the same result for any number of threads.
class ThreadPool {
 public:
  // Does blocks [begin, end) as the given worker, 0 <= worker < threads().
  using Work = void (*)(const void* context, int worker, int64_t begin, int64_t end);

  // `threads` >= 1 counts the caller. Throws std::system_error if the system has no threads left. With a
  // host's pool it makes none: then `threads` is the most tasks that the host is given at once.
  explicit ThreadPool(int threads, HostPool host = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Whether this process is a fork()ed child of the one that made the pool. The threads, and what they may
  // hold or wait for, stayed behind: run() then does all of the work itself, and the pool must be leaked, not
  // destroyed.
  bool orphaned() const;

  int threads() const { return threads_; }

  // Covers [0, blocks) by calls of work, each for at least `grain` blocks but for the last; returns when all
  // are done. `work` must not throw. One caller at a time.
  void run(int64_t blocks, int64_t grain, Work work, const void* context);

 private:
#if defined(__wasm__)
  const int threads_ = 1;  // there are no others
#else
  struct Job {
    Work work;
    const void* context;
    int64_t blocks, grain;
  };

  void run_on_host();
  void worker_main(int worker);
  // Waits for a job newer than `seen` and enters it; 0 when the pool ends, else the job's number.
  uint64_t enter(uint64_t seen);
  void take_chunks(int worker);

  // Threads that wait for the same, of which each has a condition of its own.
  struct Sleepers {
    std::atomic<int> count{0};
    std::condition_variable condition;
  };
  template <typename Ready>
  void wait(Sleepers* sleepers, Ready ready);
  void wake(Sleepers* sleepers);

  // gate_ = number of the job * 2^33 | open bit * 2^32 | workers inside. Workers enter by a compare-and-swap
  // on it, so none can enter a job that has closed, and job_ is only written while nobody is inside and the
  // gate is closed.
  static constexpr uint64_t kOpen = uint64_t{1} << 32;
  static constexpr uint64_t kInside = kOpen - 1;
  static constexpr int kNumberShift = 33;
  static constexpr uint64_t kMaxNumber = ~uint64_t{0} >> kNumberShift;

  const int threads_;
  const HostPool host_;
  std::vector<std::thread> workers_;
  Job job_{};
  std::atomic<int64_t> next_block_{0};
  std::atomic<uint64_t> gate_{0};
  std::atomic<bool> stop_{false};

  // Sleeping, after a short spin.
  std::mutex mutex_;
  Sleepers idle_;                     // workers, until there is a job
  Sleepers caller_;                   // until the last worker is out
  std::atomic<int> hurried_jobs_{0};  // how many more jobs' waits do not yield before they sleep

  int generation_;  // of the process, see orphaned()
#endif
};

// Deletes a pool, unless it is orphaned.
struct ThreadPoolDeleter {
  void operator()(ThreadPool* pool) const {
    if (!pool->orphaned()) delete pool;
  }
};

}  // namespace qg

#endif  // QGRAPH_SRC_THREAD_POOL_H_
