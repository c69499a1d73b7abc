// A code image in executable memory; in WebAssembly, a table of functions (FORMAT.md).
#ifndef QGRAPH_SRC_CODE_IMAGE_H_
#define QGRAPH_SRC_CODE_IMAGE_H_

#include <cstddef>
#include <cstdint>
#include <utility>

namespace qg {

// Whether an image is bytes that were known when hashes were made.
#if defined(__wasm__)
constexpr bool kCodeIsHashed = false;
#else
constexpr bool kCodeIsHashed = true;
#endif

class CodeImage {
 public:
  // Copies the code to memory of its own, at a page boundary, and makes that read-execute: it is never
  // writable and executable at once. Throws Error(QG_IO_ERROR) where the system forbids it.
  CodeImage(const uint8_t* code, size_t size);
  // Code that is part of the program, and executable where it is.
  explicit CodeImage(const uint8_t* linked) : address_(const_cast<uint8_t*>(linked)) {}
  ~CodeImage();
  CodeImage(CodeImage&& other) noexcept
      : address_(std::exchange(other.address_, nullptr)), mapped_(std::exchange(other.mapped_, 0)) {}
  CodeImage& operator=(const CodeImage&) = delete;

  // The kernel of a plan's entry.
  const void* at(size_t offset) const;

 private:
  void* address_ = nullptr;
  size_t mapped_ = 0;  // 0: not ours
};

}  // namespace qg

#endif  // QGRAPH_SRC_CODE_IMAGE_H_
