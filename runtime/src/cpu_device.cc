// The CPU: kernels in executable memory, their blocks shared by threads, weights where the file is mapped.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "address.h"
#include "aligned_buffer.h"
#include "code_image.h"
#include "cpu_features.h"
#include "device.h"
#include "error.h"
#include "float_environment.h"
#include "kernel_call.h"
#include "thread_pool.h"

namespace qg {
namespace {

static_assert(kMaxPlanArgs + 2 == kMaxKernelArgs, "the plan's arguments, begin and end");

class CpuProgram final : public Program {
 public:
  CpuProgram(const Plan& plan, const Variant& variant)
      : plan_(plan),
        variant_(variant),
        code_(variant.code_linked ? CodeImage(variant.code) : CodeImage(variant.code, variant.code_size)) {}

  int64_t weight(size_t value) const override { return address_of(plan_.values[value].weight); }
  std::unique_ptr<Executor> executor(const Host& host) const override;

  const Plan& plan() const { return plan_; }
  const void* kernel(size_t index) const { return code_.at(variant_.entries[index]); }

 private:
  const Plan& plan_;
  const Variant& variant_;
  CodeImage code_;
};

class CpuExecutor final : public Executor {
 public:
  CpuExecutor(const CpuProgram& program, const Host& host)
      : program_(program),
        allocator_(host.allocator),
        scratch_(allocator_),
        pool_(new ThreadPool(host.threads, host.pool)) {
    for (const Step& step : program.plan().steps) {
      scratch_stride_ = std::max(scratch_stride_, step.scratch_bytes);
    }
  }

  int threads() const override { return pool_->threads(); }
  bool orphaned() const override { return pool_->orphaned(); }
  int64_t alignment() const override { return AlignedBuffer::kAlign; }
  std::unique_ptr<Buffer> buffer() const override { return std::make_unique<AlignedBuffer>(allocator_); }

  void copy(const std::vector<RowCopy>& copies) override {
    for (const RowCopy& rows : copies) {
      for (int64_t i = 0; i < rows.count; ++i) {
        std::memcpy(rows.to + i * rows.to_pitch, rows.from + i * rows.from_pitch,
                    static_cast<size_t>(rows.width));
      }
    }
  }

  // At most 64 MiB for each of at most 4096 threads.
  int64_t needed() const override { return scratch_stride_ * pool_->threads(); }
  int64_t held() const override { return static_cast<int64_t>(scratch_.size()); }
  void reserve() override { scratch_.reserve(static_cast<size_t>(needed())); }

  int64_t status(size_t) override { return address_of(&status_); }

  Reach reach(const char*, const Port&, const Binding&) override { return Reach::kDirect; }
  void run(const StepTable& table, const std::vector<Transfer>& inputs, const std::vector<Transfer>& outputs,
           std::vector<int64_t>* times) override;
  void* stream() const override { return nullptr; }
  void wait(void*) override { fail(QG_INVALID_ARGUMENT, "a session on the CPU has no stream"); }

 private:
  struct StepCall {
    const Step* step;
    const void* kernel;
    uint8_t* scratch;
    int64_t scratch_stride;
    int64_t args[kMaxKernelArgs];
  };

  void run_step(const StepTable& table, size_t index);
  static void run_blocks(const void* call, int worker, int64_t begin, int64_t end);

  const CpuProgram& program_;
  Allocator allocator_;
  AlignedBuffer scratch_;  // scratch_stride_ bytes for each thread
  int64_t scratch_stride_ = 0;
  int32_t status_ = 0;  // kernels write to it

  // Last: its threads end before what they use goes away.
  std::unique_ptr<ThreadPool, ThreadPoolDeleter> pool_;
};

std::unique_ptr<Executor> CpuProgram::executor(const Host& host) const {
  return std::make_unique<CpuExecutor>(*this, host);
}

void CpuExecutor::run(const StepTable& table, const std::vector<Transfer>&, const std::vector<Transfer>&,
                      std::vector<int64_t>* times) {
  DefaultFloatEnvironment environment;
  __atomic_store_n(&status_, 0, __ATOMIC_RELAXED);
  for (size_t i = 0; i < table.blocks.size(); ++i) {
    if (!times) {
      run_step(table, i);
      continue;
    }
    auto begin = std::chrono::steady_clock::now();
    run_step(table, i);
    (*times)[i] =
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin)
            .count();
  }
}

void CpuExecutor::run_blocks(const void* context, int worker, int64_t begin, int64_t end) {
  const StepCall& call = *static_cast<const StepCall*>(context);
  const std::vector<Arg>& plan_args = call.step->args;
  const int64_t scratch = address_of(call.scratch) + worker * call.scratch_stride;
  KernelArgs args;
  for (size_t i = 0; i < plan_args.size(); ++i) {
    switch (plan_args[i].kind) {
      case Arg::Kind::kInteger:
        args.integer(call.args[i]);
        break;
      case Arg::Kind::kScratch:
        args.pointer(scratch + plan_args[i].scratch);
        break;
      default:
        args.pointer(call.args[i]);
        break;
    }
  }
  args.integer(begin);
  args.integer(end);
  args.call(call.kernel);
}

void CpuExecutor::run_step(const StepTable& table, size_t index) {
  const Step& step = program_.plan().steps[index];
  if (table.blocks[index] == 0) return;
  StepCall call{&step, program_.kernel(step.kernel), scratch_.data(), scratch_stride_, {}};
  for (size_t i = 0; i < step.args.size(); ++i) call.args[i] = table.argument(index, i);
  pool_->run(table.blocks[index], step.grain, run_blocks, &call);
  // Several threads may have written it; the end of run() orders their writes before this.
  check_status(step, __atomic_load_n(&status_, __ATOMIC_RELAXED));
}

class CpuDevice final : public Device {
 public:
  const std::string& name() const override { return name_; }
  const std::string& description() const override { return description_; }
  Platform platform() const override { return Platform::kCpu; }
  std::string short_text() const override { return "this machine"; }
  std::string text() const override { return cat("this machine (", machine_arch(), ")"); }
  std::string_view arch() const override { return machine_arch(); }
  bool has(std::string_view feature) const override { return cpu_has(feature); }
  std::unique_ptr<Program> program(const Plan& plan, const Variant& variant) const override {
    return std::make_unique<CpuProgram>(plan, variant);
  }

 private:
  std::string name_ = "cpu", description_ = cat(machine_arch(), ", ", cpu_features());
};

}  // namespace

const Device& cpu_device() {
  static const CpuDevice& device = *new CpuDevice;  // never destroyed: models may outlive main()
  return device;
}

}  // namespace qg
