#include "session.h"

#include <algorithm>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "address.h"
#include "checked.h"
#include "dtype.h"
#include "error.h"
#include "thread_pool.h"

namespace qg {
namespace {

constexpr int32_t kMaxThreads = 4096;
constexpr size_t kNoSlot = SIZE_MAX;

int checked_threads(int32_t threads) {
  if (threads < 0 || threads > kMaxThreads) {
    fail(QG_INVALID_ARGUMENT, "threads is ", threads, ", outside [0, ", kMaxThreads, "]");
  }
  return threads == 0 ? available_cores() : threads;
}

Host host_of(const qg_session_options& options) {
  if (!options.allocate != !options.deallocate) {
    fail(QG_INVALID_ARGUMENT, "one of allocate and deallocate is NULL: give both or neither");
  }
  return {checked_threads(options.threads),
          {options.parallel_for, options.parallel_context},
          {options.allocate, options.deallocate, options.allocator_context}};
}

}  // namespace

class Session::Exclusive {
 public:
  explicit Exclusive(const Session* session) : flag_(session->busy_) {
    if (flag_.test_and_set())
      fail(QG_INVALID_ARGUMENT, "the session is in use by another thread: create one for each");
  }
  ~Exclusive() { flag_.clear(); }
  Exclusive(const Exclusive&) = delete;
  Exclusive& operator=(const Exclusive&) = delete;

