// A model's kernels and weights on a GPU.
#ifndef QGRAPH_SRC_CUDA_PROGRAM_H_
#define QGRAPH_SRC_CUDA_PROGRAM_H_

#include <memory>
#include <vector>

#include "cuda_context.h"
#include "device.h"

namespace qg::cuda {

// An image in a context, cubin or PTX.
class OwnModule {
 public:
  // Throws Error: QG_INVALID_FILE, QG_UNSUPPORTED with what the driver's compiler says.
  OwnModule(const PrimaryContext& context, const Variant& variant);
  ~OwnModule();
  OwnModule(const OwnModule&) = delete;
  OwnModule& operator=(const OwnModule&) = delete;

  Module get() const { return module_; }

 private:
  const PrimaryContext& context_;
  Module module_ = nullptr;
};

class CudaProgram final : public Program {
 public:
  // Uploads the weights. Throws OutOfMemory, Error.
  CudaProgram(const Driver& driver, Ordinal ordinal, const Plan& plan, const Variant& variant);

  int64_t weight(size_t value) const override { return weights_at_[value]; }
  std::unique_ptr<Executor> executor(const Host& host) const override;

  const PrimaryContext& context() const { return context_; }
  const Plan& plan() const { return plan_; }
  // How a kernel is launched, but for its grid and arguments.
  KernelParams launch(size_t kernel) const;

 private:
  void find_functions();
  void upload_weights();

  const Plan& plan_;
  const Variant& variant_;
  PrimaryContext context_;
  OwnModule module_;
  std::vector<Function> functions_;  // by kernel
  DeviceBuffer weights_;
  std::vector<int64_t> weights_at_;  // by value
};

}  // namespace qg::cuda

#endif  // QGRAPH_SRC_CUDA_PROGRAM_H_
