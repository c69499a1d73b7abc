// A code image in executable memory.
#ifndef QGRAPH_SRC_CODE_IMAGE_H_
#define QGRAPH_SRC_CODE_IMAGE_H_

#include <cstddef>
#include <cstdint>

namespace qg {

class CodeImage {
 public:
  // Copies the code to memory of its own, at a page boundary, and makes that read-execute: it is never
  // writable and executable at once. Throws Error(QG_IO_ERROR) where the system forbids it.
  CodeImage(const uint8_t* code, size_t size);
  ~CodeImage();
  CodeImage(const CodeImage&) = delete;
  CodeImage& operator=(const CodeImage&) = delete;

  const void* at(size_t offset) const { return static_cast<const uint8_t*>(address_) + offset; }

 private:
  void* address_ = nullptr;
  size_t mapped_ = 0;
};

}  // namespace qg

#endif  // QGRAPH_SRC_CODE_IMAGE_H_
