#include "code_image.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

#include "error.h"

namespace qg {

CodeImage::CodeImage(const uint8_t* code, size_t size) {
  if (size == 0) return;  // no kernels
  size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  mapped_ = (size + page - 1) / page * page;
  address_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address_ == MAP_FAILED) {
    fail(QG_OUT_OF_MEMORY, "no memory for ", mapped_, " bytes of code");
  }
  std::memcpy(address_, code, size);
  if (mprotect(address_, mapped_, PROT_READ | PROT_EXEC) != 0) {
    int code = errno;
    munmap(address_, mapped_);
    fail(QG_IO_ERROR, "the system does not let this process make memory executable: ",
         std::generic_category().message(code));
  }
  // Where the instruction cache does not follow writes (ARM, RISC-V); nothing on x86.
  char* begin = static_cast<char*>(address_);
  __builtin___clear_cache(begin, begin + mapped_);
}

const void* CodeImage::at(size_t offset) const { return static_cast<const uint8_t*>(address_) + offset; }

CodeImage::~CodeImage() {
  if (mapped_ > 0) munmap(address_, mapped_);
}

}  // namespace qg
