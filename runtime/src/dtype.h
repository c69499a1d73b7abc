// The dtypes of tensors: names in the plan and sizes.
#ifndef QGRAPH_SRC_DTYPE_H_
#define QGRAPH_SRC_DTYPE_H_

#include <cstddef>
#include <cstdint>

#include "qgraph/qgraph.h"

namespace qg {

struct DType {
  const char* name;
  size_t size;
};

// In the order of qg_dtype.
constexpr DType kDTypes[] = {{"f32", 4}, {"f16", 2}, {"bf16", 2}, {"f64", 8}, {"i64", 8},
                             {"i32", 4}, {"i16", 2}, {"i8", 1},   {"u8", 1},  {"bool", 1}};
constexpr int32_t kDTypeCount = static_cast<int32_t>(sizeof(kDTypes) / sizeof(kDTypes[0]));
static_assert(kDTypeCount == QG_BOOL + 1, "one row for each qg_dtype");

constexpr bool is_dtype(int32_t dtype) { return dtype >= 0 && dtype < kDTypeCount; }

}  // namespace qg

#endif  // QGRAPH_SRC_DTYPE_H_