 private:
  std::atomic_flag& flag_;
};

Session::Session(std::shared_ptr<const Model> model, const qg_session_options& options)
    : model_(std::move(model)),
      memory_limit_(options.memory_limit),
      executor_(model_->program().executor(host_of(options))),
      arena_(executor_->buffer()) {
  const Plan& plan = model_->plan();
  if (plan.state) {
    state_.emplace(plan, options.capacity, *executor_);
  } else if (options.capacity != 0) {
    fail(QG_INVALID_ARGUMENT, "capacity is ", options.capacity, ", but the model has no state");
  }
  inputs_.resize(plan.inputs.size());
  outputs_.resize(plan.outputs.size());
  choices_.resize(plan.dims.size());
  dims_.resize(plan.dims.size());
  other_dims_.resize(plan.dims.size());
  dim_source_.resize(plan.dims.size());
  extents_.resize(plan.values.size());
  uploads_.reserve(inputs_.size());
  downloads_.reserve(outputs_.size());
  slot_of_.assign(plan.values.size(), kNoSlot);
  slot_offsets_.resize(plan.slots + inputs_.size() + outputs_.size());
  slot_bytes_.resize(slot_offsets_.size());
  table_.blocks.resize(plan.steps.size());
  step_times_.assign(plan.steps.size(), -1);
  table_.bases.resize(plan.values.size() + 1);
  for (size_t i = 0; i < plan.values.size(); ++i) {
    if (plan.values[i].kind == Value::Kind::kTemp) slot_of_[i] = plan.values[i].slot;
    if (plan.values[i].kind == Value::Kind::kWeight) table_.bases[i] = model_->program().weight(i);
  }
  for (const Step& step : plan.steps) {
    table_.first_arg.push_back(table_.args.size());
    for (const Arg& arg : step.args) {
      table_.args.push_back({0, arg.kind == Arg::Kind::kPointer ? arg.value : plan.values.size()});
    }
  }
}

// ---- bindings

void Session::bind_input(size_t index, const qg_tensor& tensor) {
  Exclusive exclusive(this);
  const Plan& plan = model_->plan();
  if (index >= inputs_.size()) {
    fail(QG_INVALID_ARGUMENT, "input ", index, " does not exist: the model has ", inputs_.size());
  }
  const Port& port = plan.inputs[index];
  Binding binding = checked_binding("input", port, plan.values[port.value], tensor);
  check_input_dims(plan, port, binding);
  binding.reach = executor_->reach("input", port, binding);
  const Binding& old = inputs_[index];
  if (!old.bound || !std::equal(binding.shape, binding.shape + binding.rank, old.shape)) {
    shapes_resolved_ = false;
  }
  bind(plan.slots + index, port, &inputs_[index], binding);
}

void Session::bind_output(size_t index, const qg_tensor& tensor) {
  Exclusive exclusive(this);
  const Plan& plan = model_->plan();
  if (index >= outputs_.size()) {
    fail(QG_INVALID_ARGUMENT, "output ", index, " does not exist: the model has ", outputs_.size());
  }
  const Port& port = plan.outputs[index];
  Binding binding = checked_binding("output", port, plan.values[port.value], tensor);
  binding.reach = executor_->reach("output", port, binding);
  bind(plan.slots + inputs_.size() + index, port, &outputs_[index], binding);
}

// Where steps find the tensor: in memory of the caller, or in a slot of the arena, which may yet have to be
// made.
void Session::bind(size_t slot, const Port& port, Binding* old, const Binding& binding) {
  *old = binding;
  if (binding.reach == Reach::kDirect) {
    slot_of_[port.value] = kNoSlot;
    table_.bases[port.value] = address_of(binding.data);
  } else if (slot_of_[port.value] == kNoSlot) {
    slot_of_[port.value] = slot;
    layout_stale_ = true;
  }
}

void Session::output_shape(size_t index, int32_t* ndim, int64_t* shape) {
  Exclusive exclusive(this);
  if (index >= outputs_.size()) {
    fail(QG_INVALID_ARGUMENT, "output ", index, " does not exist: the model has ", outputs_.size());
  }
  resolve_shapes();
  uint32_t value = model_->plan().outputs[index].value;
  size_t rank = model_->plan().values[value].shape.size();
  *ndim = static_cast<int32_t>(rank);
  std::copy_n(extents_[value].shape, rank, shape);
}

void Session::set_dim(std::string_view name, int64_t size) {
  Exclusive exclusive(this);
  const Plan& plan = model_->plan();
  std::string options;
  for (size_t i = 0; i < plan.dims.size(); ++i) {
    const Dim& dim = plan.dims[i];
    if (dim.kind != Dim::Kind::kOption) continue;
    if (plan.dim_names[i] != name) {
      options += cat(options.empty() ? "" : ", ", plan.dim_names[i]);
      continue;
    }
    if (size != 0 && (size < dim.min || size > dim.max)) {
      fail(QG_INVALID_ARGUMENT, name, " must lie in [", dim.min, ", ", dim.max, "], got ", size,
           ": or give 0 for its default");
    }
    if (choices_[i] != size) shapes_resolved_ = false;
    choices_[i] = size;
    return;
  }
  fail(QG_INVALID_ARGUMENT, "'", name, "' is not a dimension to choose: the model has ",
       options.empty() ? "none" : options);
}

// ---- state

State& Session::require_state() {
  if (!state_) fail(QG_INVALID_ARGUMENT, "the model has no state");
  return *state_;
}

void Session::truncate(int64_t length) {
  Exclusive exclusive(this);
  State& state = require_state();
  if (length < 0 || length > state.length()) {
    fail(QG_INVALID_ARGUMENT, "cannot truncate the state to ", length, " tokens: it holds ", state.length());
  }
  state.set_length(length);
  shapes_resolved_ = false;
}

void Session::copy_state(const Session& from, const int64_t* rows, size_t count) {
  Exclusive exclusive(this);
  std::optional<Exclusive> other;
  if (&from != this) other.emplace(&from);
  State& state = require_state();
  if (from.model_ != model_) fail(QG_INVALID_ARGUMENT, "the sessions are of different models");
  const State& source = *from.state_;
  if (source.length() == 0) {  // of no rows either
    state.set_length(0);
    shapes_resolved_ = false;
    return;
  }
  if (source.length() > state.capacity()) {
    fail(QG_INVALID_ARGUMENT, "a state of ", source.length(),
         " tokens does not fit a session with a capacity of ", state.capacity());
  }
  if (rows && (count == 0 || count > static_cast<size_t>(PTRDIFF_MAX))) {
    fail(QG_INVALID_ARGUMENT, "the number of rows to copy is ", count);
  }
  for (size_t i = 0; rows && i < count; ++i) {
    if (rows[i] < 0 || rows[i] >= source.rows()) {
      fail(QG_INVALID_ARGUMENT, "row ", rows[i], " of a state of ", source.rows(), " does not exist");
    }
  }
  int64_t new_rows = rows ? static_cast<int64_t>(count) : source.rows();
  std::optional<int64_t> bytes = state.bytes(new_rows);
  if (bytes) bytes = std::max(*bytes, static_cast<int64_t>(state.memory()));  // kept until all is copied
  make_room(0, bytes);
  state.copy(source, rows, new_rows);
  point_to_state();
  shapes_resolved_ = dims_known_ = false;
}

void Session::point_to_state() {
  state_->places([this](uint32_t value, uint8_t* data) { table_.bases[value] = address_of(data); });
}

// ---- shapes

std::string Session::dims_text(const std::vector<int64_t>& dims) const {
  std::string text;
  for (size_t i = 0; i < dims.size(); ++i) {
    text += cat(i == 0 ? " with " : ", ", model_->plan().dim_names[i], "=", dims[i]);
  }
  if (state_) text += cat(", ", state_->length(), " tokens held");
  return text;
}

template <typename What>
int64_t Session::eval(const Expr& expr, const std::vector<int64_t>& dims, What what) const {
  int64_t result = 0;
  if (!expr.eval(dims.data(), &result)) {
    fail(QG_INVALID_ARGUMENT, what(), ": ", expr.text(model_->plan().dim_names),
         " overflows or divides by less than 1", dims_text(dims));
  }
  return result;
}

void Session::resolve_shapes() {
  if (shapes_resolved_) return;
  // Until all is well nothing is known, and after a failure all is computed anew.
  bool known = std::exchange(dims_known_, false);
  other_dims_ = dims_;
  resolve_dims();
  check_constraints();
  DimSet changed = known ? 0 : kAllDims;
  layout_stale_ |= !known;
  for (size_t i = 0; i < dims_.size(); ++i) {
    if (dims_[i] == other_dims_[i]) continue;
    changed |= dim_set(i);
    layout_stale_ |= !state_ || i != model_->plan().state->total;  // slots have room for any total
  }
  resolve_extents(changed);
  stale_ |= changed;
  dims_known_ = shapes_resolved_ = true;
}

// In the order of what may refer to what: inputs, the state, options.
void Session::resolve_dims() {
  bind_dims();
  if (state_) grow_state();
  choose_options();
  check_input_shapes();
}

void Session::bind_dims() {
  const Plan& plan = model_->plan();
  std::fill(dim_source_.begin(), dim_source_.end(), nullptr);
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Port& port = plan.inputs[i];
    if (!inputs_[i].bound) fail(QG_INVALID_ARGUMENT, "input '", port.name, "' is not bound");
    const std::vector<Expr>& shape = plan.values[port.value].shape;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      std::optional<uint32_t> dim = shape[axis].dim();
      if (!dim || plan.dims[*dim].kind != Dim::Kind::kInput) continue;
      int64_t size = inputs_[i].shape[axis];
      const Port*& source = dim_source_[*dim];
      if (source && size != dims_[*dim]) {
        fail(QG_INVALID_ARGUMENT, "input '", port.name, "' axis ", axis, ": ", port.dims[axis], " is ", size,
             ", but input '", source->name, "' has it at ", dims_[*dim]);
      }
      source = &port;
      dims_[*dim] = size;
    }
  }
}

