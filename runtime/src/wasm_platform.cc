// What the other platforms' sources give, for WebAssembly, which has no threads, no files and no GPU, whose
// code is no memory, and whose C++ library may be one without exceptions.
#if defined(__wasm__)
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <typeinfo>

#include "code_image.h"
#include "cuda_device.h"
#include "error.h"
#include "mapped_file.h"
#include "thread_pool.h"

namespace qg {

// ---- threads: one

int available_cores() { return 1; }

void on_threads(unsigned, void (*work)(void* context), void* context) { work(context); }

ThreadPool::ThreadPool(int, HostPool) {}
ThreadPool::~ThreadPool() {}
bool ThreadPool::orphaned() const { return false; }
void ThreadPool::run(int64_t blocks, int64_t, Work work, const void* context) {
  if (blocks > 0) work(context, 0, 0, blocks);
}

// ---- files and code: what is linked into the program

constexpr const char* kLinkOnly =
    "WebAssembly runs no code but the program's: compile the model with --format static-lib and link that";

MappedFile::MappedFile(const char*) { fail(QG_UNSUPPORTED, kLinkOnly); }
MappedFile::~MappedFile() {}
MappedFile::MappedFile(MappedFile&&) noexcept {}
MappedFile& MappedFile::operator=(MappedFile&&) noexcept { return *this; }

CodeImage::CodeImage(const uint8_t*, size_t) { fail(QG_UNSUPPORTED, kLinkOnly); }
CodeImage::~CodeImage() {}

// A table of what this platform's pointers to functions are.
const void* CodeImage::at(size_t offset) const {
  if (offset % sizeof(void*) != 0) fail(QG_INVALID_FILE, "an entry is between two functions");
  const void* function;
  std::memcpy(&function, static_cast<const uint8_t*>(address_) + offset, sizeof(function));
  return function;
}

const std::vector<const Device*>& cuda::gpus() {
  static const std::vector<const Device*> none;
  return none;
}

}  // namespace qg

// ---- failures

// A program without exceptions ends at the first, with its message. (These two are all that is missing from a
// C++ library without them: nothing is ever caught.)
#if !defined(__wasm_exception_handling__)
extern "C" {

void* __cxa_allocate_exception(size_t size) noexcept {
  void* memory = std::malloc(size);
  if (!memory) std::abort();
  return memory;
}

[[noreturn]] void __cxa_throw(void* exception, std::type_info* type, void (*)(void*)) {
  if (*type == typeid(qg::Error)) {
    const qg::Error& error = *static_cast<const qg::Error*>(exception);
    std::fprintf(stderr, "qgraph: %s: %s\n", qg_status_name(error.status()), error.what());
  } else {
    std::fprintf(stderr, "qgraph: %s\n", *type == typeid(std::bad_alloc) ? "out of memory" : type->name());
  }
  std::abort();
}

}  // extern "C"
#endif
#endif
