// Damages an artifact in every way that touches one byte, and cuts it at every length: each must be refused.
//
//   test_corruption model.qg scratch-folder
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "aligned_file.h"
#include "check.h"
#include "qgraph/qgraph.h"

namespace {

bool loads(const uint8_t* data, size_t size) {
  qg_model* model = nullptr;
  qg_status status = qg_load_memory(data, size, nullptr, &model);
  CHECK((status == QG_OK) == (model != nullptr));
  qg_model_free(model);
  if (status == QG_OK) return true;
  // Damage is damage: never "unsupported" or a defect.
  CHECK(status == QG_INVALID_FILE);
  CHECK(qg_last_error()[0] != '\0');
  return false;
}

bool file_loads(const std::string& path, const std::vector<uint8_t>& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  qg_model* model = nullptr;
  qg_status status = qg_load(path.c_str(), nullptr, &model);
  qg_model_free(model);
  CHECK(status == QG_OK || status == QG_INVALID_FILE);
  return status == QG_OK;
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 3);
  const std::vector<uint8_t> original = read_bytes(argv[1]);
  const size_t size = original.size();
  AlignedBytes memory = aligned_copy(original.data(), size);
  uint8_t* bytes = memory.get();
  CHECK(loads(bytes, size));

  size_t flips = 0;
  auto flip = [&](size_t i, unsigned mask) {
    bytes[i] = static_cast<uint8_t>(bytes[i] ^ mask);
    if (loads(bytes, size)) {
      std::fprintf(stderr, "byte %zu of %zu changed by 0x%02x is accepted\n", i, size, mask);
      std::exit(1);
    }
    bytes[i] = original[i];
    ++flips;
  };
  for (size_t i = 0; i < size; ++i) {
    if (i < 8 || i + 32 >= size) {
      for (unsigned mask = 1; mask < 256; ++mask) flip(i, mask);
    } else {
      for (unsigned mask : {0x01u, 0x80u, 0xffu}) flip(i, mask);
    }
  }
  CHECK(loads(bytes, size));

  // Copies of the exact length, so that a sanitizer sees a read past the end.
  for (size_t length = 0; length < size; ++length) {
    AlignedBytes cut = aligned_copy(original.data(), length);
    if (loads(cut.get(), length)) {
      std::fprintf(stderr, "the first %zu of %zu bytes are accepted\n", length, size);
      std::exit(1);
    }
  }
  for (size_t extra : {1u, 32u, 64u, 4096u}) {
    std::vector<uint8_t> longer = original;
    longer.resize(size + extra);
    AlignedBytes copy = aligned_copy(longer.data(), longer.size());
    CHECK(!loads(copy.get(), longer.size()));
  }

  // A few by way of files.
  const std::string path = std::string(argv[2]) + "/damaged.qg";
  CHECK(file_loads(path, original));
  for (size_t i = 0; i < size; i += size / 50 + 1) {
    std::vector<uint8_t> damaged = original;
    damaged[i] ^= 0x10;
    CHECK(!file_loads(path, damaged));
    CHECK(!file_loads(
        path, std::vector<uint8_t>(original.begin(), original.begin() + static_cast<std::ptrdiff_t>(i))));
  }
  std::remove(path.c_str());
  std::printf("%zu bytes: %zu changed bytes and %zu truncations, all refused\n", size, flips, size);
}