// The dims that follow from what the state holds, and whether it has room for what a run adds.
void Session::grow_state() {
  const StatePlan& plan = *model_->plan().state;
  const Dim& bounds = model_->plan().dims[plan.total];
  auto label = [] { return "state"; };
  int64_t held = state_->length(), added = eval(plan.added, label), rows = eval(plan.rows, label), total = 0;
  if (added < 0 || !checked_add(held, added, &total)) {
    fail(QG_INVALID_ARGUMENT, "a run cannot add ", added, " tokens to the state", dims_text());
  }
  if (held > 0 && rows != state_->rows()) {
    fail(QG_INVALID_ARGUMENT, "the state holds ", held, " tokens of ", state_->rows(),
         " rows, but the inputs have ", rows, ": reset the state first, or copy rows of it");
  }
  int64_t room = std::min(state_->capacity(), bounds.max);
  if (total > room) {
    bool larger = total <= std::min(model_->plan().dims[plan.capacity].max, bounds.max);
    fail(QG_INVALID_ARGUMENT, "the state holds ", held, " tokens and has room for ", room, ", so ", added,
         " more do not fit: ", held > 0 ? "truncate or reset it" : "", held > 0 && larger ? ", or " : "",
         larger      ? "make a session with a larger capacity"
         : held == 0 ? "give fewer, the model takes no more"
                     : "");
  }
  if (total < bounds.min) {
    fail(QG_INVALID_ARGUMENT, "the state would hold ", total, " tokens, but ",
         model_->plan().dim_names[plan.total], " is at least ", bounds.min);
  }
  dims_[plan.total] = total;
  dims_[plan.capacity] = state_->capacity();
}

