// Memory aligned to a cache line, which only grows.
#ifndef QGRAPH_SRC_ALIGNED_BUFFER_H_
#define QGRAPH_SRC_ALIGNED_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace qg {

class AlignedBuffer {
 public:
  // Makes room for `size` bytes, a multiple of 64; what was in the buffer is lost if it has to grow. Throws
  // std::bad_alloc.
  void reserve(size_t size) {
    if (size <= size_) return;
    data_.reset();  // first, so that old and new are never held together
    size_ = 0;
    data_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, size)));
    if (!data_) throw std::bad_alloc();
    size_ = size;
  }

  uint8_t* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t size_ = 0;
};

}  // namespace qg

#endif  // QGRAPH_SRC_ALIGNED_BUFFER_H_
