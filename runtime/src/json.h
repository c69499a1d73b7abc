// A strict, bounded JSON reader (RFC 8259) for the header and the plan of an artifact.
//
// Stricter than the RFC where leniency would be ambiguous: keys of an object are unique, text is valid UTF-8
// without U+0000, integers fit int64, nesting is at most kMaxJsonDepth. Numbers with a fraction or exponent
// are recognised but have no value: nothing in the format uses them.
#ifndef QGRAPH_SRC_JSON_H_
#define QGRAPH_SRC_JSON_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace qg {

constexpr int kMaxJsonDepth = 64;

struct Json;
struct JsonMember;

struct JsonNull {};
struct JsonReal {};
using JsonArray = std::vector<Json>;
using JsonObject = std::vector<JsonMember>;  // sorted by key

struct Json {
  std::variant<JsonNull, bool, int64_t, JsonReal, std::string, JsonArray, JsonObject> value;
};

struct JsonMember {
  std::string key;
  Json value;
};

// Throws Error(QG_INVALID_FILE) with `what` ("header", "plan") and the byte position.
Json parse_json(std::string_view text, std::string_view what);

// A place in a document that knows its path, so that errors can name it ("plan.steps[3].args[1]"). Every
// accessor throws Error(QG_INVALID_FILE) when the place is not what was asked for. A cursor refers to its
// parent: keep the parent alive.
class JsonCursor {
 public:
  JsonCursor(const Json& json, std::string_view root) : json_(&json), key_(root) {}

  JsonCursor member(std::string_view key) const;
  bool has(std::string_view key) const;
  JsonCursor element(size_t index) const;
  size_t size() const { return array().size(); }

  const JsonObject& object() const;
  const JsonArray& array() const;
  const std::string& string() const;
  int64_t integer() const;
  int64_t integer(int64_t min, int64_t max) const;
  // An integer in [0, count): `what` names what it is an index of.
  uint32_t index(size_t count, std::string_view what) const;
  bool is_array() const { return std::holds_alternative<JsonArray>(json_->value); }
  bool is_string() const { return std::holds_alternative<std::string>(json_->value); }

  std::string path() const;
  [[noreturn]] void invalid(std::string_view problem) const;

 private:
  JsonCursor(const Json& json, const JsonCursor* parent, std::string_view key, size_t index)
      : json_(&json), parent_(parent), key_(key), index_(index) {}

  const JsonMember* find(std::string_view key) const;

  const Json* json_;
  const JsonCursor* parent_ = nullptr;
  std::string_view key_;  // empty for an element of an array
  size_t index_ = 0;
};

}  // namespace qg

#endif  // QGRAPH_SRC_JSON_H_
