// A file mapped into memory, read-only.
#ifndef QGRAPH_SRC_MAPPED_FILE_H_
#define QGRAPH_SRC_MAPPED_FILE_H_

#include <cstddef>
#include <cstdint>

namespace qg {

class MappedFile {
 public:
  MappedFile() = default;
  // Throws Error: QG_NOT_FOUND, QG_IO_ERROR, or QG_INVALID_FILE for a directory, a device or an empty file.
  explicit MappedFile(const char* path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace qg

#endif  // QGRAPH_SRC_MAPPED_FILE_H_
