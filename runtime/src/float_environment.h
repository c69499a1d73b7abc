// The default floating-point environment: round to nearest, subnormals kept (vectors of 32-bit ARM have no
// such mode, and take them for zero), no traps.
#ifndef QGRAPH_SRC_FLOAT_ENVIRONMENT_H_
#define QGRAPH_SRC_FLOAT_ENVIRONMENT_H_

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace qg {

// Sets the default environment on this thread while it lives. A host may have set another one (flush-to-zero
// is common); results must not depend on that, nor on which thread does a block.
class DefaultFloatEnvironment {
 public:
#if defined(__x86_64__)
  DefaultFloatEnvironment() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultFloatEnvironment() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
  DefaultFloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~DefaultFloatEnvironment() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }
#elif defined(__arm__)
  DefaultFloatEnvironment() {
    __asm__ volatile("vmrs %0, fpscr" : "=r"(before_));
    __asm__ volatile("vmsr fpscr, %0" : : "r"(0));
  }
  ~DefaultFloatEnvironment() { __asm__ volatile("vmsr fpscr, %0" : : "r"(before_)); }
#elif defined(__riscv)
  DefaultFloatEnvironment() { __asm__ volatile("fscsr %0, zero" : "=r"(before_)); }
  ~DefaultFloatEnvironment() { __asm__ volatile("fscsr %0" : : "r"(before_)); }
#else
  DefaultFloatEnvironment() {}  // WebAssembly has no other
#endif
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
#if defined(__x86_64__)
  unsigned before_;
#elif defined(__arm__)
  uint32_t before_;
#elif !defined(__wasm__)
  uint64_t before_;
#endif
};

}  // namespace qg

#endif  // QGRAPH_SRC_FLOAT_ENVIRONMENT_H_
