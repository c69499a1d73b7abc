#include "json.h"

#include <algorithm>
#include <utility>

#include "checked.h"
#include "error.h"

namespace qg {
namespace {

class Parser {
 public:
  Parser(std::string_view text, std::string_view what) : text_(text), what_(what) {}

  Json document() {
    Json json = value(0);
    skip_space();
    if (pos_ != text_.size()) error("text after the end");
    return json;
  }

 private:
  [[noreturn]] void error(std::string_view problem) const {
    fail(QG_INVALID_FILE, what_, ": invalid JSON at byte ", pos_, ": ", problem);
  }

  bool at_end() const { return pos_ == text_.size(); }
  // The next byte; 0, which is no token of JSON, at the end.
  char peek() const { return at_end() ? '\0' : text_[pos_]; }
  bool accept(char c) {
    if (at_end() || text_[pos_] != c) return false;
    ++pos_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) error(cat("expected '", std::string_view(&c, 1), "'"));
  }
  void skip_space() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t') ++pos_;
  }

  Json value(int depth) {
    if (depth > kMaxJsonDepth) error("nested too deeply");
    skip_space();
    switch (peek()) {
      case '{':
        return Json{object(depth)};
      case '[':
        return Json{array(depth)};
      case '"':
        return Json{string()};
      case 't':
        return literal("true", Json{true});
      case 'f':
        return literal("false", Json{false});
      case 'n':
        return literal("null", Json{JsonNull{}});
      default:
        return number();
    }
  }

  Json literal(std::string_view word, Json json) {
    if (text_.substr(pos_, word.size()) != word) error("unknown word");
    pos_ += word.size();
    return json;
  }

  JsonArray array(int depth) {
    JsonArray items;
    expect('[');
    skip_space();
    if (accept(']')) return items;
    do {
      items.push_back(value(depth + 1));
      skip_space();
    } while (accept(','));
    expect(']');
    return items;
  }

  JsonObject object(int depth) {
    JsonObject members;
    expect('{');
    skip_space();
    if (accept('}')) return members;
    do {
      skip_space();
      std::string key = string();
      skip_space();
      expect(':');
      members.push_back({std::move(key), value(depth + 1)});
      skip_space();
    } while (accept(','));
    expect('}');
    std::sort(members.begin(), members.end(),
              [](const JsonMember& a, const JsonMember& b) { return a.key < b.key; });
    for (size_t i = 1; i < members.size(); ++i) {
      if (members[i].key == members[i - 1].key) error(cat("key '", members[i].key, "' occurs twice"));
    }
    return members;
  }

  bool digit() const { return peek() >= '0' && peek() <= '9'; }

  void digits() {
    if (!digit()) error("expected a value");
    while (digit()) ++pos_;
  }

  Json number() {
    bool negative = accept('-');
    size_t first = pos_;
    digits();
    if (text_[first] == '0' && pos_ > first + 1) error("number with a leading zero");
    size_t last = pos_;
    bool real = false;
    if (accept('.')) {
      real = true;
      digits();
    }
    if (accept('e') || accept('E')) {
      real = true;
      if (!accept('+')) accept('-');
      digits();
    }
    if (real) return Json{JsonReal{}};
    int64_t result = 0;
    for (size_t i = first; i < last; ++i) {
      int64_t d = text_[i] - '0';
      // Built up with its sign, so that the smallest int64 fits too.
      if (!checked_mul(result, 10, &result) || !checked_add(result, negative ? -d : d, &result)) {
        error("integer does not fit 64 bits");
      }
    }
    return Json{result};
  }

  std::string string() {
    std::string out;
    expect('"');
    while (!accept('"')) {
      if (at_end()) error("unterminated string");
      if (accept('\\')) {
        escape(&out);
      } else if (static_cast<unsigned char>(peek()) < 0x20) {
        error("control character in a string");
      } else {
        utf8(&out);
      }
    }
    return out;
  }

  // Copies one valid UTF-8 sequence: no overlong form, no surrogate, nothing above U+10FFFF.
  void utf8(std::string* out) {
    auto byte = [this](size_t i) -> unsigned {
      return pos_ + i < text_.size() ? static_cast<unsigned char>(text_[pos_ + i]) : 0u;
    };
    unsigned lead = byte(0);
    size_t length = lead < 0x80   ? 1
                    : lead < 0xC2 ? 0
                    : lead < 0xE0 ? 2
                    : lead < 0xF0 ? 3
                    : lead < 0xF5 ? 4
                                  : 0;
    bool valid = length > 0;
    for (size_t i = 1; i < length; ++i) valid = valid && (byte(i) & 0xC0) == 0x80;
    if (lead == 0xE0) valid = valid && byte(1) >= 0xA0;
    if (lead == 0xED) valid = valid && byte(1) < 0xA0;
    if (lead == 0xF0) valid = valid && byte(1) >= 0x90;
    if (lead == 0xF4) valid = valid && byte(1) < 0x90;
    if (!valid) error("invalid UTF-8");
    out->append(text_.substr(pos_, length));
    pos_ += length;
  }

