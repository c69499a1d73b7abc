// The pinned key: what a loader that has one takes, and what it refuses.
//
//   test_signature signed.qg key unsigned.qg
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "aligned_file.h"
#include "check.h"
#include "qgraph/qgraph.hpp"

namespace {

constexpr size_t kSeal = 96, kRoot = 32;

// Of the artifact in memory, with a key or, NULL, without. What is refused leaves no model.
qg_status load(const std::vector<uint8_t>& data, const uint8_t* key) {
  qg_load_options options = QG_LOAD_OPTIONS_INIT;
  options.public_key = key;
  AlignedBytes copy = aligned_copy(data.data(), data.size());
  qg_model* model = nullptr;
  const qg_status status = qg_load_memory(copy.get(), data.size(), &options, &model);
  CHECK((status == QG_OK) == (model != nullptr));
  qg_model_free(model);
  return status;
}

bool last_error_has(const char* text) {
  if (std::strstr(qg_last_error(), text)) return true;
  std::fprintf(stderr, "expected \"%s\", got \"%s\"\n", text, qg_last_error());
  return false;
}

// Mappings of this process that are executable.
int executable_mappings() {
  int count = 0;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    count += line.find('x', line.find(' ')) == line.find(' ') + 3;
  return count;
}

void test_keys(const std::string& path, const std::vector<uint8_t>& whole, const qgraph::PublicKey& key,
               const std::vector<uint8_t>& plain) {
  CHECK(load(whole, nullptr) == QG_OK && load(whole, key.data()) == QG_OK);
  CHECK(load(plain, nullptr) == QG_OK);
  CHECK(load(plain, key.data()) == QG_UNTRUSTED && last_error_has("the file is not signed"));
  const qgraph::PublicKey other{0xd7, 0x5a, 0x98, 0x01, 0x82, 0xb1, 0x0a, 0xb7, 0xd5, 0x4b, 0xfe,
                                0xd3, 0xc9, 0x64, 0x07, 0x3a, 0x0e, 0xe1, 0x72, 0xf3, 0xda, 0xa6,
                                0x23, 0x25, 0xaf, 0x02, 0x1a, 0x68, 0xf7, 0x07, 0x51, 0x1a};  // RFC 8032, 7.1
  CHECK(load(whole, other.data()) == QG_UNTRUSTED && last_error_has("signed by key "));
  // Not filled in, and no point.
  for (uint8_t first : {0, 1, 2}) {
    const qgraph::PublicKey none{first};
    CHECK(load(whole, none.data()) == QG_INVALID_ARGUMENT && last_error_has("no public key of Ed25519: 0"));
  }
  CHECK(std::strcmp(qg_status_name(QG_UNTRUSTED), "untrusted") == 0);

  CHECK(qgraph::Model::from_signed(path, key).inputs().size() == 2);
  const int before = executable_mappings();
  CHECK(before > 0);
  try {
    qgraph::Model::from_signed(path, other);
    CHECK(false);
  } catch (const qgraph::Error& e) {
    CHECK(e.status() == QG_UNTRUSTED && std::string(e.what()).find(path) == 0);
  }
  CHECK(executable_mappings() == before);
}

void test_changed_bytes(const std::vector<uint8_t>& whole, const qgraph::PublicKey& key) {
  std::vector<uint8_t> data = whole;
  const size_t seal = whole.size() - kRoot - kSeal;
  for (size_t i = seal; i < whole.size(); ++i) {
    data[i] ^= 0x10;
    const bool root = i >= seal + kSeal;
    CHECK(load(data, nullptr) == QG_INVALID_FILE);
    CHECK(load(data, key.data()) == (root ? QG_INVALID_FILE : QG_UNTRUSTED));
    data[i] = whole[i];
  }
  for (size_t i = 0; i < seal; i += seal / 60 + 1) {
    data[i] ^= 0x10;
    CHECK(load(data, key.data()) == QG_INVALID_FILE);
    data[i] = whole[i];
  }
  for (size_t size : {size_t{0}, size_t{7}, size_t{64}, kRoot + kSeal, seal, seal + kSeal, whole.size() - 1})
    CHECK(load({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)}, key.data()) ==
          QG_INVALID_FILE);
}

// As a program was compiled before there were keys: its struct ends in front of this one's member.
void test_older_callers(const std::vector<uint8_t>& whole) {
  qg_load_options options = QG_LOAD_OPTIONS_INIT;
  options.struct_size = offsetof(qg_load_options, public_key);
  options.public_key = reinterpret_cast<const uint8_t*>(1);  // beyond its end: not looked at
  AlignedBytes copy = aligned_copy(whole.data(), whole.size());
  qg_model* model = nullptr;
  CHECK(qg_load_memory(copy.get(), whole.size(), &options, &model) == QG_OK);
  qg_model_free(model);
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 4);
  const std::vector<uint8_t> whole = read_bytes(argv[1]), bytes = read_bytes(argv[2]),
                             plain = read_bytes(argv[3]);
  qgraph::PublicKey key;
  CHECK(bytes.size() == key.size());
  std::memcpy(key.data(), bytes.data(), key.size());
  test_keys(argv[1], whole, key, plain);
  test_changed_bytes(whole, key);
  test_older_callers(whole);
}
