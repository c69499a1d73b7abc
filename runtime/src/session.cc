#include "session.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <optional>
#include <string_view>
#include <utility>

#include "checked.h"
#include "dtype.h"
#include "error.h"
#include "float_environment.h"
#include "kernel_call.h"

namespace qg {
namespace {

static_assert(kMaxPlanArgs + 2 == kMaxKernelArgs, "the plan's arguments, begin and end");

constexpr int32_t kStatusIndexOutOfRange = 1;
constexpr int32_t kMaxThreads = 4096;

int checked_threads(int32_t threads) {
  if (threads < 0 || threads > kMaxThreads) {
    fail(QG_INVALID_ARGUMENT, "threads is ", threads, ", outside [0, ", kMaxThreads, "]");
  }
  return threads == 0 ? available_cores() : threads;
}

struct StepCall {
  const Step* step;
  const void* kernel;
  const int64_t* args;
  uint8_t* scratch;
  int64_t scratch_stride;
};

}  // namespace

class Session::Exclusive {
 public:
  explicit Exclusive(Session* session) : flag_(session->busy_) {
    if (flag_.test_and_set())
      fail(QG_INVALID_ARGUMENT, "the session is in use by another thread: create one for each");
  }
  ~Exclusive() { flag_.clear(); }
  Exclusive(const Exclusive&) = delete;
  Exclusive& operator=(const Exclusive&) = delete;

 private:
  std::atomic_flag& flag_;
};

Session::Session(std::shared_ptr<const Model> model, int32_t threads, uint64_t memory_limit)
    : model_(std::move(model)), memory_limit_(memory_limit), pool_(new ThreadPool(checked_threads(threads))) {
  const Plan& plan = model_->plan();
  inputs_.resize(plan.inputs.size());
  outputs_.resize(plan.outputs.size());
  dims_.resize(plan.dims.size());
  dim_source_.resize(plan.dims.size());
  extents_.resize(plan.values.size());
  user_data_.resize(plan.values.size());
  slot_offsets_.resize(plan.slots);
  slot_bytes_.resize(plan.slots);
  blocks_.resize(plan.steps.size());
  first_arg_.resize(plan.steps.size());
  step_times_.assign(plan.steps.size(), -1);
  size_t args = 0, pointers = 0;
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& step = plan.steps[i];
    first_arg_[i] = args;
    args += step.args.size();
    pointers += static_cast<size_t>(std::count_if(
        step.args.begin(), step.args.end(), [](const Arg& arg) { return arg.kind == Arg::Kind::kPointer; }));
    scratch_stride_ = std::max(scratch_stride_, step.scratch_bytes);
  }
  args_.resize(args);
  patches_.reserve(pointers);
}

// ---- bindings

void Session::bind_input(size_t index, const qg_tensor& tensor) {
  Exclusive exclusive(this);
  const Plan& plan = model_->plan();
  if (index >= inputs_.size()) {
    fail(QG_INVALID_ARGUMENT, "input ", index, " does not exist: the model has ", inputs_.size());
  }
  const Port& port = plan.inputs[index];
  Binding binding = bind("input", port, plan.values[port.value], tensor);
  check_input_dims(plan, port, binding);
  Binding& old = inputs_[index];
  if (!old.bound || !std::equal(binding.shape, binding.shape + binding.rank, old.shape)) {
    shapes_resolved_ = steps_resolved_ = false;
  }
  old = binding;
  user_data_[port.value] = binding.data;
}

