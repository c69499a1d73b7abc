// What the host lends a session: threads and memory.
#ifndef QGRAPH_SRC_HOST_H_
#define QGRAPH_SRC_HOST_H_

#include "qgraph/qgraph.h"

namespace qg {

// Threads; none if `parallel_for` is NULL.
struct HostPool {
  qg_parallel_for parallel_for = nullptr;
  void* context = nullptr;
};

struct Allocator {
  qg_allocate allocate = nullptr;  // NULL: the C library's
  qg_deallocate deallocate = nullptr;
  void* context = nullptr;
};

struct Host {
  int threads;  // >= 1, the caller's included
  HostPool pool;
  Allocator allocator;
};

}  // namespace qg

#endif  // QGRAPH_SRC_HOST_H_
