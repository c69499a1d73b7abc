#include "cuda_context.h"

#include <utility>

namespace qg::cuda {

PrimaryContext::PrimaryContext(const Driver& driver, Ordinal ordinal)
    : driver_(driver), ordinal_(ordinal), name_(cat("cuda:", ordinal)) {
  check(driver_.device_get(&device_, ordinal), "cannot use ", name_);
  check(driver_.context_retain(&context_, device_), "cannot use ", name_);
}

PrimaryContext::~PrimaryContext() {
  if (!lost_by_fork()) driver_.context_release(device_);
}

PrimaryContext::Scope::Scope(const PrimaryContext& context) : driver_(cuda::driver()) {
  check(driver_.context_push(context.context_), "cannot use ", context.name());
}

PrimaryContext::Scope::~Scope() {
  Context popped;
  driver_.context_pop(&popped);
}

void DeviceBuffer::reserve(size_t size) {
  if (size <= size_) return;
  release();  // first, so that old and new are never held together
  PrimaryContext::Scope scope(context_);
  Address address = 0;
  Result result = context_.driver().memory_alloc(&address, size);
  if (result == kOutOfMemory) throw OutOfMemory(context_.name(), size, "CUDA_ERROR_OUT_OF_MEMORY");
  check(result, "cannot allocate ", size, " bytes on ", context_.name());
  data_ = reinterpret_cast<uint8_t*>(address);
  size_ = size;
}

void DeviceBuffer::release() noexcept {
  if (data_) context_.release([this](const Driver& driver) { driver.memory_free(address()); });
  data_ = nullptr;
  size_ = 0;
}

void PinnedBuffer::reserve(size_t size) {
  if (size <= size_) return;
  release();
  PrimaryContext::Scope scope(context_);
  void* data = nullptr;
  Result result = context_.driver().host_alloc(&data, size);
  if (result == kOutOfMemory) throw OutOfMemory("the host (pinned)", size, "CUDA_ERROR_OUT_OF_MEMORY");
  check(result, "cannot allocate ", size, " bytes of pinned host memory");
  data_ = static_cast<uint8_t*>(data);
  size_ = size;
}

void PinnedBuffer::release() noexcept {
  if (data_) context_.release([this](const Driver& driver) { driver.host_free(data_); });
  data_ = nullptr;
  size_ = 0;
}

OwnStream::OwnStream(const PrimaryContext& context) : context_(context) {
  PrimaryContext::Scope scope(context);
  check(context.driver().stream_create(&stream_, kNonBlockingStream), "cannot make a stream on ",
        context.name());
}

OwnStream::~OwnStream() {
  context_.release([this](const Driver& driver) { driver.stream_destroy(stream_); });
}

OwnEvent::OwnEvent(const PrimaryContext& context, unsigned flags) : context_(context) {
  PrimaryContext::Scope scope(context);
  check(context.driver().event_create(&event_, flags), "cannot make an event on ", context.name());
}

OwnEvent::OwnEvent(OwnEvent&& other) noexcept
    : context_(other.context_), event_(std::exchange(other.event_, nullptr)) {}

OwnEvent::~OwnEvent() {
  if (event_) context_.release([this](const Driver& driver) { driver.event_destroy(event_); });
}

}  // namespace qg::cuda
