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

// The code images that are part of the program, as tensors of the container.
std::vector<Segment> code_segments(const qg_static_model& artifact) {
  std::vector<Segment> segments;
  for (size_t i = 0; i < artifact.code_count; ++i) {
    const qg_static_code& code = artifact.code[i];
    segments.push_back({cat("qgraph.code.", code.isa), static_cast<const uint8_t*>(code.data), code.size});
  }
  return segments;
}

CodeImage make_executable(const Variant& variant, const qg_static_model& artifact) {
  for (size_t i = 0; i < artifact.code_count; ++i) {
    if (artifact.code[i].data == variant.code) return CodeImage(variant.code);
  }
  return CodeImage(variant.code, variant.code_size);
}

}  // namespace

bool supported(const Variant& variant) {
  return variant.arch == machine_arch() && std::all_of(variant.features.begin(), variant.features.end(),
                                                       [](const std::string& f) { return cpu_has(f); });
}

Model::Model(MappedFile file, const qg_static_model& artifact, const qg_load_options& options)
    : log_(options.log, options.log_context),
      file_(std::move(file)),
      artifact_(static_cast<const uint8_t*>(artifact.data), artifact.size, code_segments(artifact),
                options.threads),
      plan_(parse_plan(artifact_)),
      variant_(&choose(plan_.variants, options.isa)),
      code_(make_executable(*variant_, artifact)) {
  if (!log_) return;
  for (const Variant& better : plan_.variants) {
    if (&better == variant_) break;
    if (!supported(better)) log_.write(QG_LOG_WARNING, "variant '", better.isa, "' ", obstacle(better));
  }
  log_.write(QG_LOG_INFO, "loaded ", artifact.size, " bytes, ", plan_.steps.size(), " steps, variant '",
             variant_->isa, "'");
}

std::shared_ptr<const Model> Model::from_file(const char* path, const qg_load_options& options) {
  try {
    MappedFile file(path);
    const qg_static_model artifact{sizeof(artifact), file.data(), file.size(), nullptr, 0};
    return std::make_shared<const Model>(std::move(file), artifact, options);
  } catch (const Error& e) {
    throw Error(e.status(), cat(path, ": ", e.what()));
  }
}

std::shared_ptr<const Model> Model::from_memory(const qg_static_model& artifact,
                                                const qg_load_options& options) {
  if (reinterpret_cast<uintptr_t>(artifact.data) % 64 != 0) {
    fail(QG_INVALID_ARGUMENT, "an artifact in memory must be aligned to 64 bytes");
  }
  return std::make_shared<const Model>(MappedFile(), artifact, options);
}

}  // namespace qg
