// Memory of the host aligned to a cache line, which only grows, from the host's allocator or the C library's.
#ifndef QGRAPH_SRC_ALIGNED_BUFFER_H_
#define QGRAPH_SRC_ALIGNED_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "device.h"
#include "error.h"
#include "host.h"

namespace qg {

class AlignedBuffer final : public Buffer {
 public:
  static constexpr size_t kAlign = 64;

  explicit AlignedBuffer(const Allocator& allocator = {}) : allocator_(allocator) {}
  ~AlignedBuffer() override { release(); }

  // Throws also Error for memory that a host's allocator did not align.
  void reserve(size_t size) override {
    if (size <= size_) return;
    release();  // first, so that old and new are never held together
    data_ = static_cast<uint8_t*>(allocator_.allocate ? allocator_.allocate(allocator_.context, size, kAlign)
                                                      : std::aligned_alloc(kAlign, size));
    if (!data_) throw std::bad_alloc();
    size_ = size;
    if (reinterpret_cast<uintptr_t>(data_) % kAlign != 0) {
      release();
      fail(QG_INVALID_ARGUMENT, "the allocator gave memory that is not aligned to ", kAlign, " bytes");
    }
  }

  void release() noexcept override {
    uint8_t* data = std::exchange(data_, nullptr);
    size_t size = std::exchange(size_, 0);
    if (!data) return;
    if (allocator_.allocate) {
      allocator_.deallocate(allocator_.context, data, size);
    } else {
      std::free(data);
    }
  }

 private:
  Allocator allocator_;
};

}  // namespace qg

#endif  // QGRAPH_SRC_ALIGNED_BUFFER_H_
