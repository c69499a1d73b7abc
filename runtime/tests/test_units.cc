// SHA-256, JSON, expressions, kernel calls: the parts that stand alone.
#include <climits>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "address.h"
#include "check.h"
#include "cpu_features.h"
#include "error.h"
#include "expr.h"
#include "json.h"
#include "kernel_call.h"
#include "sha256.h"

namespace {

std::string hex(const qg::Digest& digest) {
  std::string text;
  for (uint8_t byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

const uint8_t* bytes(std::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); }

// Vectors of FIPS 180-4's examples; every length around block borders in both implementations.
void test_sha256() {
  const std::string million(1000000, 'a');
  const struct {
    std::string_view text, digest;
  } vectors[] = {
      {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
      {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
      {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
       "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
      {million, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"},
  };
  for (const auto& v : vectors) {
    CHECK(hex(qg::sha256(bytes(v.text), v.text.size())) == v.digest);
    CHECK(hex(qg::sha256_portable(bytes(v.text), v.text.size())) == v.digest);
  }
  std::vector<uint8_t> data(300);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(i * 37 + 11);
  for (size_t offset = 0; offset < 3; ++offset) {
    for (size_t size = 0; size + offset <= data.size(); ++size) {
      CHECK(qg::sha256(&data[0] + offset, size) == qg::sha256_portable(&data[0] + offset, size));
    }
  }
  std::printf("sha256: %s\n", qg::cpu_has_sha_ni() ? "SHA extensions and portable" : "portable only");
}

void test_json_accepts() {
  const qg::Json json = qg::parse_json(
      " {\"a\": [1, -9223372036854775808, 9223372036854775807, 0, -0],\n\"b\\u00e9\\ud83d\\ude00\\n\": "
      "\"x\\/\xc3\xa9\","
      "\"t\":true,\"f\":false,\"n\":null,\"r\":[1.5, -2e9, 0.0E-1, 1e+5], \"o\":{}, \"l\":[]} ",
      "test");
  const qg::JsonCursor root(json, "test");
  const qg::JsonCursor a = root.member("a");
  CHECK(a.size() == 5);
  CHECK(a.element(1).integer() == INT64_MIN);
  CHECK(a.element(2).integer() == INT64_MAX);
  CHECK(a.element(4).integer() == 0);
  CHECK(root.member("b\xc3\xa9\xf0\x9f\x98\x80\n").string() == "x/\xc3\xa9");
  CHECK_FAILS(root.member("x"), "test has no 'x'");
  CHECK_FAILS(a.member("x"), "test.a is not an object");
  CHECK_FAILS(a.element(5), "test.a has no element 5");
  CHECK_FAILS(a.element(0).string(), "test.a[0] is not a string");
  CHECK_FAILS(root.member("r").element(0).integer(), "test.r[0] is not an integer");
  CHECK_FAILS(root.member("t").integer(), "is not an integer");
  CHECK_FAILS(a.element(2).index(3, "things"), "test.a[2] is 9223372036854775807, but there are 3 things");
  CHECK_FAILS(a.element(1).index(3, "things"), "but there are 3 things");
  CHECK_FAILS(a.element(0).integer(2, 5), "test.a[0] is 1, outside [2, 5]");
}

void test_json_refuses() {
  for (const char* text : {"",
                           " ",
                           "{",
                           "[",
                           "[1",
                           "[1,",
                           "[1,]",
                           "[,]",
                           "{\"a\"}",
                           "{\"a\":}",
                           "{\"a\":1,}",
                           "{a:1}",
                           "{'a':1}",
                           "01",
                           "-",
                           "+1",
                           "1.",
                           ".5",
                           "1e",
                           "1e+",
                           "0x1",
                           "1 2",
                           "nul",
                           "truee",
                           "\"",
                           "\"\\\"",
                           "\"\\x\"",
                           "\"\\u12\"",
                           "\"\\u12g4\"",
                           "\"\n\"",
                           "\"\\ud800\"",
                           "\"\\ud800\\u0041\"",
                           "\"\\udc00\"",
                           "\"\\u0000\"",
                           "\"\x80\"",
                           "\"\xc0\x80\"",
                           "\"\xc3\"",
                           "\"\xe0\x80\x80\"",
                           "\"\xed\xa0\x80\"",
                           "\"\xf0\x80\x80\x80\"",
                           "\"\xf4\x90\x80\x80\"",
                           "\"\xff\"",
                           "NaN",
                           "Infinity",
                           "[1]]",
                           "// x\n1",
                           "\xef\xbb\xbf[]"}) {
    CHECK_FAILS(qg::parse_json(text, "test"), "test: invalid JSON at byte");
  }
  CHECK_FAILS(qg::parse_json("{\"a\":1,\"b\":2,\"\\u0061\":3}", "test"), "key 'a' occurs twice");
  CHECK_FAILS(qg::parse_json("9223372036854775808", "test"), "does not fit 64 bits");
  CHECK_FAILS(qg::parse_json("-9223372036854775809", "test"), "does not fit 64 bits");
  CHECK_FAILS(qg::parse_json(std::string(1, '\0'), "test"), "invalid JSON");
  auto nested = [](size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  qg::parse_json(nested(qg::kMaxJsonDepth + 1), "test");
  CHECK_FAILS(qg::parse_json(nested(qg::kMaxJsonDepth + 2), "test"), "nested too deeply");
  CHECK_FAILS(qg::parse_json(std::string(1000000, '['), "test"), "nested too deeply");
}

qg::Expr parse_expr(const std::string& text) {
  const qg::Json json = qg::parse_json(text, "expr");
  return qg::Expr::parse(qg::JsonCursor(json, "expr"), {"a", "b"});
}

void test_expr() {
  const int64_t dims[] = {7, -3};
  auto value = [&dims](const std::string& text) {
    int64_t result = 0;
    CHECK(parse_expr(text).eval(dims, &result));
    return result;
  };
  auto undefined = [&dims](const std::string& text) {
    int64_t result = 0;
    return !parse_expr(text).eval(dims, &result);
  };
  CHECK(value("5") == 5 && value("\"a\"") == 7 && value("\"b\"") == -3);
  CHECK(value("[\"add\",\"a\",\"b\"]") == 4 && value("[\"sub\",\"a\",\"b\"]") == 10);
  CHECK(value("[\"mul\",\"a\",\"b\"]") == -21);
  CHECK(value("[\"floordiv\",7,2]") == 3 && value("[\"floordiv\",-7,2]") == -4 &&
        value("[\"floordiv\",-8,2]") == -4);
  CHECK(value("[\"ceildiv\",7,2]") == 4 && value("[\"ceildiv\",-7,2]") == -3 &&
        value("[\"ceildiv\",8,2]") == 4);
  CHECK(value("[\"mod\",7,4]") == 3 && value("[\"mod\",-7,4]") == 1 && value("[\"mod\",-8,4]") == 0);
  CHECK(value("[\"min\",\"a\",\"b\"]") == -3 && value("[\"max\",\"a\",\"b\"]") == 7);
  CHECK(value("[\"sub\",[\"mul\",2,\"a\"],[\"sub\",1,[\"add\",\"b\",1]]]") == 11);
  const std::string least = "-9223372036854775808", most = "9223372036854775807";
  CHECK(value("[\"floordiv\"," + least + ",1]") == INT64_MIN &&
        value("[\"ceildiv\"," + least + ",1]") == INT64_MIN);
  CHECK(value("[\"ceildiv\"," + most + "," + most + "]") == 1 &&
        value("[\"mod\"," + least + "," + most + "]") == INT64_MAX - 1);
  CHECK(undefined("[\"add\",1," + most + "]") && undefined("[\"sub\",-2," + most + "]"));
  CHECK(undefined("[\"mul\",4294967296,4294967296]") && undefined("[\"mul\",-1," + least + "]"));
  for (const char* op : {"floordiv", "ceildiv", "mod"}) {
    CHECK(undefined("[\"" + std::string(op) + "\",1,0]") && undefined("[\"" + std::string(op) + "\",1,-1]"));
  }
  // The deepest that JSON allows, leaning to the right, where all operands wait on the stack.
  std::string deep = "1";
  for (int i = 0; i < qg::kMaxJsonDepth; ++i) deep = "[\"add\",1," + deep + "]";
  CHECK(value(deep) == qg::kMaxJsonDepth + 1);

  const std::vector<std::string> names = {"a", "b"};
  CHECK(parse_expr("[\"mul\",2,\"a\"]").text(names) == "(2 * a)");
  CHECK(parse_expr("[\"max\",[\"ceildiv\",\"a\",16],[\"mod\",\"b\",3]]").text(names) ==
        "max(ceildiv(a, 16), (b % 3))");
  CHECK(parse_expr("384").constant() == 384 && !parse_expr("\"a\"").constant());
  CHECK(parse_expr("\"b\"").dim() == 1u && !parse_expr("[\"add\",\"b\",0]").dim());
  CHECK_FAILS(parse_expr("\"c\""), "unknown dimension 'c'");
  CHECK_FAILS(parse_expr("[\"pow\",1,2]"), "unknown operator 'pow'");
  CHECK_FAILS(parse_expr("[\"add\",1]"), "is not [operator, a, b]");
  CHECK_FAILS(parse_expr("[\"add\",1,2,3]"), "is not [operator, a, b]");
  CHECK_FAILS(parse_expr("[]"), "is not [operator, a, b]");
  CHECK_FAILS(parse_expr("1.5"), "is not an integer");
  CHECK_FAILS(parse_expr("{}"), "is not an integer");
}

// Real functions with pointers among their parameters, called as the session calls kernels.
void two(int64_t begin, int64_t end) {
  CHECK(begin == 3);
  CHECK(end == 4);
}
void nine(int64_t* out, int64_t a, const float* b, int64_t c, int64_t d, int64_t e, const int64_t* f,
          int64_t g, int64_t h) {
  *out = a + static_cast<int64_t>(*b) + c + d + e + *f + 10 * g + 100 * h;
}
// As many as there may be, and where an int64 takes two words, as many gaps between them.
void most(int64_t* out, int64_t a, int64_t* b, int64_t c, int64_t* d, int64_t e, int64_t* f, int64_t g,
          int64_t* h, int64_t i, int64_t* j, int64_t k, int64_t* l, int64_t m, int64_t* n, int64_t o,
          int64_t* p, int64_t q, int64_t* r, int64_t s, int64_t* t, int64_t u, int64_t* v, int64_t w,
          int64_t* x, int64_t y, int64_t* z, int64_t aa, int64_t* bb, int64_t cc, int64_t* dd, int64_t ee) {
  *out = a + 2 * c + 3 * e + 4 * g + 5 * i + 6 * k + 7 * m + 8 * o + 9 * q + 10 * s + 11 * u + 12 * w +
         13 * y + 14 * aa + 15 * cc + 16 * ee;
  for (int64_t* pointer : {b, d, f, h, j, l, n, p, r, t, v, x, z, bb, dd}) CHECK(*pointer == pointer - out);
}

void test_kernel_call() {
  qg::KernelArgs ends;
  ends.integer(3);
  ends.integer(4);
  ends.call(reinterpret_cast<const void*>(two));

  int64_t out = 0, f = 6;
  float b = 2;
  qg::KernelArgs args;
  args.pointer(qg::address_of(&out));
  args.integer(1);
  args.pointer(qg::address_of(&b));
  for (int64_t value : {3, 4, 5}) args.integer(value);
  args.pointer(qg::address_of(&f));
  for (int64_t value : {7, -8}) args.integer(value);
  args.call(reinterpret_cast<const void*>(nine));
  CHECK(out == 21 + 70 - 800);

  int64_t memory[16], expected = 0;
  qg::KernelArgs all;
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t value = (int64_t{1} << 40) * (i % 2 == 0 ? i : -i) + i;  // both words of it matter
    memory[i] = i;
    expected += (i + 1) * value;
    all.pointer(qg::address_of(&memory[i]));
    all.integer(value);
  }
  all.call(reinterpret_cast<const void*>(most));
  CHECK(memory[0] == expected);
}

void test_cpu_features() {
  CHECK(!qg::cpu_has("warp_drive"));
  CHECK(!qg::cpu_has(""));
  for (const char* name : {"avx512bw", "avx512vl", "avx512vbmi", "avx512vnni"})
    CHECK(!qg::cpu_has(name) || qg::cpu_has("avx512f"));
  CHECK(!qg::cpu_has("avx512f") || qg::cpu_has("avx2"));
  CHECK(qg::cpu_has("neon") || qg::machine_arch() != "aarch64");
  for (const char* name : {"amx-int8", "amx-bf16"}) CHECK(!qg::cpu_has(name) || qg::cpu_has("amx-tile"));
}

int asked = 0;
bool granted() { return ++asked; }
bool refused() { return ++asked, false; }

void test_amx() {
  constexpr uint32_t all = 1u << 22 | 1u << 24 | 1u << 25;
  constexpr uint64_t saved = 1u << 17 | 1u << 18;
  qg::Amx amx = qg::usable_amx(all, saved, granted);
  CHECK(amx.tile && amx.int8 && amx.bf16 && asked == 1);
  amx = qg::usable_amx(all & ~(1u << 22), saved, granted);
  CHECK(amx.tile && amx.int8 && !amx.bf16);
  amx = qg::usable_amx(all & ~(1u << 25), saved, granted);
  CHECK(amx.tile && !amx.int8 && amx.bf16);
  asked = 0;
  amx = qg::usable_amx(all, saved, refused);
  CHECK(!amx.tile && !amx.int8 && !amx.bf16 && asked == 1);
  // A CPU, or a system, without tiles is not asked about them.
  for (uint64_t some : {uint64_t{0}, saved & ~(uint64_t{1} << 17), saved & ~(uint64_t{1} << 18)})
    CHECK(!qg::usable_amx(all, some, granted).tile);
  CHECK(!qg::usable_amx(all & ~(1u << 24), saved, granted).bf16);
  CHECK(asked == 1);
}

}  // namespace

int main() {
  test_sha256();
  test_json_accepts();
  test_json_refuses();
  test_expr();
  test_kernel_call();
  test_cpu_features();
  test_amx();
}
