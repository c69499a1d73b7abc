#include "binding.h"

#include <algorithm>

#include "address.h"
#include "checked.h"

namespace qg {
namespace {

bool is_dense(const qg_tensor& tensor) {
  if (!tensor.strides) return true;
  if (std::find(tensor.shape, tensor.shape + tensor.ndim, 0) != tensor.shape + tensor.ndim) return true;
  int64_t expected = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    if (!checked_mul(expected, tensor.shape[i], &expected)) return false;
  }
  return true;
}

}  // namespace

std::optional<int64_t> dense_bytes(const int64_t* shape, size_t rank, qg_dtype dtype) {
  if (std::any_of(shape, shape + rank, [](int64_t size) { return size < 0; })) return std::nullopt;
  // An empty tensor has no bytes, even where the product of its other dimensions would overflow.
  if (std::find(shape, shape + rank, 0) != shape + rank) return 0;
  int64_t bytes = static_cast<int64_t>(kDTypes[dtype].size);
  for (size_t i = 0; i < rank; ++i) {
    if (!checked_mul(bytes, shape[i], &bytes)) return std::nullopt;
  }
  if (!addressable(bytes)) return std::nullopt;
  return bytes;
}

Binding checked_binding(const char* kind, const Port& port, const Value& value, const qg_tensor& tensor) {
  auto refuse = [&](const auto&... problem) {
    fail(QG_INVALID_ARGUMENT, kind, " '", port.name, "': ", problem...);
  };
  size_t rank = value.shape.size();
  if (tensor.ndim < 0 || tensor.ndim > QG_MAX_RANK) {
    refuse("ndim is ", tensor.ndim, ", outside [0, ", QG_MAX_RANK, "]");
  }
  if (tensor.ndim > 0 && !tensor.shape) refuse("shape is NULL");
  if (tensor.dtype != value.dtype || static_cast<size_t>(tensor.ndim) != rank) {
    refuse("expected ", tensor_text(value.dtype, port.dims, rank), ", got ",
           tensor_text(tensor.dtype, tensor.shape, static_cast<size_t>(tensor.ndim)));
  }
  std::optional<int64_t> bytes = dense_bytes(tensor.shape, rank, value.dtype);
  if (!bytes) {
    refuse(tensor_text(tensor.dtype, tensor.shape, rank), " has a negative dimension or ", kTooManyBytes);
  }
  if (!is_dense(tensor)) refuse("the strides are not dense row-major: copy the tensor first");
  if (!tensor.data && *bytes > 0) refuse("data is NULL");
  size_t alignment = kDTypes[value.dtype].size;
  if (reinterpret_cast<uintptr_t>(tensor.data) % alignment != 0) {
    refuse("data is not aligned to its elements of ", alignment, " bytes");
  }
  Binding binding;
  binding.bound = true;
  binding.data = tensor.data;
  binding.rank = tensor.ndim;
  binding.bytes = *bytes;
  std::copy_n(tensor.shape, rank, binding.shape);
  return binding;
}

void check_input_dims(const Plan& plan, const Port& port, const Binding& binding) {
  const std::vector<Expr>& shape = plan.values[port.value].shape;
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    int64_t size = binding.shape[axis];
    if (std::optional<int64_t> expected = shape[axis].constant(); expected && size != *expected) {
      fail(QG_INVALID_ARGUMENT, "input '", port.name, "' axis ", axis, ": expected ", *expected, ", got ",
           size);
    }
    if (std::optional<uint32_t> dim = shape[axis].dim()) {
      const Dim& bounds = plan.dims[*dim];
      if (size < bounds.min || size > bounds.max) {
        fail(QG_INVALID_ARGUMENT, "input '", port.name, "' axis ", axis, ": ", port.dims[axis],
             " must lie in [", bounds.min, ", ", bounds.max, "], got ", size);
      }
    }
  }
}

bool overlap(const Binding& a, const Binding& b) {
  auto begin_a = reinterpret_cast<uintptr_t>(a.data), begin_b = reinterpret_cast<uintptr_t>(b.data);
  if (a.bytes == 0 || b.bytes == 0) return false;
  // Differences, so that no sum can wrap around.
  return begin_a <= begin_b ? begin_b - begin_a < static_cast<uintptr_t>(a.bytes)
                            : begin_a - begin_b < static_cast<uintptr_t>(b.bytes);
}

}  // namespace qg
