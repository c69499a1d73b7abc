#include "cuda_driver.h"

#include <dlfcn.h>

#include <string>

#include "fork.h"

namespace qg::cuda {
namespace {

// CUDA 11.4: the first with cuGraphInstantiateWithFlags.
constexpr int kOldestVersion = 11040;

std::string version_text(int version) { return cat(version / 1000, ".", version % 1000 / 10); }

struct Loaded {
  Driver table;
  std::string problem;  // empty if the driver can be used
  int generation = count_forks();
};

std::string name_of(const Driver& table, Result result) {
  const char* name = nullptr;
  if (table.error_name && table.error_name(result, &name) == 0 && name) return name;
  return cat("CUDA error ", result);
}

// Opens the driver; returns what is in the way.
std::string open(Driver* table) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // never closed
  if (!library) {
    const char* reason = dlerror();
    return cat("no NVIDIA driver: ", reason ? reason : "libcuda.so.1 does not load");
  }
  auto version = reinterpret_cast<Result (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
  if (!version || version(&table->version) != 0) return "the NVIDIA driver does not tell its version";
  std::string found = cat("the NVIDIA driver is for CUDA ", version_text(table->version));
  if (table->version < kOldestVersion) {
    return cat(found, ", too old: install one for ", version_text(kOldestVersion), " or later");
  }
#define QG_CUDA_FIND(member, symbol, parameters)                                     \
  table->member = reinterpret_cast<decltype(table->member)>(dlsym(library, symbol)); \
  if (!table->member) return cat(found, ", but has no ", symbol);
  QG_CUDA_FUNCTIONS(QG_CUDA_FIND)
#undef QG_CUDA_FIND
  Result result = table->init(0);
  int count = 0;
  if (result == 0) result = table->device_count(&count);
  if (result == kNoDevice || (result == 0 && count == 0)) return cat(found, ", but sees no GPU");
  if (result != 0) return cat(found, ", but does not start: ", name_of(*table, result));
  return "";
}

const Loaded& loaded() {
  static const Loaded& result = *[] {
    auto* fresh = new Loaded;  // never destroyed: models may outlive main()
    fresh->problem = open(&fresh->table);
    return fresh;
  }();
  return result;
}

// After these, by the documentation of each, nothing in the process can use the device any more.
bool context_lost(Result result) {
  switch (result) {
    case 214:  // CUDA_ERROR_ECC_UNCORRECTABLE
    case 220:  // CUDA_ERROR_NVLINK_UNCORRECTABLE
    case 700:  // CUDA_ERROR_ILLEGAL_ADDRESS
    case 702:  // CUDA_ERROR_LAUNCH_TIMEOUT
    case 709:  // CUDA_ERROR_CONTEXT_IS_DESTROYED
    case 710:  // CUDA_ERROR_ASSERT
    case 714:  // CUDA_ERROR_HARDWARE_STACK_ERROR
    case 715:  // CUDA_ERROR_ILLEGAL_INSTRUCTION
    case 716:  // CUDA_ERROR_MISALIGNED_ADDRESS
    case 717:  // CUDA_ERROR_INVALID_ADDRESS_SPACE
    case 718:  // CUDA_ERROR_INVALID_PC
    case 719:  // CUDA_ERROR_LAUNCH_FAILED
      return true;
    default:
      return false;
  }
}

qg_status status_of(Result result) {
  switch (result) {
    case kOutOfMemory:
      return QG_OUT_OF_MEMORY;
    case kInvalidImage:
    case 500:  // CUDA_ERROR_NOT_FOUND
      return QG_INVALID_FILE;
    case 209:  // CUDA_ERROR_NO_BINARY_FOR_GPU
    case 218:  // CUDA_ERROR_INVALID_PTX
    case 221:  // CUDA_ERROR_JIT_COMPILER_NOT_FOUND
    case 222:  // CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    case 223:  // CUDA_ERROR_JIT_COMPILATION_DISABLED
      return QG_UNSUPPORTED;
    default:
      return QG_DEVICE_ERROR;
  }
}

}  // namespace

bool lost_by_fork() { return fork_generation != loaded().generation; }

const Driver& driver() {
  const Loaded& found = loaded();
  if (!found.problem.empty()) fail(QG_UNSUPPORTED, "CUDA is not available: ", found.problem);
  if (lost_by_fork()) {
    fail(QG_UNSUPPORTED,
         "CUDA is not available: this process is a fork() of one that used it: start a new process instead");
  }
  return found.table;
}

void fail_with(Result result, const std::string& what) {
  const Driver& table = loaded().table;
  const char* text = nullptr;
  std::string said = table.error_text(result, &text) == 0 && text ? cat(" (", text, ")") : "";
  fail(status_of(result), what, ": ", name_of(table, result), said,
       context_lost(result) ? ": this process cannot use the GPU any more, start it anew" : "");
}

}  // namespace qg::cuda
