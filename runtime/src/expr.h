// Integer expressions over the named dimensions: shapes, sizes, offsets and block counts of a plan.
#ifndef QGRAPH_SRC_EXPR_H_
#define QGRAPH_SRC_EXPR_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "json.h"

namespace qg {

// A set of dims by index, in which those from 63 up share one place: it may hold more than was put into it,
// never less.
using DimSet = uint64_t;
constexpr DimSet kAllDims = ~DimSet{0};
constexpr DimSet dim_set(size_t dim) { return DimSet{1} << (dim < 63 ? dim : 63); }

class Expr {
 public:
  Expr() = default;
  static Expr constant_of(int64_t value);
  // `dims` are the names that may occur. Throws Error(QG_INVALID_FILE).
  static Expr parse(const JsonCursor& json, const std::vector<std::string>& dims);

  // Value for these dims. False on overflow or a division by a number below 1. Allocates nothing.
  [[nodiscard]] bool eval(const int64_t* dims, int64_t* result) const;

  // Set if the whole expression is one number, or one dim (its index).
  std::optional<int64_t> constant() const;
  std::optional<uint32_t> dim() const;

  // The dims that occur, and each occurrence by itself.
  DimSet dims() const;
  std::vector<uint32_t> dim_list() const;
  // Whether two expressions are written alike.
  bool operator==(const Expr& other) const;

  // "384", "batch", "(2 * sequence)", "min(a, b)".
  std::string text(const std::vector<std::string>& dims) const;

 private:
  enum class Op : uint8_t { kConst, kDim, kAdd, kSub, kMul, kFloorDiv, kCeilDiv, kMod, kMin, kMax };
  struct Instr {
    Op op;
    int64_t value;  // of kConst; the index of kDim; else 0
  };

  static Op op_of(const JsonCursor& name);
  static bool apply(Op op, int64_t a, int64_t b, int64_t* result);
  void append(const JsonCursor& json, const std::vector<std::string>& dims);

  std::vector<Instr> code_;  // postfix
};

}  // namespace qg

#endif  // QGRAPH_SRC_EXPR_H_
