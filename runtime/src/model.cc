#include "model.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "cpu_features.h"
#include "error.h"

namespace qg {
namespace {

const Device& choose_device(const Artifact& artifact, const char* name) {
  bool cpu = has_plan(artifact, Platform::kCpu), cuda = has_plan(artifact, Platform::kCuda);
  if (!name) return cpu || !cuda ? cpu_device() : find_device("cuda");
  std::string_view wanted(name);
  if (wanted == "cpu" && !cpu && cuda) {
    fail(QG_UNSUPPORTED, "the file has no code for the CPU, only for CUDA: load it on 'cuda'");
  }
  if (wanted != "cpu" && wanted.substr(0, 4) == "cuda" && cpu && !cuda) {
    fail(QG_UNSUPPORTED,
         "the file has no code for CUDA, only for the CPU: compile the model for the target cuda");
  }
  return find_device(wanted);
}

// "needs avx512f, avx512bw" or "is for aarch64".
std::string obstacle(const Device& device, const Variant& variant) {
  if (variant.arch != device.arch()) return cat("is for ", variant.arch);
  std::string missing;
  for (const std::string& feature : variant.features) {
    if (!device.has(feature)) missing += cat(missing.empty() ? "needs " : ", ", feature);
  }
  return missing;
}

// What to do about a file none of whose variants a device can run.
std::string advice(const Device& device, const std::vector<Variant>& variants) {
  const bool foreign = std::none_of(variants.begin(), variants.end(),
                                    [&](const Variant& v) { return v.arch == device.arch(); });
  if (device.platform() == Platform::kCuda)
    return "compile the model again, with a CUDA compiler that knows this GPU";
  return foreign ? cat("compile the model with --target ", machine_target())
                 : "run it on a CPU that has what it needs";
}

const Variant& choose_variant(const Device& device, const std::vector<Variant>& variants, const char* isa) {
  std::string seen;
  for (const Variant& variant : variants) {
    if (isa && variant.isa != isa) {
      seen += cat(seen.empty() ? "" : ", ", variant.isa);
      continue;
    }
    std::string problem = obstacle(device, variant);
    if (problem.empty()) return variant;
    if (isa) fail(QG_UNSUPPORTED, device.short_text(), " cannot run variant '", isa, "': it ", problem);
    seen += cat(seen.empty() ? "" : "; ", variant.isa, " ", problem);
  }
  if (isa) fail(QG_UNSUPPORTED, "the file has no variant '", isa, "', only ", seen);
  fail(QG_UNSUPPORTED, "no code in the file fits ", device.text(), ": ", seen, ": ",
       advice(device, variants));
}

// The code images that are part of the program, as tensors of the container.
std::vector<Segment> linked_code(const qg_static_model& artifact) {
  std::vector<Segment> segments;
  for (size_t i = 0; i < artifact.code_count; ++i) {
    const qg_static_code& code = artifact.code[i];
    segments.push_back(
        {cat("qgraph.code.", code.isa), static_cast<const uint8_t*>(code.data), code.size, true});
  }
  return segments;
}

}  // namespace

Model::Model(MappedFile file, const qg_static_model& artifact, const qg_load_options& options)
    : log_(options.log, options.log_context),
      file_(std::move(file)),
      artifact_(static_cast<const uint8_t*>(artifact.data), artifact.size, linked_code(artifact),
                options.threads, options.public_key),
      device_(choose_device(artifact_, options.device)),
      plan_(parse_plan(artifact_, device_.platform())),
      variant_(&choose_variant(device_, plan_.variants, options.isa)),
      program_(device_.program(plan_, *variant_)) {
  if (!log_) return;
  for (const Variant& better : plan_.variants) {
    if (&better == variant_) break;
    if (!supported(better)) {
      log_.write(QG_LOG_WARNING, "variant '", better.isa, "' ", obstacle(device_, better));
    }
  }
  log_.write(QG_LOG_INFO, "loaded ", artifact.size, " bytes, ", plan_.steps.size(), " steps, variant '",
             variant_->isa, "' on ", device_.name());
}

bool Model::supported(const Variant& variant) const { return obstacle(device_, variant).empty(); }

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
