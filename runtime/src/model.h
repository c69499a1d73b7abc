// A loaded artifact, immutable: what sessions share.
#ifndef QGRAPH_SRC_MODEL_H_
#define QGRAPH_SRC_MODEL_H_

#include <memory>
#include <string>
#include <vector>

#include "artifact.h"
#include "device.h"
#include "mapped_file.h"
#include "plan.h"

namespace qg {

class Model {
 public:
  // What to load of an artifact, each nullptr for its default.
  struct Choice {
    const char* isa;     // the variant; the first that the device supports
    const char* device;  // the CPU if there is code for it, else the first GPU
  };

  static std::shared_ptr<const Model> from_file(const char* path, const Choice& choice);
  // Keeps pointing into data[0, size).
  static std::shared_ptr<const Model> from_memory(const uint8_t* data, size_t size, const Choice& choice);

  const Artifact& artifact() const { return artifact_; }
  const Plan& plan() const { return plan_; }
  const Variant& variant() const { return *variant_; }
  const Device& device() const { return device_; }
  const Program& program() const { return *program_; }
  // Whether the device can run a variant.
  bool supported(const Variant& variant) const;

  Model(MappedFile file, const uint8_t* data, size_t size, const Choice& choice);

 private:
  MappedFile file_;  // empty for a model from memory
  Artifact artifact_;
  const Device& device_;
  Plan plan_;
  const Variant* variant_;  // into plan_
  std::unique_ptr<const Program> program_;
};

}  // namespace qg

#endif  // QGRAPH_SRC_MODEL_H_
