// Bytes in memory of exactly their size, aligned as qg_load_memory demands: a read past the end is an error
// to a sanitizer.
#ifndef QGRAPH_TESTS_ALIGNED_FILE_H_
#define QGRAPH_TESTS_ALIGNED_FILE_H_

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "check.h"

struct FreeMemory {
  void operator()(uint8_t* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<uint8_t, FreeMemory>;

inline AlignedBytes aligned_copy(const uint8_t* data, size_t size) {
  void* memory = nullptr;
  CHECK(posix_memalign(&memory, 64, size > 0 ? size : 1) == 0);
  if (size > 0) std::memcpy(memory, data, size);
  return AlignedBytes(static_cast<uint8_t*>(memory));
}

inline std::vector<uint8_t> read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  CHECK(file.good());
  return std::vector<uint8_t>(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

#endif  // QGRAPH_TESTS_ALIGNED_FILE_H_
