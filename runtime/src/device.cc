#include "device.h"

#include <algorithm>
#include <cstdio>

#include "cuda_device.h"
#include "error.h"

namespace qg {

OutOfMemory::OutOfMemory(const std::string& where, size_t size, const char* reason) noexcept {
  std::snprintf(text_, sizeof(text_), "out of memory on %s: no %zu bytes left (%s)", where.c_str(), size,
                reason);
}

const char* out_of_memory_text(const std::bad_alloc& error) noexcept {
  auto* known = dynamic_cast<const OutOfMemory*>(&error);
  return known ? known->what() : "out of memory";
}

void check_status(const Step& step, int32_t status) {
  constexpr int32_t kIndexOutOfRange = 1;
  if (status == kIndexOutOfRange) fail(QG_BAD_DATA, "step '", step.name, "': an index is out of range");
  if (status != 0) fail(QG_BAD_DATA, "step '", step.name, "': the kernel reports status ", status);
}

const Devices& devices() {
  static const Devices& found = *[] {
    auto* fresh = new Devices;  // never destroyed: models may outlive main()
    fresh->list.push_back(&cpu_device());
    try {
      for (const Device* gpu : cuda::gpus()) fresh->list.push_back(gpu);
    } catch (const Error& e) {
      fresh->problem = e.what();
    }
    if (fresh->list.size() == 1 && fresh->problem.empty()) fresh->problem = "this platform has no GPUs";
    return fresh;
  }();
  return found;
}

const Device& find_device(std::string_view name) {
  if (name == "cpu") return cpu_device();
  std::string_view prefix = "cuda:";
  std::string full(name == "cuda" ? "cuda:0" : name);
  std::string_view ordinal = std::string_view(full).substr(std::min(prefix.size(), full.size()));
  if (full.compare(0, prefix.size(), prefix) != 0 || ordinal.empty() ||
      ordinal.find_first_not_of("0123456789") != std::string_view::npos) {
    fail(QG_INVALID_ARGUMENT, "unknown device '", name, "': give cpu, cuda, or cuda:1 and so on");
  }
  const Devices& all = devices();
  if (!all.problem.empty()) fail(QG_UNSUPPORTED, all.problem);
  for (const Device* device : all.list) {
    if (device->name() == full) return *device;
  }
  fail(QG_UNSUPPORTED, "there is no device '", name, "': the last one is ", all.list.back()->name());
}

}  // namespace qg
