// One inference at a time: bindings, shapes, arena, threads, and what is kept between runs.
#ifndef QGRAPH_SRC_SESSION_H_
#define QGRAPH_SRC_SESSION_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "binding.h"
#include "device.h"
#include "model.h"
#include "qgraph/qgraph.h"
#include "state.h"

namespace qg {

class Session {
 public:
  Session(std::shared_ptr<const Model> model, const qg_session_options& options);

  // Each throws Error, QG_INVALID_ARGUMENT unless said otherwise in qgraph.h.
  void bind_input(size_t index, const qg_tensor& tensor);
  void bind_output(size_t index, const qg_tensor& tensor);
  void output_shape(size_t index, int32_t* ndim, int64_t* shape);
  void set_dim(std::string_view name, int64_t size);
  void run();

  void truncate(int64_t length);
  void copy_state(const Session& from, const int64_t* rows, size_t count);
  int64_t capacity() const { return state_ ? state_->capacity() : 0; }
  int64_t length() const { return state_ ? state_->length() : 0; }

  void profile(bool enabled);
  void* stream() const { return executor_->stream(); }
  void wait(void* stream);
  int64_t step_time(size_t step) const { return step < step_times_.size() ? step_times_[step] : -1; }
  int threads() const { return executor_->threads(); }
  const Log& log() const { return model_->log(); }
  uint64_t memory() const {
    return arena_->size() + static_cast<uint64_t>(executor_->held()) + (state_ ? state_->memory() : 0);
  }

 private:
  struct Extent {  // a value's shape and size for the current dims
    int64_t shape[QG_MAX_RANK] = {};
    int64_t bytes = 0;
  };
  class Exclusive;  // refuses a second thread

  // Bring what depends on dims up to date with the bound inputs, the options and the state: what depends on
  // none that changed stays. The first is enough to know the outputs' shapes, the second to run.
  void resolve_shapes();
  void resolve_dims();
  void bind_dims();
  void grow_state();
  void choose_options();
  void check_input_shapes() const;
  void check_constraints() const;
  void resolve_extents(DimSet changed);
  void resolve_steps();
  void resolve_memory();
  std::optional<int64_t> size_slots();
  void make_room(std::optional<int64_t> arena, std::optional<int64_t> state);
  void point_to_state();
  void resolve_step(size_t index, DimSet changed);
  // Values for some dims, the current ones if not said otherwise; `what()` names the place in an error.
  template <typename What>
  int64_t eval(const Expr& expr, const std::vector<int64_t>& dims, What what) const;
  template <typename What>
  int64_t eval(const Expr& expr, What what) const {
    return eval(expr, dims_, what);
  }
  Extent extent(size_t value, const std::vector<int64_t>& dims) const;
  std::string dims_text(const std::vector<int64_t>& dims) const;
  std::string dims_text() const { return dims_text(dims_); }
  State& require_state();

  void bind(size_t slot, const Port& port, Binding* old, const Binding& binding);
  void list_transfers();
  void check_outputs() const;
  void check_overlaps() const;

  std::shared_ptr<const Model> model_;
  uint64_t memory_limit_;
  std::unique_ptr<Executor> executor_;
  mutable std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::vector<Binding> inputs_, outputs_;
  std::optional<State> state_;
  std::vector<int64_t> choices_;  // by dim: the size of an option, 0 for its default

  bool shapes_resolved_ = false;  // dims_ and extents_ are those of the next run
  bool dims_known_ = false;       // dims_ are those that extents_ were computed for
  bool layout_stale_ = true;      // slots and state may not fit
  DimSet stale_ = kAllDims;       // dims that changed since the steps were computed
  std::vector<int64_t> dims_;
  std::vector<int64_t> other_dims_;      // to compare or compute with
  std::vector<const Port*> dim_source_;  // the input that bound each dim
  std::vector<Extent> extents_;          // by value
  // Slots of the arena: the plan's, then one for each input and each output, empty where it is not copied.
  std::vector<size_t> slot_of_;        // by value, or kNoSlot
  std::vector<int64_t> slot_offsets_;  // by slot, into the arena
  std::vector<int64_t> slot_bytes_;    // by slot
  StepTable table_;
  std::vector<Transfer> uploads_, downloads_;
  std::unique_ptr<Buffer> arena_;
  bool profile_ = false;
  bool orphan_told_ = false;  // the log knows that the threads are gone
  std::vector<int64_t> step_times_;
};

}  // namespace qg

#endif  // QGRAPH_SRC_SESSION_H_
