// The plan of an artifact (FORMAT.md), parsed and validated: every index in it is in range.
#ifndef QGRAPH_SRC_PLAN_H_
#define QGRAPH_SRC_PLAN_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "artifact.h"
#include "expr.h"
#include "qgraph/qgraph.h"

namespace qg {

constexpr size_t kMaxPlanArgs = 30;  // `begin` and `end` make 32
constexpr size_t kMaxNamed = 4096;   // dims, inputs, outputs, variants
constexpr int64_t kMaxScratch = int64_t{64} << 20;
constexpr int kMaxBlockThreads = 1024;
constexpr int kMaxBlockShared = 232448;  // that a block can have on any GPU so far

// What a plan is for.
enum class Platform { kCpu, kCuda };

struct Dim {
  // What gives it its size: inputs, the state's length, the session's capacity, or the caller's choice.
  enum class Kind { kInput, kTotal, kCapacity, kOption };
  Kind kind = Kind::kInput;
  int64_t min = 0, max = 0;
  Expr default_size;  // of an option
};

// Demands a >= b.
struct Check {
  Expr a, b;
  std::string message;
};

struct Value {
  enum class Kind { kInput, kOutput, kWeight, kTemp, kState };
  Kind kind = Kind::kTemp;
  qg_dtype dtype = QG_F32;          // not of a weight
  std::vector<Expr> shape;          // not of a weight
  DimSet dims = 0;                  // that its shape depends on
  uint32_t slot = 0;                // of a temporary
  const uint8_t* weight = nullptr;  // of a weight
  int64_t weight_bytes = 0;         // of a weight
};

// What the values of kind kState have in common: [rows, n, capacity, m], n and m numbers.
struct StatePlan {
  uint32_t total = 0, capacity = 0;  // dims
  Expr added;                        // tokens that a run adds
  Expr rows;
  int64_t default_capacity = 0;
};

// An input or output of the model.
struct Port {
  std::string name;
  uint32_t value;
  std::vector<std::string> dims;  // its shape as text
};

struct Arg {
  enum class Kind { kPointer, kInteger, kScratch, kStatus };
  Kind kind = Kind::kStatus;
  uint32_t value = 0;   // of a pointer
  Expr expr;            // byte offset of a pointer, or the integer
  DimSet dims = 0;      // that `expr`, or the size of the value pointed into, depends on
  int64_t scratch = 0;  // byte offset into the step's scratch memory
};

struct Step {
  std::string name;
  uint32_t kernel = 0;
  std::vector<Arg> args;
  Expr blocks;
  DimSet dims = 0;  // that `blocks` or an argument depends on
  int64_t grain = 1;
  int64_t scratch_bytes = 0;  // of all its scratch arguments, a multiple of 64
};

struct Variant {
  std::string isa, arch;
  std::vector<std::string> features;
  const uint8_t* code = nullptr;
  size_t code_size = 0;
  bool code_linked = false;     // part of the program, and executable where it is
  std::vector<size_t> entries;  // of each kernel, offsets into the code; for the CPU

  struct Function {
    int threads, shared;  // of a block: threads, bytes of dynamic shared memory
  };
  std::vector<Function> functions;  // of each kernel; for CUDA
};

struct Plan {
  std::vector<std::string> dim_names;
  std::vector<Dim> dims;
  std::vector<Check> checks;
  std::vector<Port> inputs, outputs;
  std::vector<Value> values;
  std::optional<StatePlan> state;
  size_t slots = 0;
  std::vector<std::string> kernels;
  std::vector<Step> steps;
  std::vector<Variant> variants;
};

// Whether the artifact has a plan for the platform.
bool has_plan(const Artifact& artifact, Platform platform);

// Throws Error: QG_INVALID_FILE naming the place, or QG_UNSUPPORTED for another version of the plan.
Plan parse_plan(const Artifact& artifact, Platform platform);

}  // namespace qg

#endif  // QGRAPH_SRC_PLAN_H_
