#include "model.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "cpu_features.h"
#include "error.h"

namespace qg {
namespace {

// "needs avx512f, avx512bw" or "is for aarch64".
std::string obstacle(const Variant& variant) {
  if (variant.arch != machine_arch()) return cat("is for ", variant.arch);
  std::string missing;
  for (const std::string& feature : variant.features) {
    if (!cpu_has(feature)) missing += cat(missing.empty() ? "needs " : ", ", feature);
  }
  return missing;
}

const Variant& choose(const std::vector<Variant>& variants, const char* isa) {
  std::string seen;
  for (const Variant& variant : variants) {
    if (isa && variant.isa != isa) {
      seen += cat(seen.empty() ? "" : ", ", variant.isa);
      continue;
    }
    if (supported(variant)) return variant;
    if (isa) fail(QG_UNSUPPORTED, "this machine cannot run variant '", isa, "': it ", obstacle(variant));
    seen += cat(seen.empty() ? "" : "; ", variant.isa, " ", obstacle(variant));
  }
  if (isa) fail(QG_UNSUPPORTED, "the file has no variant '", isa, "', only ", seen);
  fail(QG_UNSUPPORTED, "no code in the file fits this machine (", machine_arch(), "): ", seen);
}

}  // namespace

bool supported(const Variant& variant) {
  return variant.arch == machine_arch() && std::all_of(variant.features.begin(), variant.features.end(),
                                                       [](const std::string& f) { return cpu_has(f); });
}

Model::Model(MappedFile file, const uint8_t* data, size_t size, const char* isa)
    : file_(std::move(file)),
      artifact_(data, size),
      plan_(parse_plan(artifact_)),
      variant_(&choose(plan_.variants, isa)),
      code_(variant_->code, variant_->code_size) {}

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
