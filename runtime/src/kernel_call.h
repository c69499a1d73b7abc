// Calls a kernel with a number of arguments known only at run time.
//
// Kernels take pointers and int64 only, at most 32 of them, and return nothing. Both calling conventions that
// the runtime supports put such arguments in the same places whichever of the two a parameter is: System V
// x86-64 in the INTEGER class (rdi rsi rdx rcx r8 r9, then eight-byte stack slots), AAPCS64 in x0 to x7, then
// eight-byte stack slots. So one prototype for each number of arguments, all int64, calls every kernel. The
// kernels are machine code that no C++ compiler sees, hence the language's rule about calling through another
// function type has nothing to bear on.
#ifndef QGRAPH_SRC_KERNEL_CALL_H_
#define QGRAPH_SRC_KERNEL_CALL_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace qg {

constexpr size_t kMaxKernelArgs = 32;

static_assert(sizeof(void*) == sizeof(int64_t), "a pointer argument travels as an int64");

namespace detail {

template <size_t>
using Int64 = int64_t;

template <size_t... I>
void call(const void* kernel, const int64_t* args, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(Int64<I>...)>(const_cast<void*>(kernel))(args[I]...);
}

template <size_t N>
#if defined(__clang__)
__attribute__((no_sanitize("function")))  // UBSan would look for type information in front of the kernel
#endif
void call_n(const void* kernel, const int64_t* args) {
  call(kernel, args, std::make_index_sequence<N>());
}

using Caller = void (*)(const void*, const int64_t*);

template <size_t... N>
constexpr std::array<Caller, sizeof...(N)> callers(std::index_sequence<N...>) {
  return {call_n<N>...};
}

}  // namespace detail

// Calls with args[0, count), count <= kMaxKernelArgs.
inline void call_kernel(const void* kernel, const int64_t* args, size_t count) {
  static constexpr auto kCallers = detail::callers(std::make_index_sequence<kMaxKernelArgs + 1>());
  kCallers[count](kernel, args);
}

}  // namespace qg

#endif  // QGRAPH_SRC_KERNEL_CALL_H_
