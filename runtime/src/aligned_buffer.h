// Memory aligned to a cache line, which only grows, from the host's allocator or the C library's.
#ifndef QGRAPH_SRC_ALIGNED_BUFFER_H_
#define QGRAPH_SRC_ALIGNED_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "error.h"
#include "qgraph/qgraph.h"

namespace qg {

struct Allocator {
  qg_allocate allocate = nullptr;  // NULL: the C library's
  qg_deallocate deallocate = nullptr;
  void* context = nullptr;
};

// Gives memory back where it came from.
struct Deallocate {
  Allocator from;
  size_t size = 0;
  void operator()(uint8_t* p) const {
    if (from.allocate) {
      from.deallocate(from.context, p, size);
    } else {
      std::free(p);
    }
  }
};

class AlignedBuffer {
 public:
  static constexpr size_t kAlign = 64;

  AlignedBuffer() = default;
  explicit AlignedBuffer(const Allocator& allocator) : allocator_(allocator) {}

  // Makes room for `size` bytes, a multiple of 64; what was in the buffer is lost if it has to grow. Throws
  // std::bad_alloc, and Error for memory that a host's allocator did not align.
  void reserve(size_t size) {
    if (size <= this->size()) return;
    release();  // first, so that old and new are never held together
    Data data(static_cast<uint8_t*>(allocate(size)), Deallocate{allocator_, size});
    if (!data) throw std::bad_alloc();
    if (reinterpret_cast<uintptr_t>(data.get()) % kAlign != 0) {
      fail(QG_INVALID_ARGUMENT, "the allocator gave memory that is not aligned to ", kAlign, " bytes");
    }
    data_ = std::move(data);
  }

  // Gives the memory back.
  void release() { data_.reset(); }

  uint8_t* data() const { return data_.get(); }
  size_t size() const { return data_ ? data_.get_deleter().size : 0; }
  const Allocator& allocator() const { return allocator_; }

 private:
  using Data = std::unique_ptr<uint8_t, Deallocate>;

  void* allocate(size_t size) const {
    return allocator_.allocate ? allocator_.allocate(allocator_.context, size, kAlign)
                               : std::aligned_alloc(kAlign, size);
  }

  Allocator allocator_;
  Data data_;
};

}  // namespace qg

#endif  // QGRAPH_SRC_ALIGNED_BUFFER_H_