void Session::choose_options() {
  const Plan& plan = model_->plan();
  for (size_t i = 0; i < dims_.size(); ++i) {
    const Dim& dim = plan.dims[i];
    if (dim.kind != Dim::Kind::kOption) continue;
    auto label = [&] { return cat("default of '", plan.dim_names[i], "'"); };
    int64_t size = choices_[i] != 0 ? choices_[i] : eval(dim.default_size, label);
    if (size < dim.min || size > dim.max) {
      fail(QG_INVALID_ARGUMENT, label(), " must lie in [", dim.min, ", ", dim.max, "], but is ", size,
           dims_text());
    }
    dims_[i] = size;
  }
}

void Session::check_input_shapes() const {
  const Plan& plan = model_->plan();
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Port& port = plan.inputs[i];
    const std::vector<Expr>& shape = plan.values[port.value].shape;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      auto label = [&] { return cat("input '", port.name, "' axis ", axis); };
      int64_t expected = eval(shape[axis], label);
      if (inputs_[i].shape[axis] != expected) {
        fail(QG_INVALID_ARGUMENT, label(), ": expected ", port.dims[axis], " = ", expected, dims_text(),
             ", got ", inputs_[i].shape[axis]);
      }
    }
  }
}

void Session::check_constraints() const {
  for (const Check& check : model_->plan().checks) {
    auto label = [&] { return cat("check '", check.message, "'"); };
    if (eval(check.a, label) < eval(check.b, label)) fail(QG_INVALID_ARGUMENT, check.message, dims_text());
  }
}

Session::Extent Session::extent(size_t index, const std::vector<int64_t>& dims) const {
  const Value& value = model_->plan().values[index];
  Extent extent;
  auto label = [&] { return cat("shape of value ", index); };
  for (size_t axis = 0; axis < value.shape.size(); ++axis) {
    extent.shape[axis] = eval(value.shape[axis], dims, label);
  }
  std::optional<int64_t> bytes = dense_bytes(extent.shape, value.shape.size(), value.dtype);
  if (!bytes) {
    fail(QG_INVALID_ARGUMENT, label(), ": ", tensor_text(value.dtype, extent.shape, value.shape.size()),
         " has a negative dimension or ", kTooManyBytes, dims_text(dims));
  }
  extent.bytes = *bytes;
  return extent;
}

void Session::resolve_extents(DimSet changed) {
  const Plan& plan = model_->plan();
  for (size_t i = 0; i < plan.values.size(); ++i) {
    const Value& value = plan.values[i];
    if (value.kind == Value::Kind::kWeight) {
      extents_[i].bytes = value.weight_bytes;
    } else if (changed == kAllDims || (value.dims & changed) != 0) {
      extents_[i] = extent(i, dims_);
      layout_stale_ |= slot_of_[i] != kNoSlot && extents_[i].bytes > slot_bytes_[slot_of_[i]];
    }
  }
}

// ---- memory and arguments

void Session::resolve_steps() {
  resolve_shapes();
  if (layout_stale_) {
    resolve_memory();
    layout_stale_ = false;
  }
  // A failure half-way leaves everything to be computed.
  DimSet changed = std::exchange(stale_, kAllDims);
  for (size_t i = 0; i < table_.blocks.size(); ++i) resolve_step(i, changed);
  stale_ = 0;
}

