// A session's runs on a GPU.
#ifndef QGRAPH_SRC_CUDA_EXECUTOR_H_
#define QGRAPH_SRC_CUDA_EXECUTOR_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda_context.h"
#include "cuda_graph.h"
#include "cuda_program.h"
#include "device.h"

namespace qg::cuda {

// A run is one launch of a CUDA graph between copies of inputs and outputs, all on one stream, and one wait
// for it at the end.
class CudaExecutor final : public Executor {
 public:
  explicit CudaExecutor(const CudaProgram& program);
  ~CudaExecutor() override;

  int threads() const override { return 1; }
  int64_t alignment() const override { return 256; }
  std::unique_ptr<Buffer> buffer() const override { return std::make_unique<DeviceBuffer>(context_); }
  void copy(const std::vector<RowCopy>& copies) override;

  int64_t needed() const override;
  int64_t held() const override { return static_cast<int64_t>(status_.size()); }
  void reserve() override;
  int64_t status(size_t step) override;

  Reach reach(const char* kind, const Port& port, const Binding& binding) override;
  void run(const StepTable& table, const std::vector<Transfer>& inputs, const std::vector<Transfer>& outputs,
           std::vector<int64_t>* times) override;
  void* stream() const override { return stream_.get(); }
  void wait(void* stream) override;

 private:
  void lay_out_staging(const std::vector<Transfer>& inputs, const std::vector<Transfer>& outputs);
  void upload(const std::vector<Transfer>& inputs);
  void download(const std::vector<Transfer>& outputs);
  void check_statuses();
  CudaGraph& graph_for(const StepTable& table, bool timed);

  const CudaProgram& program_;
  const PrimaryContext& context_;
  const Driver& driver_;
  OwnStream stream_;
  bool has_status_ = false;                         // some step has an argument of that kind
  bool clean_status_ = false;                       // status_ is all zero
  DeviceBuffer status_;                             // int32 by step
  PinnedBuffer staging_;                            // statuses, then what is staged
  std::vector<int64_t> staged_at_;                  // by transfer, inputs then outputs; -1: it is not staged
  std::vector<OwnEvent> events_;                    // for timing: before each step, and behind the last
  std::vector<std::unique_ptr<CudaGraph>> graphs_;  // the latest used first
};

}  // namespace qg::cuda

#endif  // QGRAPH_SRC_CUDA_EXECUTOR_H_