void Session::bind_output(size_t index, const qg_tensor& tensor) {
  Exclusive exclusive(this);
  const Plan& plan = model_->plan();
  if (index >= outputs_.size()) {
    fail(QG_INVALID_ARGUMENT, "output ", index, " does not exist: the model has ", outputs_.size());
  }
  const Port& port = plan.outputs[index];
  outputs_[index] = bind("output", port, plan.values[port.value], tensor);
  user_data_[port.value] = outputs_[index].data;
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

// ---- shapes

std::string Session::dims_text() const {
  std::string text;
  for (size_t i = 0; i < dims_.size(); ++i) {
    text += cat(i == 0 ? " with " : ", ", model_->plan().dim_names[i], "=", dims_[i]);
  }
  return text;
}

template <typename What>
int64_t Session::eval(const Expr& expr, What what) const {
  int64_t result = 0;
  if (!expr.eval(dims_.data(), &result)) {
    fail(QG_INVALID_ARGUMENT, what(), ": ", expr.text(model_->plan().dim_names),
         " overflows or divides by less than 1", dims_text());
  }
  return result;
}

void Session::resolve_shapes() {
  if (shapes_resolved_) return;
  resolve_dims();
  check_constraints();
  resolve_extents();
  shapes_resolved_ = true;
}

void Session::resolve_dims() {
  const Plan& plan = model_->plan();
  std::fill(dim_source_.begin(), dim_source_.end(), nullptr);
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Port& port = plan.inputs[i];
    if (!inputs_[i].bound) fail(QG_INVALID_ARGUMENT, "input '", port.name, "' is not bound");
    const std::vector<Expr>& shape = plan.values[port.value].shape;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      std::optional<uint32_t> dim = shape[axis].dim();
      if (!dim) continue;
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

void Session::resolve_extents() {
  const Plan& plan = model_->plan();
  for (size_t i = 0; i < plan.values.size(); ++i) {
    const Value& value = plan.values[i];
    Extent& extent = extents_[i];
    if (value.kind == Value::Kind::kWeight) {
      extent.bytes = value.weight_bytes;
      continue;
    }
    auto label = [&] { return cat("shape of value ", i); };
    for (size_t axis = 0; axis < value.shape.size(); ++axis)
      extent.shape[axis] = eval(value.shape[axis], label);
    std::optional<int64_t> bytes = dense_bytes(extent.shape, value.shape.size(), value.dtype);
    if (!bytes) {
      fail(QG_INVALID_ARGUMENT, label(), ": ", tensor_text(value.dtype, extent.shape, value.shape.size()),
           " has a negative dimension or more than 2^63 bytes", dims_text());
    }
    extent.bytes = *bytes;
  }
}

// ---- memory and arguments

void Session::resolve_steps() {
  if (steps_resolved_) return;
  resolve_shapes();
  resolve_memory();
  resolve_args();
  steps_resolved_ = true;
}

void Session::resolve_memory() {
  const Plan& plan = model_->plan();
  std::fill(slot_bytes_.begin(), slot_bytes_.end(), 0);
  for (size_t i = 0; i < plan.values.size(); ++i) {
    if (plan.values[i].kind != Value::Kind::kTemp) continue;
    int64_t& bytes = slot_bytes_[plan.values[i].slot];
    bytes = std::max(bytes, extents_[i].bytes);
  }
  int64_t arena = 0, scratch = 0, total = 0;
  bool fits = true;
  for (size_t slot = 0; slot < plan.slots; ++slot) {
    slot_offsets_[slot] = arena;
    fits = fits && checked_round_up_64(slot_bytes_[slot], &slot_bytes_[slot]) &&
           checked_add(arena, slot_bytes_[slot], &arena);
  }
  fits =
      fits && checked_mul(scratch_stride_, pool_->threads(), &scratch) && checked_add(arena, scratch, &total);
  if (!fits) fail(QG_OUT_OF_MEMORY, "temporaries of more than 2^63 bytes", dims_text());
  if (memory_limit_ != 0 && static_cast<uint64_t>(total) > memory_limit_) {
    fail(QG_OUT_OF_MEMORY, "needs ", total, " bytes for temporaries and scratch memory, above the limit of ",
         memory_limit_, dims_text());
  }
  arena_.reserve(static_cast<size_t>(arena));
  scratch_.reserve(static_cast<size_t>(scratch));
}

void Session::resolve_args() {
  const Plan& plan = model_->plan();
  patches_.clear();
  for (size_t s = 0; s < plan.steps.size(); ++s) {
    const Step& step = plan.steps[s];
    auto label = [&] { return cat("step '", step.name, "'"); };
    blocks_[s] = eval(step.blocks, label);
    if (blocks_[s] < 0) fail(QG_INVALID_ARGUMENT, label(), ": ", blocks_[s], " blocks", dims_text());
    if (blocks_[s] == 0) continue;  // not run: the corner of an empty tensor may lie beyond its buffer
    for (size_t a = 0; a < step.args.size(); ++a) {
      const Arg& arg = step.args[a];
      int64_t& slot = args_[first_arg_[s] + a];
      switch (arg.kind) {
        case Arg::Kind::kInteger:
          slot = eval(arg.expr, label);
          break;
        case Arg::Kind::kStatus:
          slot = reinterpret_cast<int64_t>(&status_);
          break;
        case Arg::Kind::kScratch:
          slot = 0;  // run_blocks() fills in the thread's own
          break;
        case Arg::Kind::kPointer: {
          const Value& value = plan.values[arg.value];
          int64_t offset = eval(arg.expr, label);
          if (offset < 0 || offset > extents_[arg.value].bytes) {
            fail(QG_INVALID_FILE, label(), ": argument ", a, " points ", offset, " bytes into a value of ",
                 extents_[arg.value].bytes, dims_text());
          }
          if (value.kind == Value::Kind::kWeight) {
            slot = reinterpret_cast<int64_t>(value.weight) + offset;
          } else if (value.kind == Value::Kind::kTemp) {
            slot = reinterpret_cast<int64_t>(arena_.data()) + slot_offsets_[value.slot] + offset;
          } else {
            patches_.push_back({first_arg_[s] + a, arg.value, offset});
          }
          break;
        }
      }
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

void Session::patch_pointers() {
  for (const Patch& patch : patches_) {
    args_[patch.arg] = reinterpret_cast<int64_t>(user_data_[patch.value]) + patch.offset;
  }
}

void Session::run() {
  Exclusive exclusive(this);
  resolve_steps();
  check_outputs();
  check_overlaps();
  patch_pointers();
  DefaultFloatEnvironment environment;
  __atomic_store_n(&status_, 0, __ATOMIC_RELAXED);
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (!profile_) {
      run_step(i);
      continue;
    }
    auto begin = std::chrono::steady_clock::now();
    run_step(i);
    step_times_[i] =
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin)
            .count();
  }
}

void Session::run_blocks(const void* context, int worker, int64_t begin, int64_t end) {
  const StepCall& call = *static_cast<const StepCall*>(context);
  const std::vector<Arg>& plan_args = call.step->args;
  int64_t args[kMaxKernelArgs];
  std::copy_n(call.args, plan_args.size(), args);
  if (call.step->scratch_bytes > 0) {
    int64_t own = reinterpret_cast<int64_t>(call.scratch) + worker * call.scratch_stride;
    for (size_t i = 0; i < plan_args.size(); ++i) {
      if (plan_args[i].kind == Arg::Kind::kScratch) args[i] = own + plan_args[i].scratch;
    }
  }
  args[plan_args.size()] = begin;
  args[plan_args.size() + 1] = end;
  call_kernel(call.kernel, args, plan_args.size() + 2);
}

void Session::run_step(size_t index) {
  const Step& step = model_->plan().steps[index];
  if (blocks_[index] == 0) return;
  StepCall call{&step, model_->kernel(step.kernel), args_.data() + first_arg_[index], scratch_.data(),
                scratch_stride_};
  pool_->run(blocks_[index], step.grain, run_blocks, &call);
  // Several threads may have written it; the end of run() orders their writes before this.
  int32_t status = __atomic_load_n(&status_, __ATOMIC_RELAXED);
  if (status == kStatusIndexOutOfRange) fail(QG_BAD_DATA, "step '", step.name, "': an index is out of range");
  if (status != 0) fail(QG_BAD_DATA, "step '", step.name, "': the kernel reports status ", status);
}

void Session::profile(bool enabled) {
  Exclusive exclusive(this);
  profile_ = enabled;
  std::fill(step_times_.begin(), step_times_.end(), -1);
}

}  // namespace qg
