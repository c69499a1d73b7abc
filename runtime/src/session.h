// The state of one inference at a time: bindings, shapes, arena, threads.
#ifndef QGRAPH_SRC_SESSION_H_
#define QGRAPH_SRC_SESSION_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "aligned_buffer.h"
#include "binding.h"
#include "model.h"
#include "qgraph/qgraph.h"
#include "thread_pool.h"

namespace qg {

class Session {
 public:
  // `threads` 0 means all cores, `memory_limit` 0 none.
  Session(std::shared_ptr<const Model> model, int32_t threads, uint64_t memory_limit);

  // Each throws Error, QG_INVALID_ARGUMENT unless said otherwise in qgraph.h.
  void bind_input(size_t index, const qg_tensor& tensor);
  void bind_output(size_t index, const qg_tensor& tensor);
  void output_shape(size_t index, int32_t* ndim, int64_t* shape);
  void run();

  void profile(bool enabled);
  int64_t step_time(size_t step) const { return step < step_times_.size() ? step_times_[step] : -1; }
  int threads() const { return pool_->threads(); }
  uint64_t memory() const { return arena_.size() + scratch_.size(); }

 private:
  struct Extent {  // a value's shape and size for the current dims
    int64_t shape[QG_MAX_RANK] = {};
    int64_t bytes = 0;
  };
  struct Patch {  // a pointer argument into memory of the user: args_[arg] = data of the value + offset
    size_t arg;
    uint32_t value;
    int64_t offset;
  };
  class Exclusive;  // refuses a second thread

  // Bring what depends on shapes up to date with the bound inputs; nothing to do when no shape changed. The
  // first is enough to know the outputs' shapes, the second to run.
  void resolve_shapes();
  void resolve_dims();
  void check_constraints() const;
  void resolve_extents();
  void resolve_steps();
  void resolve_memory();
  void resolve_args();
  // Value of an expression for the current dims; `what()` names it in the error.
  template <typename What>
  int64_t eval(const Expr& expr, What what) const;
  std::string dims_text() const;

  void check_outputs() const;
  void check_overlaps() const;
  void patch_pointers();
  void run_step(size_t index);
  static void run_blocks(const void* call, int worker, int64_t begin, int64_t end);

  std::shared_ptr<const Model> model_;
  uint64_t memory_limit_;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::vector<Binding> inputs_, outputs_;

  bool shapes_resolved_ = false, steps_resolved_ = false;
  std::vector<int64_t> dims_;
  std::vector<const Port*> dim_source_;  // the input that bound each dim
  std::vector<Extent> extents_;          // by value
  std::vector<int64_t> slot_offsets_;    // by slot, into the arena
  std::vector<int64_t> blocks_;          // by step
  std::vector<int64_t> args_;            // of all steps, one after another
  std::vector<size_t> first_arg_;        // by step, into args_
  std::vector<Patch> patches_;
  std::vector<void*> user_data_;     // by value: the bound buffer of an input or output
  std::vector<int64_t> slot_bytes_;  // by slot

  AlignedBuffer arena_;
  AlignedBuffer scratch_;  // scratch_stride_ bytes for each thread
  int64_t scratch_stride_ = 0;
  int32_t status_ = 0;  // kernels write to it
  bool profile_ = false;
  std::vector<int64_t> step_times_;

  // Last: its threads end before what they use goes away.
  std::unique_ptr<ThreadPool, ThreadPoolDeleter> pool_;
};

}  // namespace qg

#endif  // QGRAPH_SRC_SESSION_H_
