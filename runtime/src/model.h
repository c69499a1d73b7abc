// A loaded artifact, immutable: what sessions share.
#ifndef QGRAPH_SRC_MODEL_H_
#define QGRAPH_SRC_MODEL_H_

#include <memory>
#include <string>
#include <vector>

#include "artifact.h"
#include "code_image.h"
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
  const Log& log() const { return log_; }
  const void* kernel(size_t index) const { return code_.at(variant_->entries[index]); }

  Model(MappedFile file, const qg_static_model& artifact, const qg_load_options& options);

 private:
  Log log_;
  MappedFile file_;  // empty for a model from memory
  Artifact artifact_;
  Plan plan_;
  const Variant* variant_;  // into plan_
  CodeImage code_;
};

// Whether this machine can run the variant.
bool supported(const Variant& variant);

}  // namespace qg

#endif  // QGRAPH_SRC_MODEL_H_
