// A CUDA graph of the steps of a run, one after another.
#ifndef QGRAPH_SRC_CUDA_GRAPH_H_
#define QGRAPH_SRC_CUDA_GRAPH_H_

#include <cstdint>
#include <vector>

#include "cuda_context.h"
#include "cuda_program.h"
#include "device.h"

namespace qg::cuda {

// It is for one set of steps, those that have blocks; their arguments and numbers of blocks may change from
// launch to launch.
class CudaGraph {
 public:
  // For the steps with blocks in `table`. With `events` it records one before each of them and one more at
  // the end. Throws Error.
  CudaGraph(const CudaProgram& program, const StepTable& table, const std::vector<OwnEvent>* events);
  ~CudaGraph();
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;

  bool timed() const { return timed_; }
  const std::vector<size_t>& steps() const { return steps_; }
  // Whether the steps with blocks are those of this graph.
  bool fits(const StepTable& table) const;

  // After an error it must not be used again.
  void update(const StepTable& table);
  void launch(Stream stream);

 private:
  void build(const StepTable& table, const std::vector<OwnEvent>* events);
  // The parameters of a step, of which the arguments are those at `args`.
  KernelParams params(size_t step, int64_t blocks, int64_t* args);
  void release() noexcept;

  const CudaProgram& program_;
  bool timed_;
  std::vector<size_t> steps_;
  Graph graph_ = nullptr;
  GraphExec exec_ = nullptr;
  // Of each of steps_: its node, and what that was given last.
  std::vector<GraphNode> nodes_;
  std::vector<int64_t> blocks_;
  std::vector<int64_t> args_;    // of all steps, one after another
  std::vector<void*> pointers_;  // to the arguments of one step
};

}  // namespace qg::cuda

#endif  // QGRAPH_SRC_CUDA_GRAPH_H_
