// A loaded artifact, immutable: what sessions share.
#ifndef QGRAPH_SRC_MODEL_H_
#define QGRAPH_SRC_MODEL_H_

#include <memory>
#include <string>
#include <vector>

#include "artifact.h"
#include "device.h"
#include "log.h"
#include "mapped_file.h"
#include "plan.h"

namespace qg {

class Model {
 public:
  static std::shared_ptr<const Model> from_file(const char* path, const qg_load_options& options);
  // Keeps pointing into `artifact`, whose code, if it has any apart, is run where it is.
  static std::shared_ptr<const Model> from_memory(const qg_static_model& artifact,
                                                  const qg_load_options& options);

  const Artifact& artifact() const { return artifact_; }
  const Plan& plan() const { return plan_; }
  const Variant& variant() const { return *variant_; }
  const Device& device() const { return device_; }
  const Program& program() const { return *program_; }
  const Log& log() const { return log_; }
  // Whether the device can run a variant.
  bool supported(const Variant& variant) const;

  Model(MappedFile file, const qg_static_model& artifact, const qg_load_options& options);

 private:
  Log log_;
  MappedFile file_;  // empty for a model from memory
  Artifact artifact_;
  const Device& device_;
  Plan plan_;
  const Variant* variant_;  // into plan_
  std::unique_ptr<const Program> program_;
};

}  // namespace qg

#endif  // QGRAPH_SRC_MODEL_H_
