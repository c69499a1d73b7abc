// Counts what the program, the library linked statically, takes from the heap by `new`. For one source file
// of a program: it replaces the global operators.
#ifndef QGRAPH_TESTS_COUNTING_ALLOCATOR_H_
#define QGRAPH_TESTS_COUNTING_ALLOCATOR_H_

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

inline std::atomic<int64_t> allocations{0};

// Not inlined: GCC takes a pair of which it inlines one half for a mismatch.
__attribute__((noinline)) void* operator new(size_t size) {
  ++allocations;
  void* p = std::malloc(size > 0 ? size : 1);
  if (!p) throw std::bad_alloc();
  return p;
}
__attribute__((noinline)) void operator delete(void* p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, size_t) noexcept { std::free(p); }

#endif  // QGRAPH_TESTS_COUNTING_ALLOCATOR_H_
