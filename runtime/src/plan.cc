#include "plan.h"

#include <algorithm>
#include <optional>
#include <string_view>

#include "checked.h"
#include "dtype.h"
#include "error.h"
#include "json.h"
#include "version.h"

namespace qg {
namespace {

constexpr std::string_view kReserved = "qgraph.";

std::string_view plan_name(Platform platform) {
  return platform == Platform::kCpu ? "qgraph.plan" : "qgraph.plan.cuda";
}

// Calls read(element) for each element of an array.
template <typename F>
void for_each(const JsonCursor& array, F read) {
  for (size_t i = 0; i < array.size(); ++i) read(array.element(i));
}

// Names of one kind must differ. Linear per name: there are few inputs, outputs, dims and variants.
template <typename Container, typename Name>
void require_new(const JsonCursor& name, const Container& others, Name name_of) {
  for (const auto& other : others) {
    if (name_of(other) == name.string()) name.invalid(cat("repeats '", name.string(), "'"));
  }
}

class PlanParser {
 public:
  PlanParser(const Artifact& artifact, Platform platform, const JsonCursor& root)
      : artifact_(artifact), platform_(platform), root_(root) {}

  Plan parse() {
    // In the order of reference: each list only refers to the ones before it.
    const JsonCursor dims = few(root_.member("dims"));
    for_each(dims, [this](const JsonCursor& c) { dim(c); });
    if (root_.has("state")) state(root_.member("state"));
    for (size_t i = 0; i < dims.size(); ++i) {
      if (dims.element(i).has("default")) option(dims.element(i), &plan_.dims[i]);
    }
    require_sources(dims);
    for_each(root_.member("checks"), [this](const JsonCursor& c) {
      plan_.checks.push_back(
          {expr(pair(c.member("ge"), 0)), expr(pair(c.member("ge"), 1)), c.member("message").string()});
    });
    plan_.slots = static_cast<size_t>(root_.member("slots").integer(0, INT32_MAX));
    for_each(root_.member("values"), [this](const JsonCursor& c) { plan_.values.push_back(value(c)); });
    require_state_values();
    // A slot costs memory even if nothing uses it: a plan must not be able to ask for many by a number alone.
    if (plan_.slots > plan_.values.size()) root_.member("slots").invalid("exceeds the number of values");
    ports(few(root_.member("inputs")), Value::Kind::kInput, &plan_.inputs);
    ports(few(root_.member("outputs")), Value::Kind::kOutput, &plan_.outputs);
    require_bound_dims();
    for_each(root_.member("kernels"), [this](const JsonCursor& c) { plan_.kernels.push_back(c.string()); });
    for_each(root_.member("steps"), [this](const JsonCursor& c) { plan_.steps.push_back(step(c)); });
    for_each(few(root_.member("variants")),
             [this](const JsonCursor& c) { plan_.variants.push_back(variant(c)); });
    if (plan_.variants.empty()) root_.member("variants").invalid("is empty");
    return std::move(plan_);
  }

 private:
  Expr expr(const JsonCursor& json) const { return Expr::parse(json, plan_.dim_names); }

  // Lists whose names are compared with each other.
  static JsonCursor few(const JsonCursor& list) {
    if (list.size() > kMaxNamed) list.invalid(cat("has more than ", kMaxNamed, " entries"));
    return list;
  }

  static JsonCursor pair(const JsonCursor& json, size_t index) {
    if (json.size() != 2) json.invalid("is not a pair");
    return json.element(index);
  }

  void dim(const JsonCursor& json) {
    const JsonCursor name = json.member("name"), min = json.member("min"), max = json.member("max");
    require_new(name, plan_.dim_names, [](const std::string& other) { return other; });
    Dim dim;
    dim.min = min.integer(0, INT64_MAX);
    dim.max = max.integer(0, INT64_MAX);
    if (dim.min > dim.max) json.invalid("has min above max");
    plan_.dim_names.push_back(name.string());
    plan_.dims.push_back(std::move(dim));
  }

