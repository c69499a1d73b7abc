// What a session keeps from run to run: tokens, in the plan's values of kind state.
#ifndef QGRAPH_SRC_STATE_H_
#define QGRAPH_SRC_STATE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "aligned_buffer.h"
#include "plan.h"

namespace qg {

// The values are dense [rows, n, capacity, m] arrays, one after another in one buffer. Each holds length()
// tokens along its axis 2; what lies beyond them is undefined.
class State {
 public:
  // For a plan with a state. `capacity` 0 is the plan's default. Throws Error(QG_INVALID_ARGUMENT).
  State(const Plan& plan, int64_t capacity, const Allocator& allocator);

  int64_t capacity() const { return capacity_; }
  int64_t length() const { return length_; }
  int64_t rows() const { return rows_; }
  size_t memory() const { return buffer_.size(); }

  // Bytes for this many rows; nothing on overflow.
  std::optional<int64_t> bytes(int64_t rows) const;

  // Makes room for these rows, and forgets all tokens. Throws std::bad_alloc.
  void reserve(int64_t rows);

  // Gives all memory back. Only of an empty state.
  void release() { buffer_.release(); }

  // 0 <= length <= capacity().
  void set_length(int64_t length) { length_ = length; }

  // Takes the tokens of `from`, a state of the same plan, maybe this one: row i is that of rows[i] there, and
  // as many rows as `from` has if `rows` is NULL. length() of `from` is at most capacity(). Throws
  // std::bad_alloc, and is then as before.
  void copy(const State& from, const int64_t* rows, int64_t count);

  // Where a value of kind state, by its index in the plan, begins.
  template <typename Place>
  void places(Place place) const {
    for (const Part& part : parts_) place(part.value, buffer_.data() + part.offset);
  }

 private:
  struct Part {  // one value
    uint32_t value;
    int64_t heads, token_bytes;  // a row holds heads * capacity * token_bytes
    int64_t row_bytes;
    int64_t offset;  // into the buffer, for rows_
  };

  static void lay_out(int64_t rows, std::vector<Part>* parts);

  int64_t capacity_, length_ = 0, rows_ = 0;
  std::vector<Part> parts_;
  AlignedBuffer buffer_;
};

}  // namespace qg

#endif  // QGRAPH_SRC_STATE_H_
