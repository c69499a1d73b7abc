#include "model.h"

#include <string_view>
#include <utility>

#include "error.h"

namespace qg {
namespace {

// "needs avx512f, avx512bw" or "is for aarch64".
std::string obstacle(const Device& device, const Variant& variant) {
  if (variant.arch != device.arch()) return cat("is for ", variant.arch);
  std::string missing;
  for (const std::string& feature : variant.features) {
    if (!device.has(feature)) missing += cat(missing.empty() ? "needs " : ", ", feature);
  }
  return missing;
}

const Variant& choose(const Device& device, const std::vector<Variant>& variants, const char* isa) {
  std::string seen;
  for (const Variant& variant : variants) {
    if (isa && variant.isa != isa) {
      seen += cat(seen.empty() ? "" : ", ", variant.isa);
      continue;
    }
    std::string problem = obstacle(device, variant);
    if (problem.empty()) return variant;
    if (isa) fail(QG_UNSUPPORTED, "this machine cannot run variant '", isa, "': it ", problem);
    seen += cat(seen.empty() ? "" : "; ", variant.isa, " ", problem);
  }
  if (isa) fail(QG_UNSUPPORTED, "the file has no variant '", isa, "', only ", seen);
  fail(QG_UNSUPPORTED, "no code in the file fits this machine (", device.text(), "): ", seen);
}

}  // namespace

Model::Model(MappedFile file, const uint8_t* data, size_t size, const char* isa)
    : file_(std::move(file)),
      artifact_(data, size),
      device_(cpu_device()),
      plan_(parse_plan(artifact_)),
      variant_(&choose(device_, plan_.variants, isa)),
      program_(device_.program(plan_, *variant_)) {}

bool Model::supported(const Variant& variant) const { return obstacle(device_, variant).empty(); }

std::shared_ptr<const Model> Model::from_file(const char* path, const char* isa) {
  try {
    MappedFile file(path);
    const uint8_t* data = file.data();
    size_t size = file.size();
    return std::make_shared<const Model>(std::move(file), data, size, isa);
  } catch (const Error& e) {
    throw Error(e.status(), cat(path, ": ", e.what()));
  }
}

std::shared_ptr<const Model> Model::from_memory(const uint8_t* data, size_t size, const char* isa) {
  if (reinterpret_cast<uintptr_t>(data) % 64 != 0) {
    fail(QG_INVALID_ARGUMENT, "an artifact in memory must be aligned to 64 bytes");
  }
  return std::make_shared<const Model>(MappedFile(), data, size, isa);
}

}  // namespace qg