  // Index of a dim that has no other source so far.
  uint32_t claim(const JsonCursor& name, Dim::Kind kind) {
    auto it = std::find(plan_.dim_names.begin(), plan_.dim_names.end(), name.string());
    if (it == plan_.dim_names.end()) name.invalid(cat("is the unknown dimension '", name.string(), "'"));
    uint32_t index = static_cast<uint32_t>(it - plan_.dim_names.begin());
    claim(name, &plan_.dims[index], kind);
    return index;
  }

  static void claim(const JsonCursor& json, Dim* dim, Dim::Kind kind) {
    if (dim->kind != Dim::Kind::kInput) json.invalid("gives a second source to a dimension");
    dim->kind = kind;
  }

  void state(const JsonCursor& json) {
    StatePlan state;
    state.total = claim(json.member("total"), Dim::Kind::kTotal);
    state.capacity = claim(json.member("capacity"), Dim::Kind::kCapacity);
    state.added = expr(json.member("new"));
    const Dim& bounds = plan_.dims[state.capacity];
    state.default_capacity = json.member("default").integer(std::max<int64_t>(bounds.min, 1), bounds.max);
    plan_.state = std::move(state);
  }

  void option(const JsonCursor& json, Dim* dim) const {
    claim(json, dim, Dim::Kind::kOption);
    if (dim->min < 1) json.invalid("has a default and a min below 1");
    dim->default_size = expr(json.member("default"));
  }

  // Refuses an expression with a dim of a kind that `known` does not allow.
  template <typename Known>
  void require_known(const JsonCursor& json, const Expr& expr, Known known) const {
    for (uint32_t dim : expr.dim_list()) {
      if (!known(plan_.dims[dim].kind)) {
        json.invalid(cat("uses '", plan_.dim_names[dim], "', a dimension that is not known before it"));
      }
    }
  }

  static bool of_input(Dim::Kind kind) { return kind == Dim::Kind::kInput; }

  void require_sources(const JsonCursor& dims) const {
    if (plan_.state) {
      const JsonCursor state = root_.member("state");
      require_known(state.member("new"), plan_.state->added, of_input);
    }
    for (size_t i = 0; i < plan_.dims.size(); ++i) {
      if (plan_.dims[i].kind != Dim::Kind::kOption) continue;
      const JsonCursor dim = dims.element(i);
      require_known(dim.member("default"), plan_.dims[i].default_size,
                    [](Dim::Kind kind) { return kind != Dim::Kind::kOption; });
    }
  }

  // Shape of a state value: [rows, n, capacity, m].
  void state_shape(const JsonCursor& json, const std::vector<Expr>& shape) {
    if (!plan_.state) json.invalid("is of a state, but the plan has no member 'state'");
    if (shape.size() != 4) json.invalid("is not of rank 4");
    for (size_t axis : {1, 3}) {
      if (!shape[axis].constant()) json.element(axis).invalid("is not a number");
    }
    if (shape[2].dim() != plan_.state->capacity) json.element(2).invalid("is not the state's capacity");
    require_known(json.element(0), shape[0], of_input);
    if (!has_rows_) plan_.state->rows = shape[0];
    has_rows_ = true;
    if (!(shape[0] == plan_.state->rows)) json.element(0).invalid("differs from that of another state value");
  }

  void require_state_values() const {
    if (plan_.state && !has_rows_) root_.member("state").invalid("is of no value");
  }

  static qg_dtype dtype(const JsonCursor& json) {
    for (int32_t i = 0; i < kDTypeCount; ++i) {
      if (json.string() == kDTypes[i].name) return static_cast<qg_dtype>(i);
    }
    json.invalid(cat("is the unknown dtype '", json.string(), "'"));
  }