void Session::resolve_memory() {
  const Plan& plan = model_->plan();
  std::optional<int64_t> arena = size_slots();
  auto label = [] { return "rows of the state"; };
  bool begins = state_ && state_->length() == 0;
  int64_t rows = begins ? eval(plan.state->rows, label) : 0;
  std::optional<int64_t> state = state_ ? static_cast<int64_t>(state_->memory()) : 0;
  if (begins) state = state_->bytes(rows);
  make_room(arena, state);
  const uint64_t before = memory();
  try {
    if (begins) {
      state_->reserve(rows);
      point_to_state();
    }
    arena_->reserve(static_cast<size_t>(*arena));
    executor_->reserve();
  } catch (const std::bad_alloc& e) {
    std::string held =
        state_ ? cat(", ", *state, " for a state with room for ", state_->capacity(), " tokens") : "";
    fail(QG_OUT_OF_MEMORY, out_of_memory_text(e), ": ", *arena, " bytes for temporaries", held, dims_text());
  }
  if (log() && memory() != before) {
    log().write(QG_LOG_INFO, "memory: ", memory(), " bytes", dims_text());
  }
  for (size_t i = 0; i < plan.values.size(); ++i) {
    if (slot_of_[i] == kNoSlot) continue;
    table_.bases[i] = address_of(arena_->data()) + slot_offsets_[slot_of_[i]];
  }
}

// Bytes of the arena, nothing on overflow. A slot has room for its temporaries when the state is full, too: a
// run that differs from the one before in the state's length alone needs no other memory.
std::optional<int64_t> Session::size_slots() {
  const Plan& plan = model_->plan();
  DimSet grows = 0;
  if (state_) {
    grows = dim_set(plan.state->total);
    other_dims_ = dims_;
    other_dims_[plan.state->total] = std::min(state_->capacity(), plan.dims[plan.state->total].max);
  }
  std::fill(slot_bytes_.begin(), slot_bytes_.end(), 0);
  for (size_t i = 0; i < plan.values.size(); ++i) {
    const Value& value = plan.values[i];
    if (slot_of_[i] == kNoSlot) continue;
    int64_t& bytes = slot_bytes_[slot_of_[i]];
    bytes = std::max(bytes, extents_[i].bytes);
    if ((value.dims & grows) != 0) bytes = std::max(bytes, extent(i, other_dims_).bytes);
  }
  int64_t arena = 0;
  for (size_t slot = 0; slot < slot_offsets_.size(); ++slot) {
    slot_offsets_[slot] = arena;
    if (!checked_round_up(slot_bytes_[slot], executor_->alignment(), &slot_bytes_[slot]) ||
        !checked_add(arena, slot_bytes_[slot], &arena)) {
      return std::nullopt;
    }
  }
  return arena;
}

// Refuses an arena and a state of these bytes if they are too large, and gives back memory of earlier shapes
// that would bring all above the limit.
void Session::make_room(std::optional<int64_t> arena, std::optional<int64_t> state) {
  int64_t scratch = executor_->needed(), total = 0;
  if (!arena || !state || !checked_add(*arena, *state, &total) || !checked_add(total, scratch, &total) ||
      !addressable(total)) {
    fail(QG_OUT_OF_MEMORY, "temporaries and state of ", kTooManyBytes, dims_text());
  }
  if (memory_limit_ == 0) return;
  uint64_t needed = static_cast<uint64_t>(total);
  if (needed > memory_limit_) {
    fail(QG_OUT_OF_MEMORY, "needs ", total,
         " bytes for temporaries, scratch memory and state, above the limit of ", memory_limit_, dims_text());
  }
  uint64_t held = static_cast<uint64_t>(scratch) + std::max(arena_->size(), static_cast<size_t>(*arena)) +
                  std::max(state_ ? state_->memory() : 0, static_cast<size_t>(*state));
  if (held > memory_limit_) {
    arena_->release();
    layout_stale_ = true;
    if (state_ && state_->length() == 0) state_->release();
  }
}

