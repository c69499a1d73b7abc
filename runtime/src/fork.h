// Whether the process has forked: a child has neither the threads nor the GPU of its parent.
#ifndef QGRAPH_SRC_FORK_H_
#define QGRAPH_SRC_FORK_H_

#include <pthread.h>

#include <atomic>

namespace qg {

// Number of fork()s between the process that first called count_forks() and this one.
inline std::atomic<int> fork_generation{0};

inline int count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { ++fork_generation; });
  (void)registered;  // fails only for want of memory, and then only a child that goes on using a session
                     // suffers
  return fork_generation;
}

}  // namespace qg

#endif  // QGRAPH_SRC_FORK_H_
