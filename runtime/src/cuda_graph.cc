#include "cuda_graph.h"

#include <algorithm>

namespace qg::cuda {
namespace {

constexpr int64_t kMaxBlocks = INT32_MAX;  // of a grid's first axis

}  // namespace

CudaGraph::CudaGraph(const CudaProgram& program, const StepTable& table, const std::vector<OwnEvent>* events)
    : program_(program), timed_(events != nullptr), pointers_(kMaxPlanArgs) {
  try {
    build(table, events);
  } catch (...) {
    release();
    throw;
  }
}

CudaGraph::~CudaGraph() { release(); }

void CudaGraph::release() noexcept {
  program_.context().release([this](const Driver& driver) {
    if (exec_) driver.graph_exec_destroy(exec_);
    if (graph_) driver.graph_destroy(graph_);
  });
}

KernelParams CudaGraph::params(size_t index, int64_t blocks, int64_t* args) {
  const Step& step = program_.plan().steps[index];
  if (blocks > kMaxBlocks) {
    fail(QG_UNSUPPORTED, "step '", step.name, "': ", blocks, " blocks, a GPU takes at most ", kMaxBlocks);
  }
  for (size_t i = 0; i < step.args.size(); ++i) pointers_[i] = &args[i];
  KernelParams params = program_.launch(step.kernel);
  params.grid_x = static_cast<unsigned>(blocks);
  params.params = pointers_.data();
  return params;
}

void CudaGraph::build(const StepTable& table, const std::vector<OwnEvent>* events) {
  const Driver& driver = program_.context().driver();
  const std::vector<Step>& steps = program_.plan().steps;
  check(driver.graph_create(&graph_, 0), "cannot make a CUDA graph");
  GraphNode last = nullptr;
  auto record = [&](const OwnEvent& event) {
    GraphNode node = nullptr;
    check(driver.graph_event(&node, graph_, &last, last ? 1 : 0, event.get()), "cannot time steps");
    last = node;
  };
  for (size_t i = 0; i < table.blocks.size(); ++i) {
    if (table.blocks[i] == 0) continue;
    if (events) record((*events)[steps_.size()]);
    size_t first = args_.size();
    for (size_t a = 0; a < steps[i].args.size(); ++a) args_.push_back(table.argument(i, a));
    KernelParams launch = params(i, table.blocks[i], args_.data() + first);
    GraphNode node = nullptr;
    check(driver.graph_kernel(&node, graph_, &last, last ? 1 : 0, &launch), "cannot launch step '",
          steps[i].name, "'");
    last = node;
    steps_.push_back(i);
    nodes_.push_back(node);
    blocks_.push_back(table.blocks[i]);
  }
  if (events) record((*events)[steps_.size()]);
  check(driver.graph_instantiate(&exec_, graph_, 0), "cannot make a CUDA graph");
}

bool CudaGraph::fits(const StepTable& table) const {
  size_t next = 0;
  for (size_t i = 0; i < table.blocks.size(); ++i) {
    if (table.blocks[i] == 0) continue;
    if (next == steps_.size() || steps_[next] != i) return false;
    ++next;
  }
  return next == steps_.size();
}

// Comparing all arguments costs less than a single call of the driver, and cannot miss one that changed.
void CudaGraph::update(const StepTable& table) {
  const Driver& driver = program_.context().driver();
  int64_t* args = args_.data();
  for (size_t n = 0; n < steps_.size(); ++n) {
    size_t index = steps_[n];
    const Step& step = program_.plan().steps[index];
    bool changed = blocks_[n] != table.blocks[index];
    for (size_t a = 0; a < step.args.size(); ++a) {
      int64_t value = table.argument(index, a);
      changed |= args[a] != value;
      args[a] = value;
    }
    if (changed) {
      blocks_[n] = table.blocks[index];
      KernelParams launch = params(index, blocks_[n], args);
      check(driver.graph_set_kernel(exec_, nodes_[n], &launch), "cannot launch step '", step.name, "'");
    }
    args += step.args.size();
  }
}

void CudaGraph::launch(Stream stream) {
  check(program_.context().driver().graph_launch(exec_, stream), "cannot launch the steps");
}

}  // namespace qg::cuda
