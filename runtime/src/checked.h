// int64 arithmetic that reports overflow: every size and offset of the runtime is computed with these.
#ifndef QGRAPH_SRC_CHECKED_H_
#define QGRAPH_SRC_CHECKED_H_

#include <cstdint>

namespace qg {

// Each returns false, and leaves *result unspecified, when the exact result does not fit.
[[nodiscard]] inline bool checked_add(int64_t a, int64_t b, int64_t* result) {
  return !__builtin_add_overflow(a, b, result);
}
[[nodiscard]] inline bool checked_sub(int64_t a, int64_t b, int64_t* result) {
  return !__builtin_sub_overflow(a, b, result);
}
[[nodiscard]] inline bool checked_mul(int64_t a, int64_t b, int64_t* result) {
  return !__builtin_mul_overflow(a, b, result);
}

// Division by b >= 1, rounded toward minus infinity; false for any other b.
[[nodiscard]] inline bool checked_floordiv(int64_t a, int64_t b, int64_t* result) {
  if (b < 1) return false;
  *result = a / b - (a % b < 0 ? 1 : 0);
  return true;
}
// Rounded toward plus infinity.
[[nodiscard]] inline bool checked_ceildiv(int64_t a, int64_t b, int64_t* result) {
  if (b < 1) return false;
  *result = a / b + (a % b > 0 ? 1 : 0);
  return true;
}
// Remainder of the floor division: in [0, b).
[[nodiscard]] inline bool checked_mod(int64_t a, int64_t b, int64_t* result) {
  if (b < 1) return false;
  *result = a % b + (a % b < 0 ? b : 0);
  return true;
}

// Smallest multiple of `step`, a power of two, that is >= a, for a >= 0.
[[nodiscard]] inline bool checked_round_up(int64_t a, int64_t step, int64_t* result) {
  if (!checked_add(a, step - 1, result)) return false;
  *result &= -step;
  return true;
}

}  // namespace qg

#endif  // QGRAPH_SRC_CHECKED_H_