  Value value(const JsonCursor& json) {
    Value value;
    const JsonCursor kind = json.member("kind");
    if (kind.string() == "weight") {
      value.kind = Value::Kind::kWeight;
      const Segment& segment = this->segment(json.member("tensor"));
      if (std::string_view(segment.name).substr(0, kReserved.size()) == kReserved) {
        json.member("tensor").invalid("is not a weight");
      }
      value.weight = segment.data;
      value.weight_bytes = static_cast<int64_t>(segment.size);
      return value;
    }
    if (kind.string() == "input") {
      value.kind = Value::Kind::kInput;
    } else if (kind.string() == "output") {
      value.kind = Value::Kind::kOutput;
    } else if (kind.string() == "temp") {
      value.kind = Value::Kind::kTemp;
      value.slot = json.member("slot").index(plan_.slots, "slots");
    } else if (kind.string() == "state") {
      value.kind = Value::Kind::kState;
    } else {
      kind.invalid(cat("is the unknown kind '", kind.string(), "'"));
    }
    value.dtype = dtype(json.member("dtype"));
    const JsonCursor shape = json.member("shape");
    if (shape.size() > QG_MAX_RANK) shape.invalid(cat("has a rank above ", QG_MAX_RANK));
    for_each(shape, [&](const JsonCursor& c) {
      Expr entry = expr(c);
      if (entry.constant().value_or(0) < 0) c.invalid("is negative");
      value.dims |= entry.dims();
      value.shape.push_back(std::move(entry));
    });
    if (value.kind == Value::Kind::kState) state_shape(shape, value.shape);
    return value;
  }

  const Segment& segment(const JsonCursor& name) const {
    const Segment* segment = artifact_.find(name.string());
    if (!segment) name.invalid(cat("is '", name.string(), "', a tensor that the file does not have"));
    return *segment;
  }

  // Names for each value of the kind, exactly once.
  void ports(const JsonCursor& json, Value::Kind kind, std::vector<Port>* ports) {
    std::vector<bool> named(plan_.values.size());
    for_each(json, [&](const JsonCursor& c) {
      const JsonCursor name = c.member("name"), index = c.member("value");
      require_new(name, *ports, [](const Port& other) { return other.name; });
      Port port{name.string(), index.index(plan_.values.size(), "values"), {}};
      const Value& value = plan_.values[port.value];
      if (value.kind != kind) index.invalid("is a value of another kind");
      if (named[port.value]) index.invalid("repeats a value");
      named[port.value] = true;
      for (const Expr& entry : value.shape) port.dims.push_back(entry.text(plan_.dim_names));
      ports->push_back(std::move(port));
    });
    for (size_t i = 0; i < plan_.values.size(); ++i) {
      if (plan_.values[i].kind == kind && !named[i]) json.invalid(cat("does not name value ", i));
    }
  }

  void require_bound_dims() const {
    std::vector<bool> bound(plan_.dims.size());
    for (const Port& input : plan_.inputs) {
      for (const Expr& entry : plan_.values[input.value].shape) {
        if (std::optional<uint32_t> dim = entry.dim()) bound[*dim] = true;
      }
    }
    for (size_t i = 0; i < bound.size(); ++i) {
      if (!bound[i] && plan_.dims[i].kind == Dim::Kind::kInput)
        root_.member("dims").element(i).invalid("is not a dimension of any input");
    }
  }

