#include "artifact.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "checked.h"
#include "code_image.h"
#include "ed25519.h"
#include "error.h"
#include "json.h"
#include "sha256.h"
#include "thread_pool.h"
#include "version.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little-endian and read in place");

namespace qg {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kMaxHeader = 100'000'000;  // the limit of the safetensors library
constexpr std::string_view kRoot = "qgraph.root";
constexpr std::string_view kPad = "qgraph.pad.";
constexpr std::string_view kSignature = "qgraph.signature";
constexpr size_t kRootSize = sizeof(Digest);
constexpr size_t kSealSize = sizeof(PublicKey) + sizeof(Signature);  // of the tensor kSignature
// What is signed is this, its NUL included, and the root: no signature of something else is one of a file.
constexpr char kSigned[] = "qgraph artifact signature 1";
static_assert(sizeof(PublicKey) == QG_PUBLIC_KEY_SIZE);

bool starts_with(std::string_view text, std::string_view prefix) {
  return text.substr(0, prefix.size()) == prefix;
}

// Bits of an element of a safetensors dtype.
int64_t bits_of(const JsonCursor& dtype) {
  static constexpr std::pair<std::string_view, int> kBits[] = {
      {"BOOL", 8},    {"U8", 8},   {"I8", 8},   {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F4", 4},
      {"F6_E2M3", 6}, {"U16", 16}, {"I16", 16}, {"F16", 16},    {"BF16", 16},   {"F6_E3M2", 6}, {"U32", 32},
      {"I32", 32},    {"F32", 32}, {"U64", 64}, {"I64", 64},    {"F64", 64},    {"C64", 64}};
  for (const auto& [name, bits] : kBits) {
    if (name == dtype.string()) return bits;
  }
  dtype.invalid(cat("is the unknown dtype '", dtype.string(), "'"));
}

struct Tensor {
  std::string name;
  int64_t begin, end;  // from the first byte after the header
};

Tensor read_tensor(const JsonCursor& entry, const std::string& name) {
  JsonCursor dtype = entry.member("dtype"), shape = entry.member("shape"),
             offsets = entry.member("data_offsets");
  if (offsets.size() != 2) offsets.invalid("is not a pair");
  Tensor tensor{name, offsets.element(0).integer(0, INT64_MAX), offsets.element(1).integer(0, INT64_MAX)};
  if (tensor.end < tensor.begin) offsets.invalid("ends before it begins");
  int64_t bits = bits_of(dtype);
  bool fits = true;
  for (size_t i = 0; i < shape.size(); ++i) {
    fits = fits && checked_mul(bits, shape.element(i).integer(0, INT64_MAX), &bits);
  }
  int64_t bytes = tensor.end - tensor.begin;
  if (!fits || bits % 8 != 0 || bits / 8 != bytes) {
    entry.invalid(cat("has ", bytes, " bytes, which do not match its dtype and shape"));
  }
  return tensor;
}

// Tensors in the order of their offsets, checked to lie back to back over data[0, size) and aligned.
std::vector<Tensor> read_tensors(const JsonCursor& header, int64_t size) {
  std::vector<Tensor> tensors;
  for (const JsonMember& member : header.object()) {
    if (member.key != "__metadata__") tensors.push_back(read_tensor(header.member(member.key), member.key));
  }
  std::sort(tensors.begin(), tensors.end(), [](const Tensor& a, const Tensor& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  int64_t position = 0;
  for (const Tensor& t : tensors) {
    if (t.begin != position) fail(QG_INVALID_FILE, "tensor '", t.name, "' leaves a hole or overlaps another");
    if (t.begin % kAlignment != 0 && t.name != kRoot && !starts_with(t.name, kPad)) {
      fail(QG_INVALID_FILE, "tensor '", t.name, "' is not aligned to ", kAlignment, " bytes");
    }
    position = t.end;
  }
  if (position != size) {
    fail(QG_INVALID_FILE, "the tensors take ", position, " bytes, the file has ", size, " for them");
  }
  if (tensors.empty() || tensors.back().name != kRoot ||
      tensors.back().end - tensors.back().begin != kRootSize) {
    fail(QG_INVALID_FILE, "the last tensor is not '", kRoot, "'");
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    if (t.name == kSignature && (i + 2 != tensors.size() || t.end - t.begin != kSealSize)) {
      fail(QG_INVALID_FILE, "tensor '", kSignature, "' is not the last but one, of ", kSealSize, " bytes");
    }
  }
  return tensors;
}

bool is_signed(const std::vector<Tensor>& tensors) {
  return tensors.size() > 1 && tensors[tensors.size() - 2].name == kSignature;
}

// The tensor kSignature as it lies in front of the root: whose signature it is, and the signature.
struct Seal {
  PublicKey key;
  Signature signature;
};

Seal read_seal(const uint8_t* root) {
  Seal seal;
  std::memcpy(seal.key.data(), root - kSealSize, seal.key.size());
  std::memcpy(seal.signature.data(), root - sizeof(Signature), seal.signature.size());
  return seal;
}

bool is_right(const Seal& seal, const Digest& root) {
  std::array<uint8_t, sizeof(kSigned) + kRootSize> message;
  std::memcpy(message.data(), kSigned, sizeof(kSigned));
  std::memcpy(message.data() + sizeof(kSigned), root.data(), root.size());
  return ed25519_verify(seal.key, message.data(), message.size(), seal.signature);
}

// The beginning of a key, which is enough to tell whose it is.
std::string short_name(const PublicKey& key) {
  std::string text;
  for (size_t i = 0; i < 8; ++i) {
    text += "0123456789abcdef"[key[i] >> 4];
    text += "0123456789abcdef"[key[i] & 15];
  }
  return text + "..";
}

// Throws unless the file, whose header's hash is right, ends with a right signature by this key. The header
// is not parsed: it is not trusted yet. `end`: behind the last byte of the file.
void require_signature(const uint8_t* public_key, std::string_view header, size_t body, const uint8_t* end,
                       const Digest& root) {
  PublicKey key;
  std::memcpy(key.data(), public_key, key.size());
  if (!ed25519_is_key(key)) {
    fail(QG_INVALID_ARGUMENT, "public_key is no public key of Ed25519: ", short_name(key));
  }
  const std::string wanted = cat("this program takes only what is signed by key ", short_name(key));
  if (body < kSealSize + kRootSize || header.find("\"qgraph.signature\"") == std::string_view::npos) {
    fail(QG_UNTRUSTED, "the file is not signed, and ", wanted, ": get the signed one");
  }
  const Seal seal = read_seal(end - kRootSize);
  if (seal.key != key) {
    fail(QG_UNTRUSTED, "signed by key ", short_name(seal.key), ", but ", wanted,
         ": get the file from the owner of that key");
  }
  if (!is_right(seal, root)) {
    fail(QG_UNTRUSTED, "the signature is wrong: the file was damaged, or changed after it was signed, and ",
         wanted, ": get it anew");
  }
}

Digest parse_digest(const std::string& hex, const std::string& name) {
  auto nibble = [](char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
  };
  Digest digest;
  bool valid = hex.size() == 2 * digest.size();
  for (size_t i = 0; valid && i < digest.size(); ++i) {
    int high = nibble(hex[2 * i]), low = nibble(hex[2 * i + 1]);
    valid = high >= 0 && low >= 0;
    digest[i] = static_cast<uint8_t>(high << 4 | low);
  }
  if (!valid) fail(QG_INVALID_FILE, "the hash of tensor '", name, "' is not a SHA-256 in hexadecimal");
  return digest;
}

int64_t parse_format(const std::string& text) {
  int64_t version = 0;
  for (char c : text) {
    version = c >= '0' && c <= '9' && version < 1'000'000 ? 10 * version + (c - '0') : -1;
    if (version < 0) break;
  }
  if (text.empty() || version < 0) fail(QG_INVALID_FILE, "'qgraph.format' is '", text, "', not a number");
  return version;
}

struct Hashed {
  const Segment* segment;
  Digest expected;
};

// Compares all hashes, in parallel when there is much to read. Throws for the first damaged segment in file
// order, so that the message does not depend on timing.
void verify(const std::vector<Hashed>& all, unsigned threads) {
  constexpr size_t kParallelBytes = size_t{4} << 20;
  constexpr unsigned kMaxThreads = 16;
  std::atomic<size_t> next{0}, damaged{all.size()};
  auto work = [&] {
    for (size_t i; (i = next.fetch_add(1)) < all.size();) {
      if (sha256(all[i].segment->data, all[i].segment->size) == all[i].expected) continue;
      size_t first = damaged.load();
      while (i < first && !damaged.compare_exchange_weak(first, i)) {
      }
    }
  };
  size_t bytes = 0;
  for (const Hashed& h : all) bytes += h.segment->size;
  threads = std::min(threads > 0 ? threads : static_cast<unsigned>(available_cores()), kMaxThreads);
  on_threads(
      bytes < kParallelBytes ? 1 : threads, [](void* f) { (*static_cast<decltype(work)*>(f))(); }, &work);
  if (damaged < all.size()) {
    fail(QG_INVALID_FILE, "tensor '", all[damaged].segment->name, "' is damaged: its SHA-256 differs");
  }
}

}  // namespace

Artifact::Artifact(const uint8_t* data, size_t size, const std::vector<Segment>& outside, int32_t threads,
                   const uint8_t* public_key) {
  if (threads < 0) fail(QG_INVALID_ARGUMENT, "threads is ", threads, ", but must not be negative");
  uint64_t header_size = 0;
  if (size < sizeof(header_size) + kRootSize)
    fail(QG_INVALID_FILE, "too short for an artifact: ", size, " bytes");
  std::memcpy(&header_size, data, sizeof(header_size));
  if (header_size > kMaxHeader || header_size > size - sizeof(header_size) - kRootSize) {
    fail(QG_INVALID_FILE, "damaged or not an artifact: a header of ", header_size, " bytes in a file of ",
         size, ": give a .qg file, as qgraph compile makes of ONNX files");
  }
  size_t start = sizeof(header_size) + static_cast<size_t>(header_size);
  if (start % kAlignment != 0) fail(QG_INVALID_FILE, "damaged or not an artifact: the header is not padded");
  Digest root = sha256(data, start);
  if (std::memcmp(root.data(), data + size - kRootSize, kRootSize) != 0) {
    fail(QG_INVALID_FILE, "damaged or not an artifact: the SHA-256 of the header differs");
  }

  std::string_view text(reinterpret_cast<const char*>(data) + sizeof(header_size),
                        start - sizeof(header_size));
  if (public_key) require_signature(public_key, text, size - start, data + size, root);
  const Json json = parse_json(text, "header");
  const JsonCursor header(json, "header");
  const JsonCursor metadata = header.member("__metadata__");
  for (const JsonMember& member : metadata.object()) {
    metadata_.emplace_back(member.key, metadata.member(member.key).string());
  }
  const std::string* format = this->metadata("qgraph.format");
  if (!format) fail(QG_INVALID_FILE, "a safetensors file, but not an artifact: no 'qgraph.format'");
  require_version("artifact of format", parse_format(*format), kOldestFormat, kNewestFormat, writer());

  std::vector<Tensor> tensors;
  try {
    tensors = read_tensors(header, static_cast<int64_t>(size - start));
  } catch (const Error& e) {
    throw explained(e, writer());
  }
  std::vector<Hashed> hashed;
  segments_.reserve(tensors.size() + outside.size());  // `hashed` points into it
  hashed.reserve(tensors.size() + outside.size());
  auto add = [&](const Segment& segment) {
    const std::string* hex = this->metadata(cat("sha256:", segment.name));
    if (!hex) fail(QG_INVALID_FILE, "tensor '", segment.name, "' has no hash");
    segments_.push_back(segment);
    hashed.push_back({&segments_.back(), parse_digest(*hex, segment.name)});
  };
  for (const Tensor& t : tensors) {
    const uint8_t* bytes = data + start + t.begin;
    size_t count = static_cast<size_t>(t.end - t.begin);
    if (t.name == kRoot || t.name == kSignature) continue;
    if (starts_with(t.name, kPad)) {
      if (std::any_of(bytes, bytes + count, [](uint8_t b) { return b != 0; })) {
        fail(QG_INVALID_FILE, "the padding '", t.name, "' is damaged: it is not zero");
      }
      continue;
    }
    add({t.name, bytes, count});
  }
  for (const Segment& segment : outside) {
    if (kCodeIsHashed) {
      add(segment);
    } else {
      segments_.push_back(segment);
    }
  }
  verify(hashed, static_cast<unsigned>(threads));
  // Of no known key: it tells nothing but that the signature's bytes are not damaged.
  if (is_signed(tensors) && !public_key && !is_right(read_seal(data + size - kRootSize), root)) {
    fail(QG_INVALID_FILE, "the signature is damaged: it is not that of the key beside it");
  }
  std::sort(segments_.begin(), segments_.end(),
            [](const Segment& a, const Segment& b) { return a.name < b.name; });
}

const Segment* Artifact::find(std::string_view name) const {
  auto it = std::lower_bound(segments_.begin(), segments_.end(), name,
                             [](const Segment& s, std::string_view n) { return s.name < n; });
  return it != segments_.end() && it->name == name ? &*it : nullptr;
}

const std::string* Artifact::metadata(std::string_view key) const {
  auto it = std::lower_bound(metadata_.begin(), metadata_.end(), key,
                             [](const auto& pair, std::string_view k) { return pair.first < k; });
  return it != metadata_.end() && it->first == key ? &it->second : nullptr;
}

}  // namespace qg
