// Views of tensors in the user's memory: what of them can be checked against the plan without knowing other
// tensors.
#ifndef QGRAPH_SRC_BINDING_H_
#define QGRAPH_SRC_BINDING_H_

#include <cstdint>
#include <optional>
#include <string>

#include "dtype.h"
#include "error.h"
#include "plan.h"
#include "qgraph/qgraph.h"

namespace qg {

// How kernels get at memory of the caller: directly, or by a copy, for which the GPU can read or write it by
// itself (pinned), or not (pageable); or which is on the GPU, but not aligned as kernels want it.
enum class Reach { kDirect, kPageable, kPinned, kUnaligned };

// A checked copy of a qg_tensor.
struct Binding {
  bool bound = false;
  Reach reach = Reach::kDirect;
  void* data = nullptr;
  int32_t rank = 0;
  int64_t shape[QG_MAX_RANK] = {};
  int64_t bytes = 0;
};

// "i64 [batch, 384]", from sizes or names.
template <typename Dims>
std::string tensor_text(int32_t dtype, const Dims& dims, size_t rank) {
  std::string text = cat(is_dtype(dtype) ? kDTypes[dtype].name : "an unknown dtype", " [");
  for (size_t i = 0; i < rank; ++i) text += cat(i == 0 ? "" : ", ", dims[i]);
  return text + "]";
}

// Bytes of a dense tensor; nothing on overflow or a negative dimension.
std::optional<int64_t> dense_bytes(const int64_t* shape, size_t rank, qg_dtype dtype);

// Checks dtype, rank, strides and data of a tensor for an input or output; `kind` is "input" or "output".
// Throws Error(QG_INVALID_ARGUMENT).
Binding checked_binding(const char* kind, const Port& port, const Value& value, const qg_tensor& tensor);

// Checks the sizes that an input must have whatever the other inputs are: fixed ones, and bounds of named
// dims.
void check_input_dims(const Plan& plan, const Port& port, const Binding& binding);

// Whether two buffers, neither of them empty, share a byte.
bool overlap(const Binding& a, const Binding& b);

}  // namespace qg

#endif  // QGRAPH_SRC_BINDING_H_