void Session::resolve_step(size_t index, DimSet changed) {
  const Step& step = model_->plan().steps[index];
  bool all = changed == kAllDims;
  if (!all && (step.dims & changed) == 0) return;
  auto label = [&] { return cat("step '", step.name, "'"); };
  all |= table_.blocks[index] == 0;  // its arguments were not computed
  table_.blocks[index] = eval(step.blocks, label);
  if (table_.blocks[index] < 0)
    fail(QG_INVALID_ARGUMENT, label(), ": ", table_.blocks[index], " blocks", dims_text());
  if (table_.blocks[index] == 0) return;  // not run: the corner of an empty tensor may lie beyond its buffer
  for (size_t a = 0; a < step.args.size(); ++a) {
    const Arg& arg = step.args[a];
    if (!all && (arg.dims & changed) == 0) continue;
    int64_t& number = table_.args[table_.first_arg[index] + a].number;
    switch (arg.kind) {
      case Arg::Kind::kInteger:
        number = eval(arg.expr, label);
        break;
      case Arg::Kind::kStatus:
        number = executor_->status(index);
        break;
      case Arg::Kind::kScratch:
        break;  // the executor fills in the thread's own
      case Arg::Kind::kPointer:
        number = eval(arg.expr, label);
        if (number < 0 || number > extents_[arg.value].bytes) {
          fail(QG_INVALID_FILE, label(), ": argument ", a, " points ", number, " bytes into a value of ",
               extents_[arg.value].bytes, dims_text());
        }
        break;
    }
  }
}

// ---- running

void Session::check_outputs() const {
  const Plan& plan = model_->plan();
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const Port& port = plan.outputs[i];
    const Value& value = plan.values[port.value];
    const Extent& extent = extents_[port.value];
    if (!outputs_[i].bound) fail(QG_INVALID_ARGUMENT, "output '", port.name, "' is not bound");
    if (!std::equal(extent.shape, extent.shape + value.shape.size(), outputs_[i].shape)) {
      fail(QG_INVALID_ARGUMENT, "output '", port.name, "': expected ",
           tensor_text(value.dtype, extent.shape, value.shape.size()), ", got ",
           tensor_text(value.dtype, outputs_[i].shape, value.shape.size()));
    }
  }
}

void Session::check_overlaps() const {
  const Plan& plan = model_->plan();
  for (size_t i = 0; i < outputs_.size(); ++i) {
    for (size_t j = 0; j < inputs_.size(); ++j) {
      if (overlap(outputs_[i], inputs_[j])) {
        fail(QG_INVALID_ARGUMENT, "output '", plan.outputs[i].name, "' overlaps input '", plan.inputs[j].name,
             "'");
      }
    }
    for (size_t j = 0; j < i; ++j) {
      if (overlap(outputs_[i], outputs_[j])) {
        fail(QG_INVALID_ARGUMENT, "output '", plan.outputs[i].name, "' overlaps output '",
             plan.outputs[j].name, "'");
      }
    }
  }
}

// What has to be copied before and behind the steps.
void Session::list_transfers() {
  const Plan& plan = model_->plan();
  auto list = [this](const std::vector<Port>& ports, const std::vector<Binding>& bindings,
                     std::vector<Transfer>* transfers) {
    transfers->clear();
    for (size_t i = 0; i < ports.size(); ++i) {
      const Binding& binding = bindings[i];
      if (binding.reach == Reach::kDirect) continue;
      uint32_t value = ports[i].value;
      transfers->push_back(
          {binding.data, table_.bases[value], binding.bytes, slot_bytes_[slot_of_[value]], binding.reach});
    }
  };
  list(plan.inputs, inputs_, &uploads_);
  list(plan.outputs, outputs_, &downloads_);
}

void Session::run() {
  Exclusive exclusive(this);
  if (executor_->orphaned() && !std::exchange(orphan_told_, true)) {
    log().write(QG_LOG_WARNING, "after fork() a session's threads are gone: this thread does all the work");
  }
  resolve_steps();
  check_outputs();
  check_overlaps();
  list_transfers();
  executor_->run(table_, uploads_, downloads_, profile_ ? &step_times_ : nullptr);
  if (state_) {
    state_->set_length(dims_[model_->plan().state->total]);
    shapes_resolved_ = false;
  }
}

void Session::profile(bool enabled) {
  Exclusive exclusive(this);
  profile_ = enabled;
  std::fill(step_times_.begin(), step_times_.end(), -1);
}

void Session::wait(void* stream) {
  Exclusive exclusive(this);
  executor_->wait(stream);
}

}  // namespace qg
