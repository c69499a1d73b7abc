#include "state.h"

#include <utility>

#include "address.h"
#include "checked.h"
#include "dtype.h"
#include "error.h"

namespace qg {

State::State(const Plan& plan, int64_t capacity, Executor& executor)
    : executor_(executor), buffer_(executor.buffer()) {
  const StatePlan& state = *plan.state;
  const Dim& bounds = plan.dims[state.capacity];
  capacity_ = capacity == 0 ? state.default_capacity : capacity;
  if (capacity_ < 1 || capacity_ < bounds.min || capacity_ > bounds.max) {
    fail(QG_INVALID_ARGUMENT, "capacity is ", capacity, ": the model allows ", bounds.min, " to ", bounds.max,
         " tokens, or 0 for its default of ", state.default_capacity);
  }
  for (uint32_t i = 0; i < plan.values.size(); ++i) {
    const Value& value = plan.values[i];
    if (value.kind != Value::Kind::kState) continue;
    Part part{i, value.shape[1].constant().value(), 0, 0, 0};
    int64_t width = value.shape[3].constant().value();
    if (!checked_mul(width, static_cast<int64_t>(kDTypes[value.dtype].size), &part.token_bytes) ||
        !checked_mul(part.heads, capacity_, &part.row_bytes) ||
        !checked_mul(part.row_bytes, part.token_bytes, &part.row_bytes)) {
      fail(QG_OUT_OF_MEMORY, "a state of ", kTooManyBytes, " for a capacity of ", capacity_);
    }
    parts_.push_back(part);
  }
}

std::optional<int64_t> State::bytes(int64_t rows) const {
  int64_t total = 0;
  for (const Part& part : parts_) {
    int64_t bytes = 0;
    if (!checked_mul(rows, part.row_bytes, &bytes) ||
        !checked_round_up(bytes, executor_.alignment(), &bytes) || !checked_add(total, bytes, &total)) {
      return std::nullopt;
    }
  }
  return total;
}

void State::lay_out(int64_t rows, std::vector<Part>* parts) const {
  int64_t offset = 0;
  for (Part& part : *parts) {
    part.offset = offset;
    offset += rows * part.row_bytes + (-(rows * part.row_bytes) & (executor_.alignment() - 1));
  }
}

void State::reserve(int64_t rows) {
  length_ = 0;
  buffer_->reserve(static_cast<size_t>(bytes(rows).value()));
  lay_out(rows, &parts_);
  rows_ = rows;
}

void State::copy(const State& from, const int64_t* rows, int64_t count) {
  if (!rows) count = from.rows_;
  size_t size = static_cast<size_t>(bytes(count).value());
  bool in_place = &from != this && size <= buffer_->size();
  std::unique_ptr<Buffer> fresh = in_place ? nullptr : executor_.buffer();
  if (!in_place) fresh->reserve(size);
  std::vector<Part> parts = parts_;
  lay_out(count, &parts);
  std::vector<RowCopy> copies;  // a head is a row
  for (size_t p = 0; p < parts.size(); ++p) {
    const Part& to = parts[p];
    const Part& source = from.parts_[p];
    int64_t held = from.length_ * to.token_bytes;
    if (held == 0 || to.heads == 0) continue;
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* target = (in_place ? buffer_ : fresh)->data() + to.offset + i * to.row_bytes;
      const uint8_t* row = from.buffer_->data() + source.offset + (rows ? rows[i] : i) * source.row_bytes;
      copies.push_back(
          {target, capacity_ * to.token_bytes, row, from.capacity_ * to.token_bytes, held, to.heads});
    }
  }
  executor_.copy(copies);
  if (!in_place) std::swap(buffer_, fresh);
  parts_ = std::move(parts);
  length_ = from.length_;
  rows_ = count;
}

}  // namespace qg
