// A GPU's primary context, which all of the process shares (torch, CuPy), and what is made in it.
#ifndef QGRAPH_SRC_CUDA_CONTEXT_H_
#define QGRAPH_SRC_CUDA_CONTEXT_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda_driver.h"
#include "device.h"

namespace qg::cuda {

// Holds on to the primary context of a device.
class PrimaryContext {
 public:
  // Throws Error.
  PrimaryContext(const Driver& driver, Ordinal ordinal);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  const Driver& driver() const { return driver_; }
  Ordinal ordinal() const { return ordinal_; }
  const std::string& name() const { return name_; }  // "cuda:0"

  // Makes the context current on this thread while it lives: most calls need that.
  class Scope {
   public:
    // Throws Error, as driver() does.
    explicit Scope(const PrimaryContext& context);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    const Driver& driver_;
  };

  // Calls release(driver()) in the context; does nothing where there is nothing left to release. For
  // destructors: what the driver answers is of no use to anybody.
  template <typename Release>
  void release(Release release) const noexcept {
    if (lost_by_fork() || driver_.context_push(context_) != 0) return;
    release(driver_);
    Context popped;
    driver_.context_pop(&popped);
  }

 private:
  const Driver& driver_;
  Ordinal ordinal_;
  std::string name_;
  int device_ = 0;
  Context context_ = nullptr;
};

// Device memory.
class DeviceBuffer final : public Buffer {
 public:
  explicit DeviceBuffer(const PrimaryContext& context) : context_(context) {}
  ~DeviceBuffer() override { release(); }
  // Throws OutOfMemory, Error.
  void reserve(size_t size) override;
  void release() noexcept override;

  Address address() const { return reinterpret_cast<Address>(data_); }

 private:
  const PrimaryContext& context_;
};

// Host memory that the GPU copies from and to by itself.
class PinnedBuffer final : public Buffer {
 public:
  explicit PinnedBuffer(const PrimaryContext& context) : context_(context) {}
  ~PinnedBuffer() override { release(); }
  // Throws OutOfMemory, Error.
  void reserve(size_t size) override;
  void release() noexcept override;

 private:
  const PrimaryContext& context_;
};

// A stream that does not wait for the default one.
class OwnStream {
 public:
  explicit OwnStream(const PrimaryContext& context);
  ~OwnStream();
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

  Stream get() const { return stream_; }

 private:
  const PrimaryContext& context_;
  Stream stream_ = nullptr;
};

class OwnEvent {
 public:
  OwnEvent(const PrimaryContext& context, unsigned flags);
  ~OwnEvent();
  OwnEvent(OwnEvent&& other) noexcept;
  OwnEvent& operator=(OwnEvent&&) = delete;

  Event get() const { return event_; }

 private:
  const PrimaryContext& context_;
  Event event_ = nullptr;
};

}  // namespace qg::cuda

#endif  // QGRAPH_SRC_CUDA_CONTEXT_H_
