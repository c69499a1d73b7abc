// kernels.c as a module of the fake CUDA driver (tests/cuda/fake_driver.cc): all blocks in one call.
#include <cstddef>
#include <cstdint>
#include <utility>

extern "C" {
#include "kernels.c"
}

namespace {

template <size_t>
using Int64 = int64_t;

// A kernel's parameters are eight bytes each; begin and end are not among them.
template <size_t... I>
void call(void* kernel, void** params, uint32_t grid, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(Int64<I>..., int64_t, int64_t)>(kernel)(*static_cast<int64_t*>(params[I])..., 0,
                                                                    grid);
}

template <typename... Params>
constexpr size_t count(void (*)(Params...)) {
  return sizeof...(Params) - 2;
}

}  // namespace

#define KERNEL(name)                                                                            \
  extern "C" void name##__launch(void** params, uint32_t grid, uint32_t, uint32_t) {            \
    call(reinterpret_cast<void*>(name), params, grid, std::make_index_sequence<count(name)>()); \
  }                                                                                             \
  extern "C" const int32_t name##__params = count(name);

KERNEL(add_bias)
KERNEL(scale_rows)
KERNEL(gather)
KERNEL(pool_rows)
KERNEL(copy)
KERNEL(append)
KERNEL(append_ids)
KERNEL(weigh)
KERNEL(attend)
KERNEL(recall)
KERNEL(refuse)
KERNEL(isa_id)
KERNEL(many)
