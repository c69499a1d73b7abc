#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "address.h"
#include "error.h"

namespace qg {
namespace {

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

[[noreturn]] void too_large() {
  fail(QG_UNSUPPORTED, "is larger than this process, of ", 8 * sizeof(void*), " bits, can map");
}

[[noreturn]] void system_failure(const char* action) {
  int code = errno;
  if (code == EOVERFLOW) too_large();
  qg_status status = code == ENOENT || code == ENOTDIR ? QG_NOT_FOUND
                     : code == ENOMEM                  ? QG_OUT_OF_MEMORY
                                                       : QG_IO_ERROR;
  fail(status, "cannot ", action, ": ", std::generic_category().message(code));
}

}  // namespace

MappedFile::MappedFile(const char* path) {
  // O_NONBLOCK: opening a pipe that nobody writes to must not hang; it is refused below.
  Descriptor file(open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) system_failure("open");
  struct stat info;
  if (fstat(file.get(), &info) != 0) system_failure("stat");
  if (!S_ISREG(info.st_mode)) fail(QG_INVALID_FILE, "is not a regular file");
  if (info.st_size == 0) fail(QG_INVALID_FILE, "is empty");
  if (!addressable(info.st_size)) too_large();
  size_t size = static_cast<size_t>(info.st_size);
  void* address = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (address == MAP_FAILED) system_failure("map");
  // Hints, so results do not matter. Weights are read from end to end at the speed of memory: by pages of
  // 4 KiB that is about a tenth slower than by large ones, which the system makes where the file system can,
  // of what is not in its cache yet or was written in pieces as large. And the whole file is about to be
  // hashed: start reading ahead.
#if defined(MADV_HUGEPAGE)
  (void)madvise(address, size, MADV_HUGEPAGE);
#endif
  (void)madvise(address, size, MADV_WILLNEED);
  data_ = static_cast<const uint8_t*>(address);
  size_ = size;
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<uint8_t*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace qg
