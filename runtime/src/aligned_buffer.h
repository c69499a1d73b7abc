// Memory of the host aligned to a cache line, which only grows.
#ifndef QGRAPH_SRC_ALIGNED_BUFFER_H_
#define QGRAPH_SRC_ALIGNED_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "device.h"

namespace qg {

class AlignedBuffer final : public Buffer {
 public:
  ~AlignedBuffer() override { release(); }

  void reserve(size_t size) override {
    if (size <= size_) return;
    release();  // first, so that old and new are never held together
    data_ = static_cast<uint8_t*>(std::aligned_alloc(64, size));
    if (!data_) throw std::bad_alloc();
    size_ = size;
  }

  void release() noexcept override {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
};

}  // namespace qg

#endif  // QGRAPH_SRC_ALIGNED_BUFFER_H_
