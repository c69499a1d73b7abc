// Calls a kernel with a number of arguments known only at run time.
//
// Kernels take pointers and int64 only, at most 32 of them, and return nothing. The calling conventions that
// the runtime supports put such arguments where they put a row of words of the machine, whichever of the two
// a parameter is: the first in registers, the rest on the stack. On 64-bit processors each is a word: System
// V x86-64 (rdi rsi rdx rcx r8 r9), AAPCS64 (x0 to x7), RISC-V's LP64D (a0 to a7). In 32 bits (AAPCS: r0 to
// r3) a pointer is a word, and an int64 two, the lower half first, of which the first has an even number. So
// one prototype for each number of words calls every kernel. The kernels are machine code that no C++
// compiler sees, hence the language's rule about calling through another function type has nothing to bear
// on.
//
// WebAssembly checks the type of what is called through a pointer. There all kernels have one type, and get
// their arguments as a row of int64 in memory (FORMAT.md).
#ifndef QGRAPH_SRC_KERNEL_CALL_H_
#define QGRAPH_SRC_KERNEL_CALL_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace qg {

constexpr size_t kMaxKernelArgs = 32;

namespace detail {

#if defined(__wasm__)
using Word = int64_t;
constexpr size_t kMaxWords = kMaxKernelArgs;

inline void call_words(const void* kernel, const Word* words, size_t) {
  reinterpret_cast<void (*)(const Word*)>(const_cast<void*>(kernel))(words);
}
#else
using Word = intptr_t;
static_assert(sizeof(Word) == sizeof(void*) && (sizeof(Word) == 8 || sizeof(Word) == 4));
// Pointers and integers in turn leave a word free before each integer.
constexpr size_t kMaxWords = kMaxKernelArgs * sizeof(int64_t) / sizeof(Word);

template <size_t>
using WordOf = Word;

template <size_t... I>
void call(const void* kernel, const Word* words, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(WordOf<I>...)>(const_cast<void*>(kernel))(words[I]...);
}

template <size_t N>
#if defined(__clang__)
__attribute__((no_sanitize("function")))  // UBSan would look for type information in front of the kernel
#endif
void call_n(const void* kernel, const Word* words) {
  call(kernel, words, std::make_index_sequence<N>());
}

using Caller = void (*)(const void*, const Word*);

template <size_t... N>
constexpr std::array<Caller, sizeof...(N)> callers(std::index_sequence<N...>) {
  return {call_n<N>...};
}

inline void call_words(const void* kernel, const Word* words, size_t count) {
  static constexpr auto kCallers = callers(std::make_index_sequence<kMaxWords + 1>());
  kCallers[count](kernel, words);
}
#endif

}  // namespace detail

// The arguments of a call, in order, at most kMaxKernelArgs.
class KernelArgs {
 public:
  void pointer(int64_t address) { words_[count_++] = static_cast<detail::Word>(address); }

  void integer(int64_t value) {
    if constexpr (sizeof(detail::Word) == sizeof(int64_t)) {
      words_[count_++] = static_cast<detail::Word>(value);
    } else {
      if (count_ % 2 != 0) words_[count_++] = 0;
      words_[count_++] = static_cast<detail::Word>(value);
      words_[count_++] = static_cast<detail::Word>(value >> 32);
    }
  }

  void call(const void* kernel) const { detail::call_words(kernel, words_, count_); }

 private:
  size_t count_ = 0;
  detail::Word words_[detail::kMaxWords];
};

}  // namespace qg

#endif  // QGRAPH_SRC_KERNEL_CALL_H_
