#include "plan.h"

#include <algorithm>
#include <optional>
#include <string_view>

#include "checked.h"
#include "dtype.h"
#include "error.h"
#include "json.h"

namespace qg {
namespace {

constexpr int64_t kPlanVersion = 1;
constexpr std::string_view kPlanName = "qgraph.plan";
constexpr std::string_view kReserved = "qgraph.";

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
  PlanParser(const Artifact& artifact, const JsonCursor& root) : artifact_(artifact), root_(root) {}

  Plan parse() {
    // In the order of reference: each list only refers to the ones before it.
    for_each(few(root_.member("dims")), [this](const JsonCursor& c) { dim(c); });
    for_each(root_.member("checks"), [this](const JsonCursor& c) {
      plan_.checks.push_back(
          {expr(pair(c.member("ge"), 0)), expr(pair(c.member("ge"), 1)), c.member("message").string()});
    });
    plan_.slots = static_cast<size_t>(root_.member("slots").integer(0, INT32_MAX));
    for_each(root_.member("values"), [this](const JsonCursor& c) { plan_.values.push_back(value(c)); });
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
    Dim bounds{min.integer(0, INT64_MAX), max.integer(0, INT64_MAX)};
    if (bounds.min > bounds.max) json.invalid("has min above max");
    plan_.dim_names.push_back(name.string());
    plan_.dims.push_back(bounds);
  }

  static qg_dtype dtype(const JsonCursor& json) {
    for (int32_t i = 0; i < kDTypeCount; ++i) {
      if (json.string() == kDTypes[i].name) return static_cast<qg_dtype>(i);
    }
    json.invalid(cat("is the unknown dtype '", json.string(), "'"));
  }

  Value value(const JsonCursor& json) const {
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
    } else {
      kind.invalid(cat("is the unknown kind '", kind.string(), "'"));
    }
    value.dtype = dtype(json.member("dtype"));
    const JsonCursor shape = json.member("shape");
    if (shape.size() > QG_MAX_RANK) shape.invalid(cat("has a rank above ", QG_MAX_RANK));
    for_each(shape, [&](const JsonCursor& c) {
      Expr entry = expr(c);
      if (entry.constant().value_or(0) < 0) c.invalid("is negative");
      value.shape.push_back(std::move(entry));
    });
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
      if (!bound[i]) root_.member("dims").element(i).invalid("is not a dimension of any input");
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
    } else if (kind.string() == "i") {
      require_size(2, 2);
      arg.kind = Arg::Kind::kInteger;
      arg.expr = expr(json.element(1));
    } else if (kind.string() == "scratch") {
      require_size(2, 2);
      arg.kind = Arg::Kind::kScratch;
      arg.scratch = *scratch;
      int64_t bytes = json.element(1).integer(0, kMaxScratch);
      if (!checked_round_up_64(bytes, &bytes) || (*scratch += bytes) > kMaxScratch) {
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
    step.grain = json.member("grain").integer(1, INT64_MAX);
    const JsonCursor args = json.member("args");
    if (args.size() > kMaxPlanArgs) args.invalid(cat("has more than ", kMaxPlanArgs, " elements"));
    for_each(args, [&](const JsonCursor& c) { step.args.push_back(arg(c, &step.scratch_bytes)); });
    return step;
  }

  Variant variant(const JsonCursor& json) const {
    Variant variant;
    const JsonCursor isa = json.member("isa"), entries = json.member("entries");
    require_new(isa, plan_.variants, [](const Variant& other) { return other.isa; });
    variant.isa = isa.string();
    variant.arch = json.member("arch").string();
    for_each(json.member("features"), [&](const JsonCursor& c) { variant.features.push_back(c.string()); });
    const Segment& code = segment(json.member("code"));
    variant.code = code.data;
    variant.code_size = code.size;
    if (entries.size() != plan_.kernels.size()) entries.invalid("does not have one entry for each kernel");
    for_each(entries,
             [&](const JsonCursor& c) { variant.entries.push_back(c.index(code.size, "bytes of code")); });
    return variant;
  }

  const Artifact& artifact_;
  const JsonCursor& root_;
  Plan plan_;
};

}  // namespace

Plan parse_plan(const Artifact& artifact) {
  const Segment* segment = artifact.find(kPlanName);
  if (!segment) fail(QG_INVALID_FILE, "there is no tensor '", kPlanName, "'");
  const Json json = parse_json({reinterpret_cast<const char*>(segment->data), segment->size}, "plan");
  const JsonCursor root(json, "plan");
  int64_t version = root.member("version").integer();
  if (version != kPlanVersion) {
    fail(QG_UNSUPPORTED, "plan of version ", version, ", this runtime (", QG_VERSION, ") reads ",
         kPlanVersion);
  }
  return PlanParser(artifact, root).parse();
}

}  // namespace qg