  void escape(std::string* out) {
    static constexpr std::string_view kFrom = "\"\\/bfnrt";
    static constexpr std::string_view kTo = "\"\\/\b\f\n\r\t";
    char c = peek();
    if (!at_end() && kFrom.find(c) != std::string_view::npos) {
      ++pos_;
      out->push_back(kTo[kFrom.find(c)]);
      return;
    }
    if (!accept('u')) error("unknown escape");
    unsigned code = hex4();
    if (code >= 0xD800 && code < 0xDC00) {
      if (!accept('\\') || !accept('u')) error("half of a surrogate pair");
      unsigned low = hex4();
      if (low < 0xDC00 || low > 0xDFFF) error("half of a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code <= 0xDFFF) {
      error("half of a surrogate pair");
    }
    if (code == 0) error("U+0000 in a string");
    encode(code, out);
  }

  unsigned hex4() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i, ++pos_) {
      char c = peek();
      unsigned nibble = 0;
      if (c >= '0' && c <= '9') {
        nibble = static_cast<unsigned>(c - '0');
      } else if (c >= 'a' && c <= 'f') {
        nibble = static_cast<unsigned>(c - 'a') + 10;
      } else if (c >= 'A' && c <= 'F') {
        nibble = static_cast<unsigned>(c - 'A') + 10;
      } else {
        error("expected four hexadecimal digits");
      }
      code = code * 16 + nibble;
    }
    return code;
  }

  static void encode(unsigned code, std::string* out) {
    auto put = [out](unsigned byte) { out->push_back(static_cast<char>(byte)); };
    if (code < 0x80) {
      put(code);
    } else if (code < 0x800) {
      put(0xC0 | code >> 6);
      put(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      put(0xE0 | code >> 12);
      put(0x80 | (code >> 6 & 0x3F));
      put(0x80 | (code & 0x3F));
    } else {
      put(0xF0 | code >> 18);
      put(0x80 | (code >> 12 & 0x3F));
      put(0x80 | (code >> 6 & 0x3F));
      put(0x80 | (code & 0x3F));
    }
  }

  std::string_view text_;
  std::string_view what_;
  size_t pos_ = 0;
};

template <typename T>
const T& expect_kind(const JsonCursor& cursor, const Json& json, std::string_view kind) {
  const T* value = std::get_if<T>(&json.value);
  if (!value) cursor.invalid(cat("is not ", kind));
  return *value;
}

}  // namespace

Json parse_json(std::string_view text, std::string_view what) { return Parser(text, what).document(); }

const JsonMember* JsonCursor::find(std::string_view key) const {
  const JsonObject& members = object();
  auto it = std::lower_bound(members.begin(), members.end(), key,
                             [](const JsonMember& m, std::string_view k) { return m.key < k; });
  return it != members.end() && it->key == key ? &*it : nullptr;
}

bool JsonCursor::has(std::string_view key) const { return find(key) != nullptr; }

JsonCursor JsonCursor::member(std::string_view key) const {
  const JsonMember* member = find(key);
  if (!member) invalid(cat("has no '", key, "'"));
  return JsonCursor(member->value, this, member->key, 0);
}

JsonCursor JsonCursor::element(size_t index) const {
  const JsonArray& items = array();
  if (index >= items.size()) invalid(cat("has no element ", index));
  return JsonCursor(items[index], this, {}, index);
}

const JsonObject& JsonCursor::object() const { return expect_kind<JsonObject>(*this, *json_, "an object"); }
const JsonArray& JsonCursor::array() const { return expect_kind<JsonArray>(*this, *json_, "an array"); }
const std::string& JsonCursor::string() const { return expect_kind<std::string>(*this, *json_, "a string"); }
int64_t JsonCursor::integer() const { return expect_kind<int64_t>(*this, *json_, "an integer"); }

int64_t JsonCursor::integer(int64_t min, int64_t max) const {
  int64_t value = integer();
  if (value < min || value > max) invalid(cat("is ", value, ", outside [", min, ", ", max, "]"));
  return value;
}

uint32_t JsonCursor::index(size_t count, std::string_view what) const {
  int64_t value = integer();
  if (value < 0 || static_cast<uint64_t>(value) >= count) {
    invalid(cat("is ", value, ", but there are ", count, " ", what));
  }
  return static_cast<uint32_t>(value);
}

std::string JsonCursor::path() const {
  if (!parent_) return std::string(key_);
  return key_.empty() ? cat(parent_->path(), "[", index_, "]") : cat(parent_->path(), ".", key_);
}

void JsonCursor::invalid(std::string_view problem) const { fail(QG_INVALID_FILE, path(), " ", problem); }

}  // namespace qg