  Arg arg(const JsonCursor& json, int64_t* scratch) const {
    auto require_size = [&json](size_t min, size_t max) {
      if (json.size() < min || json.size() > max) json.invalid("has the wrong number of elements");
    };
    Arg arg;
    const JsonCursor kind = json.element(0);
    if (kind.string() == "v") {
      require_size(2, 3);
      arg.kind = Arg::Kind::kPointer;
      arg.value = json.element(1).index(plan_.values.size(), "values");
      arg.expr = json.size() == 3 ? expr(json.element(2)) : Expr::constant_of(0);
      arg.dims = arg.expr.dims() | plan_.values[arg.value].dims;
    } else if (kind.string() == "i") {
      require_size(2, 2);
      arg.kind = Arg::Kind::kInteger;
      arg.expr = expr(json.element(1));
      arg.dims = arg.expr.dims();
    } else if (kind.string() == "scratch") {
      require_size(2, 2);
      if (platform_ != Platform::kCpu) kind.invalid("is for the CPU alone");
      arg.kind = Arg::Kind::kScratch;
      arg.scratch = *scratch;
      int64_t bytes = json.element(1).integer(0, kMaxScratch);
      if (!checked_round_up(bytes, 64, &bytes) || (*scratch += bytes) > kMaxScratch) {
        json.invalid(cat("brings the step's scratch memory above ", kMaxScratch, " bytes"));
      }
    } else if (kind.string() == "status") {
      require_size(1, 1);
      arg.kind = Arg::Kind::kStatus;
    } else {
      kind.invalid(cat("is the unknown kind '", kind.string(), "'"));
    }
    return arg;
  }

  Step step(const JsonCursor& json) const {
    Step step;
    step.name = json.member("name").string();
    step.kernel = json.member("kernel").index(plan_.kernels.size(), "kernels");
    step.blocks = expr(json.member("blocks"));
    if (platform_ == Platform::kCpu) step.grain = json.member("grain").integer(1, INT64_MAX);
    const JsonCursor args = json.member("args");
    if (args.size() > kMaxPlanArgs) args.invalid(cat("has more than ", kMaxPlanArgs, " elements"));
    step.dims = step.blocks.dims();
    for_each(args, [&](const JsonCursor& c) {
      step.args.push_back(arg(c, &step.scratch_bytes));
      step.dims |= step.args.back().dims;
    });
    return step;
  }

  Variant variant(const JsonCursor& json) const {
    Variant variant;
    const JsonCursor isa = json.member("isa");
    require_new(isa, plan_.variants, [](const Variant& other) { return other.isa; });
    variant.isa = isa.string();
    variant.arch = json.member("arch").string();
    for_each(json.member("features"), [&](const JsonCursor& c) { variant.features.push_back(c.string()); });
    const Segment& code = segment(json.member("code"));
    variant.code = code.data;
    variant.code_size = code.size;
    variant.code_linked = code.linked;
    // In the order of `kernels`: where each begins, or how it is launched.
    const JsonCursor kernels = json.member(platform_ == Platform::kCpu ? "entries" : "functions");
    if (kernels.size() != plan_.kernels.size()) kernels.invalid("does not have one entry for each kernel");
    for_each(kernels, [&](const JsonCursor& c) {
      if (platform_ == Platform::kCpu) {
        variant.entries.push_back(c.index(code.size, "bytes of code"));
      } else {
        variant.functions.push_back({static_cast<int>(c.member("threads").integer(1, kMaxBlockThreads)),
                                     static_cast<int>(c.member("shared").integer(0, kMaxBlockShared))});
      }
    });
    return variant;
  }

  const Artifact& artifact_;
  const Platform platform_;
  const JsonCursor& root_;
  Plan plan_;
  bool has_rows_ = false;
};

}  // namespace

bool has_plan(const Artifact& artifact, Platform platform) {
  return artifact.find(plan_name(platform)) != nullptr;
}

Plan parse_plan(const Artifact& artifact, Platform platform) {
  const Segment* segment = artifact.find(plan_name(platform));
  if (!segment) fail(QG_INVALID_FILE, "there is no tensor '", plan_name(platform), "'");
  const Json json = parse_json({reinterpret_cast<const char*>(segment->data), segment->size}, "plan");
  const JsonCursor root(json, "plan");
  require_version("plan of version", root.member("version").integer(), kOldestPlan, kNewestPlan,
                  artifact.writer());
  try {
    return PlanParser(artifact, platform, root).parse();
  } catch (const Error& e) {
    throw explained(e, artifact.writer());
  }
}

}  // namespace qg
