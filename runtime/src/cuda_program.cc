#include "cuda_program.h"

#include <cstring>
#include <map>
#include <utility>

#include "checked.h"
#include "cuda_executor.h"

namespace qg::cuda {
namespace {

constexpr int64_t kAlignment = 256;  // of a weight

bool is_elf(const Variant& variant) {
  return variant.code_size >= 4 && std::memcmp(variant.code,
                                               "\x7f"
                                               "ELF",
                                               4) == 0;
}

}  // namespace

OwnModule::OwnModule(const PrimaryContext& context, const Variant& variant) : context_(context) {
  // The driver is given no size: text has to end where it ends.
  if (!is_elf(variant) && (variant.code_size == 0 || variant.code[variant.code_size - 1] != 0)) {
    fail(QG_INVALID_FILE, "the code of variant '", variant.isa,
         "' is neither a cubin nor PTX that ends in NUL");
  }
  PrimaryContext::Scope scope(context);
  char log[512] = "";
  int options[] = {kJitErrorLog, kJitErrorLogBytes};
  void* values[] = {log, reinterpret_cast<void*>(sizeof(log) - 1)};
  Result result = context.driver().module_load(&module_, variant.code, 2, options, values);
  log[std::strcspn(log, "\r\n")] = '\0';
  check(result, context.name(), " cannot load the code of variant '", variant.isa, "'", log[0] ? ": " : "",
        log);
}

OwnModule::~OwnModule() {
  context_.release([this](const Driver& driver) { driver.module_unload(module_); });
}

CudaProgram::CudaProgram(const Driver& driver, Ordinal ordinal, const Plan& plan, const Variant& variant)
    : plan_(plan),
      variant_(variant),
      context_(driver, ordinal),
      module_(context_, variant),
      weights_(context_) {
  find_functions();
  upload_weights();
}

void CudaProgram::find_functions() {
  PrimaryContext::Scope scope(context_);
  for (size_t i = 0; i < plan_.kernels.size(); ++i) {
    const std::string& name = plan_.kernels[i];
    Function function = nullptr;
    check(context_.driver().module_function(&function, module_.get(), name.c_str()), "variant '",
          variant_.isa, "' has no kernel '", name, "'");
    int shared = variant_.functions[i].shared;
    // What is free without asking is 48 KiB less the kernel's static shared memory, which only the driver
    // knows.
    if (shared > 0) {
      check(context_.driver().function_set(function, kMaxDynamicSharedBytes, shared), context_.name(),
            " does not give kernel '", name, "' ", shared, " bytes of shared memory");
    }
    functions_.push_back(function);
  }
}

void CudaProgram::upload_weights() {
  // Values may share a tensor; one without bytes shares its address with the next.
  auto tensor = [](const Value& value) { return std::make_pair(value.weight, value.weight_bytes); };
  std::map<std::pair<const uint8_t*, int64_t>, int64_t> offsets;
  int64_t total = 0;
  for (const Value& value : plan_.values) {
    if (value.kind != Value::Kind::kWeight || !offsets.emplace(tensor(value), total).second) continue;
    if (!checked_add(total, value.weight_bytes, &total) || !checked_round_up(total, kAlignment, &total)) {
      fail(QG_OUT_OF_MEMORY, "weights of more than 2^63 bytes");
    }
  }
  weights_.reserve(static_cast<size_t>(total));
  weights_at_.resize(plan_.values.size());
  for (size_t i = 0; i < plan_.values.size(); ++i) {
    if (plan_.values[i].kind != Value::Kind::kWeight) continue;
    weights_at_[i] = static_cast<int64_t>(weights_.address()) + offsets.at(tensor(plan_.values[i]));
  }
  OwnStream stream(context_);
  PrimaryContext::Scope scope(context_);
  for (const auto& [weight, offset] : offsets) {
    if (weight.second == 0) continue;
    check(context_.driver().copy_to_device(weights_.address() + static_cast<Address>(offset), weight.first,
                                           static_cast<size_t>(weight.second), stream.get()),
          "cannot copy weights to ", context_.name());
  }
  check(context_.driver().stream_synchronize(stream.get()), "cannot copy weights to ", context_.name());
}

KernelParams CudaProgram::launch(size_t kernel) const {
  const Variant::Function& function = variant_.functions[kernel];
  KernelParams params{};
  params.function = functions_[kernel];
  params.grid_y = params.grid_z = params.block_y = params.block_z = 1;
  params.block_x = static_cast<unsigned>(function.threads);
  params.shared_bytes = static_cast<unsigned>(function.shared);
  return params;
}

std::unique_ptr<Executor> CudaProgram::executor(const Host&) const {
  return std::make_unique<CudaExecutor>(*this);
}

}  // namespace qg::cuda
