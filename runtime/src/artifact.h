// The container of an artifact: finds its tensors and proves that every byte is what was written (FORMAT.md,
// 1 to 7).
#ifndef QGRAPH_SRC_ARTIFACT_H_
#define QGRAPH_SRC_ARTIFACT_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace qg {

struct Segment {
  std::string name;
  const uint8_t* data;
  size_t size;
  bool linked = false;  // part of the program, and code executable where it is
};

class Artifact {
 public:
  // Verifies all of data[0, size), which it does not copy: once constructed, no byte of it is in doubt.
  // `outside`: tensors that lie elsewhere in memory, verified likewise by the hashes that the container has
  // of them. `threads`: the most to read with, 0 for one a core. `public_key`: if not NULL, of
  // QG_PUBLIC_KEY_SIZE bytes, nothing but the hash of the header is computed before its owner's signature has
  // been found to be right. Throws Error: QG_INVALID_FILE, QG_UNSUPPORTED for another format version, or
  // QG_UNTRUSTED.
  Artifact(const uint8_t* data, size_t size, const std::vector<Segment>& outside = {}, int32_t threads = 0,
           const uint8_t* public_key = nullptr);

  // nullptr if there is no such tensor.
  const Segment* find(std::string_view name) const;
  // `__metadata__`, sorted by key.
  const std::vector<std::pair<std::string, std::string>>& metadata() const { return metadata_; }
  const std::string* metadata(std::string_view key) const;
  // `qgraph.version`: which qgraph wrote the file, if it says so.
  const std::string* writer() const { return metadata("qgraph.version"); }

 private:
  std::vector<Segment> segments_;  // sorted by name
  std::vector<std::pair<std::string, std::string>> metadata_;
};

}  // namespace qg

#endif  // QGRAPH_SRC_ARTIFACT_H_
