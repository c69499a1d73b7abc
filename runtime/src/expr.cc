#include "expr.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "checked.h"
#include "error.h"

namespace qg {

Expr Expr::parse(const JsonCursor& json, const std::vector<std::string>& dims) {
  Expr expr;
  expr.append(json, dims);
  expr.code_.shrink_to_fit();
  return expr;
}

Expr Expr::constant_of(int64_t value) {
  Expr expr;
  expr.code_.push_back({Op::kConst, value});
  return expr;
}

Expr::Op Expr::op_of(const JsonCursor& name) {
  static constexpr std::pair<std::string_view, Op> kOps[] = {
      {"add", Op::kAdd},         {"sub", Op::kSub}, {"mul", Op::kMul}, {"floordiv", Op::kFloorDiv},
      {"ceildiv", Op::kCeilDiv}, {"mod", Op::kMod}, {"min", Op::kMin}, {"max", Op::kMax}};
  for (const auto& [text, op] : kOps) {
    if (text == name.string()) return op;
  }
  name.invalid(cat("is the unknown operator '", name.string(), "'"));
}

void Expr::append(const JsonCursor& json, const std::vector<std::string>& dims) {
  if (json.is_string()) {
    auto it = std::find(dims.begin(), dims.end(), json.string());
    if (it == dims.end()) json.invalid(cat("is the unknown dimension '", json.string(), "'"));
    code_.push_back({Op::kDim, it - dims.begin()});
  } else if (json.is_array()) {
    if (json.size() != 3) json.invalid("is not [operator, a, b]");
    Op op = op_of(json.element(0));
    append(json.element(1), dims);
    append(json.element(2), dims);
    code_.push_back({op, 0});
  } else {
    code_.push_back({Op::kConst, json.integer()});
  }
}

bool Expr::apply(Op op, int64_t a, int64_t b, int64_t* result) {
  switch (op) {
    case Op::kAdd:
      return checked_add(a, b, result);
    case Op::kSub:
      return checked_sub(a, b, result);
    case Op::kMul:
      return checked_mul(a, b, result);
    case Op::kFloorDiv:
      return checked_floordiv(a, b, result);
    case Op::kCeilDiv:
      return checked_ceildiv(a, b, result);
    case Op::kMod:
      return checked_mod(a, b, result);
    case Op::kMin:
      *result = std::min(a, b);
      return true;
    case Op::kMax:
      *result = std::max(a, b);
      return true;
    case Op::kConst:
    case Op::kDim:
      break;
  }
  return false;
}

bool Expr::eval(const int64_t* dims, int64_t* result) const {
  // An operand waits on the stack for every level of nesting at most, and the parser of JSON bounds the
  // nesting.
  int64_t stack[kMaxJsonDepth + 2];
  size_t top = 0;
  for (const Instr& instr : code_) {
    if (instr.op == Op::kConst) {
      stack[top++] = instr.value;
    } else if (instr.op == Op::kDim) {
      stack[top++] = dims[instr.value];
    } else {
      --top;
      if (!apply(instr.op, stack[top - 1], stack[top], &stack[top - 1])) return false;
    }
  }
  *result = stack[0];
  return true;
}

std::optional<int64_t> Expr::constant() const {
  if (code_.size() == 1 && code_[0].op == Op::kConst) return code_[0].value;
  return std::nullopt;
}

std::optional<uint32_t> Expr::dim() const {
  if (code_.size() == 1 && code_[0].op == Op::kDim) return static_cast<uint32_t>(code_[0].value);
  return std::nullopt;
}

DimSet Expr::dims() const {
  DimSet set = 0;
  for (uint32_t dim : dim_list()) set |= dim_set(dim);
  return set;
}

std::vector<uint32_t> Expr::dim_list() const {
  std::vector<uint32_t> list;
  for (const Instr& instr : code_) {
    if (instr.op == Op::kDim) list.push_back(static_cast<uint32_t>(instr.value));
  }
  return list;
}

bool Expr::operator==(const Expr& other) const {
  return std::equal(code_.begin(), code_.end(), other.code_.begin(), other.code_.end(),
                    [](const Instr& a, const Instr& b) { return a.op == b.op && a.value == b.value; });
}

std::string Expr::text(const std::vector<std::string>& dims) const {
  std::vector<std::string> stack;
  for (const Instr& instr : code_) {
    if (instr.op == Op::kConst) {
      stack.push_back(std::to_string(instr.value));
      continue;
    }
    if (instr.op == Op::kDim) {
      stack.push_back(dims[static_cast<size_t>(instr.value)]);
      continue;
    }
    std::string b = std::move(stack.back());
    stack.pop_back();
    std::string& a = stack.back();
    switch (instr.op) {
      case Op::kAdd:
        a = cat("(", a, " + ", b, ")");
        break;
      case Op::kSub:
        a = cat("(", a, " - ", b, ")");
        break;
      case Op::kMul:
        a = cat("(", a, " * ", b, ")");
        break;
      case Op::kFloorDiv:
        a = cat("(", a, " // ", b, ")");
        break;
      case Op::kMod:
        a = cat("(", a, " % ", b, ")");
        break;
      case Op::kCeilDiv:
        a = cat("ceildiv(", a, ", ", b, ")");
        break;
      case Op::kMin:
        a = cat("min(", a, ", ", b, ")");
        break;
      default:
        a = cat("max(", a, ", ", b, ")");
        break;
    }
  }
  return stack.back();
}

}  // namespace qg
