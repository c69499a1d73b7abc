// A CUDA driver without a GPU: libcuda.so.1 for tests. It has the functions that the runtime uses, a device
// of compute capability 1.0, and runs modules that are shared objects of the host: for each kernel,
//
//   void <kernel>__launch(void** params, uint32_t grid, uint32_t threads, uint32_t shared);
//   const int32_t <kernel>__params;   // their number
//
// It is stricter than a GPU where that finds mistakes:
// * what is given to a stream is done when something waits for the stream, no earlier;
// * device memory lies apart, can be touched only while a stream's work is done, holds NaNs at first, ends at
// a
//   page that cannot be touched, and its addresses are not used twice; they are no better aligned than 256;
// * a copy out of bounds or a launch with a pointer to memory that was freed fails;
// * a call without a current context, or in a fork()ed child, fails.
//
// The environment says what is wrong with the machine:
//   FAKE_CUDA_DEVICES=n     so many devices (1)
//   FAKE_CUDA_VERSION=n     as cuDriverGetVersion gives it (12040)
//   FAKE_CUDA_CAPABILITY=n  compute capability (10: 1.0); modules are what they are
//   FAKE_CUDA_MEMORY=n      bytes of a device (1 GiB)
//   FAKE_CUDA_FAIL=name:n:code,...   the n-th call of a function gives this error; of "kernel", the n-th
//   kernel
//                           that is run, after which everything does
//   FAKE_CUDA_REPORT=file   where to write, at exit: a line "live <kind> <n>" for what was never freed, and
//                           "calls <function> <n>"
// The process can ask, too, fake_cuda_calls(function) and fake_cuda_live(kind), and say what fails from now
// on: fake_cuda_fail(function, n, code), the n-th call counted from now, 0 for none.
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using Result = int;
enum : Result {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNoBinary = 209,
  kInvalidPtx = 218,
  kInvalidHandle = 400,
  kNotFound = 500,
  kNotReady = 600,
  kIllegalAddress = 700,
};
const std::map<Result, const char*> kNames = {{1, "CUDA_ERROR_INVALID_VALUE"},
                                              {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                              {3, "CUDA_ERROR_NOT_INITIALIZED"},
                                              {46, "CUDA_ERROR_DEVICE_UNAVAILABLE"},
                                              {100, "CUDA_ERROR_NO_DEVICE"},
                                              {101, "CUDA_ERROR_INVALID_DEVICE"},
                                              {200, "CUDA_ERROR_INVALID_IMAGE"},
                                              {201, "CUDA_ERROR_INVALID_CONTEXT"},
                                              {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
                                              {218, "CUDA_ERROR_INVALID_PTX"},
                                              {400, "CUDA_ERROR_INVALID_HANDLE"},
                                              {500, "CUDA_ERROR_NOT_FOUND"},
                                              {600, "CUDA_ERROR_NOT_READY"},
                                              {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                                              {719, "CUDA_ERROR_LAUNCH_FAILED"},
                                              {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
                                              {999, "CUDA_ERROR_UNKNOWN"}};

constexpr int kFirstDevice = 7;  // a CUdevice is not an ordinal
constexpr size_t kPage = 4096, kAlignment = 256;
constexpr size_t kHeap = size_t{1} << 38;
constexpr unsigned kFreeShared = 49152, kMostShared = 232448;

long long setting(const char* name, long long otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoll(text) : otherwise;
}

struct Context {
  int ordinal;
  int uses = 0;
};

struct Block {
  uint8_t* pages;
  size_t page_bytes, size;
  int ordinal;
};

struct Module {
  void* library;
};

struct Function {
  void (*launch)(void**, uint32_t, uint32_t, uint32_t);
  int32_t params;
  unsigned max_shared = kFreeShared;
};

struct Stream {
  std::deque<std::function<void()>> work;
  uint64_t done = 0;  // of all that was ever given
  uint64_t given() const { return done + work.size(); }
};

struct Event {
  Stream* stream = nullptr;
  uint64_t number = 0;  // it has happened when the stream has done so many
  std::chrono::steady_clock::time_point time;
};

struct KernelParams {
  Function* function;
  unsigned grid[3], block[3], shared;
  void** params;
  void** extra;
};

struct Node {
  Event* event = nullptr;  // or a kernel
  KernelParams launch{};
  std::vector<uint64_t> params;
};

struct Graph {
  std::vector<Node*> nodes;
};

struct Exec {
  std::map<Node*, Node> nodes;
  std::vector<Node*> order;
};

struct Copy2D {
  size_t from_x, from_y;
  unsigned from_type;
  const void* from_host;
  uint64_t from_device;
  void* from_array;
  size_t from_pitch, to_x, to_y;
  unsigned to_type;
  void* to_host;
  uint64_t to_device;
  void* to_array;
  size_t to_pitch, width, height;
};

struct Fake {
  std::mutex mutex;
  pid_t process = 0;  // that called cuInit
  Result lost = 0;    // what everything gives since a kernel failed
  uint8_t* heap = nullptr;
  size_t heap_used = 0;
  std::map<uint64_t, Block> blocks;
  std::map<uint8_t*, size_t> pinned;
  std::map<int, Context> contexts;
  std::set<Module*> modules;
  std::map<Module*, std::map<std::string, Function*>> functions;
  std::set<Stream*> streams;
  std::set<Event*> events;
  std::set<Graph*> graphs;
  std::set<Exec*> execs;
  Stream default_stream;
  std::map<std::string, int> calls;
  std::map<std::string, std::map<int, Result>> failures;

  Fake() {
    std::string list = std::getenv("FAKE_CUDA_FAIL") ? std::getenv("FAKE_CUDA_FAIL") : "";
    for (size_t at = 0; at < list.size();) {
      size_t end = std::min(list.find(',', at), list.size());
      char name[64];
      int n = 0, code = 0;
      if (std::sscanf(list.substr(at, end - at).c_str(), "%63[^:]:%d:%d", name, &n, &code) == 3)
        failures[name][n] = code;
      at = end + 1;
    }
  }

  std::map<std::string, size_t> live() const {
    size_t retained = 0;
    for (const auto& [ordinal, context] : contexts) retained += static_cast<size_t>(context.uses);
    return {{"contexts", retained},    {"modules", modules.size()}, {"memory", blocks.size()},
            {"pinned", pinned.size()}, {"streams", streams.size()}, {"events", events.size()},
            {"graphs", graphs.size()}, {"execs", execs.size()}};
  }
};

Fake& fake() {
  static Fake& instance = *new Fake;
  return instance;
}

thread_local std::vector<Context*> current;

// Counts a call, and says whether it fails before it does anything.
Result enter(const char* name, bool needs_context = true) {
  Fake& f = fake();
  int n = ++f.calls[name];
  if (f.process != 0 && f.process != getpid()) {
    std::fprintf(stderr, "fake CUDA: %s in a fork()ed child\n", name);
    return kNotInitialized;
  }
  auto failures = f.failures.find(name);
  if (failures != f.failures.end() && failures->second.count(n)) return failures->second[n];
  if (f.process == 0 && std::strcmp(name, "cuInit") != 0 && std::strcmp(name, "cuDriverGetVersion") != 0) {
    return kNotInitialized;
  }
  if (needs_context && current.empty()) return kInvalidContext;
  return needs_context ? f.lost : 0;
}

#define ENTER(...)                                \
  std::lock_guard<std::mutex> lock(fake().mutex); \
  Fake& f = fake();                               \
  (void)f;                                        \
  if (Result problem = enter(__VA_ARGS__)) return problem

// ---- memory

bool in_heap(uint64_t address) {
  auto heap = reinterpret_cast<uint64_t>(fake().heap);
  return heap != 0 && address >= heap && address < heap + kHeap;
}

const Block* block_of(uint64_t address) {
  auto next = fake().blocks.upper_bound(address);
  if (next == fake().blocks.begin()) return nullptr;
  const auto& [begin, block] = *std::prev(next);
  return address <= begin + block.size ? &block : nullptr;
}

bool within_block(uint64_t address, size_t bytes) {
  const Block* block = in_heap(address) ? block_of(address) : nullptr;
  if (!block) return false;
  auto end = reinterpret_cast<uint64_t>(block->pages) + block->page_bytes;
  uint64_t begin = end - (block->size + kAlignment - 1) / kAlignment * kAlignment;
  return address >= begin && bytes <= block->size && address - begin <= block->size - bytes;
}

// Device memory can be touched while one lives.
class Touching {
 public:
  Touching() { protect(PROT_READ | PROT_WRITE); }
  ~Touching() { protect(PROT_NONE); }

 private:
  static void protect(int how) {
    for (const auto& [address, block] : fake().blocks) mprotect(block.pages, block.page_bytes, how);
  }
};

// ---- streams

Stream* stream_of(Stream* stream) {
  return reinterpret_cast<uint64_t>(stream) <= 2 ? &fake().default_stream : stream;
}

bool known(Stream* stream) { return stream == &fake().default_stream || fake().streams.count(stream); }

void drain(Stream* stream, uint64_t until) {
  while (stream->done < until && !stream->work.empty()) {
    auto work = std::move(stream->work.front());
    stream->work.pop_front();
    ++stream->done;
    if (fake().lost == 0) work();
  }
}

Result finish(Stream* stream) {
  Touching touching;
  drain(stream, stream->given());
  return fake().lost;
}

void finish_all() {
  Touching touching;
  for (Stream* stream : fake().streams) drain(stream, stream->given());
  drain(&fake().default_stream, fake().default_stream.given());
}

Result give(Stream* stream, std::function<void()> work) {
  stream = stream_of(stream);
  if (!known(stream)) return kInvalidHandle;
  stream->work.push_back(std::move(work));
  return kSuccess;
}

// ---- kernels

Result check_launch(const KernelParams& p) {
  bool fits = p.grid[0] >= 1 && p.grid[0] <= INT32_MAX && p.grid[1] == 1 && p.grid[2] == 1 &&
              p.block[0] >= 1 && p.block[0] <= 1024 && p.block[1] == 1 && p.block[2] == 1 &&
              p.shared <= p.function->max_shared && p.extra == nullptr;
  return fits ? kSuccess : kInvalidValue;
}

std::vector<uint64_t> values(const KernelParams& p) {
  std::vector<uint64_t> result;
  for (int32_t i = 0; i < p.function->params; ++i) result.push_back(*static_cast<uint64_t*>(p.params[i]));
  return result;
}

void run_kernel(const KernelParams& p, std::vector<uint64_t> params) {
  Fake& f = fake();
  int n = ++f.calls["kernel"];
  auto failures = f.failures.find("kernel");
  if (failures != f.failures.end() && failures->second.count(n)) f.lost = failures->second[n];
  std::vector<void*> pointers;
  for (uint64_t& value : params) {
    if (in_heap(value) && !block_of(value)) f.lost = kIllegalAddress;
    pointers.push_back(&value);
  }
  if (f.lost == 0) p.function->launch(pointers.data(), p.grid[0], p.block[0], p.shared);
}

// Bytes of an ELF file whose section headers are its end, as GNU's linker writes it.
size_t elf_size(const void* image) {
  auto* header = static_cast<const Elf64_Ehdr*>(image);
  return header->e_shoff + size_t{header->e_shnum} * header->e_shentsize;
}

void write_report() {
  const char* path = std::getenv("FAKE_CUDA_REPORT");
  if (!path || (fake().process != 0 && fake().process != getpid())) return;
  if (std::FILE* file = std::fopen(path, "w")) {
    for (const auto& [kind, count] : fake().live()) std::fprintf(file, "live %s %zu\n", kind.c_str(), count);
    for (const auto& [name, count] : fake().calls) std::fprintf(file, "calls %s %d\n", name.c_str(), count);
    std::fclose(file);
  }
}

// A destructor of the library, so that it runs behind what the process registered with atexit().
__attribute__((destructor)) void at_exit() { write_report(); }

}  // namespace

extern "C" {

int fake_cuda_calls(const char* name) {
  std::lock_guard<std::mutex> lock(fake().mutex);
  auto found = fake().calls.find(name);
  return found == fake().calls.end() ? 0 : found->second;
}

int fake_cuda_live(const char* kind) {
  std::lock_guard<std::mutex> lock(fake().mutex);
  return static_cast<int>(fake().live().at(kind));
}

void fake_cuda_fail(const char* name, int n, int code) {
  std::lock_guard<std::mutex> lock(fake().mutex);
  fake().failures.clear();
  if (n > 0) fake().failures[name][fake().calls[name] + n] = code;
}

Result cuDriverGetVersion(int* version) {
  ENTER("cuDriverGetVersion", false);
  *version = static_cast<int>(setting("FAKE_CUDA_VERSION", 12040));
  return kSuccess;
}

Result cuInit(unsigned flags) {
  ENTER("cuInit", false);
  if (flags != 0) return kInvalidValue;
  if (setting("FAKE_CUDA_DEVICES", 1) == 0) return kNoDevice;
  f.process = getpid();
  return kSuccess;
}

Result cuGetErrorName(Result error, const char** text) {
  auto found = kNames.find(error);
  *text = found == kNames.end() ? nullptr : found->second;
  return found == kNames.end() ? kInvalidValue : kSuccess;
}

Result cuGetErrorString(Result error, const char** text) {
  *text = kNames.count(error) ? "the fake driver's words" : nullptr;
  return *text ? kSuccess : kInvalidValue;
}

Result cuDeviceGetCount(int* count) {
  ENTER("cuDeviceGetCount", false);
  *count = static_cast<int>(setting("FAKE_CUDA_DEVICES", 1));
  return kSuccess;
}

Result cuDeviceGet(int* device, int ordinal) {
  ENTER("cuDeviceGet", false);
  if (ordinal < 0 || ordinal >= setting("FAKE_CUDA_DEVICES", 1)) return kInvalidDevice;
  *device = kFirstDevice + ordinal;
  return kSuccess;
}

Result cuDeviceGetName(char* name, int size, int) {
  ENTER("cuDeviceGetName", false);
  std::snprintf(name, static_cast<size_t>(size), "Fake GPU");
  return kSuccess;
}

Result cuDeviceTotalMem_v2(size_t* bytes, int) {
  ENTER("cuDeviceTotalMem_v2", false);
  *bytes = static_cast<size_t>(setting("FAKE_CUDA_MEMORY", 1 << 30));
  return kSuccess;
}

Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTER("cuDeviceGetAttribute", false);
  if (device < kFirstDevice || (attribute != 75 && attribute != 76)) return kInvalidValue;
  auto capability = static_cast<int>(setting("FAKE_CUDA_CAPABILITY", 10));
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return kSuccess;
}

Result cuDevicePrimaryCtxRetain(Context** context, int device) {
  ENTER("cuDevicePrimaryCtxRetain", false);
  int ordinal = device - kFirstDevice;
  if (ordinal < 0 || ordinal >= setting("FAKE_CUDA_DEVICES", 1)) return kInvalidDevice;
  *context = &f.contexts.try_emplace(ordinal, Context{ordinal}).first->second;
  ++(*context)->uses;
  return kSuccess;
}

Result cuDevicePrimaryCtxRelease_v2(int device) {
  ENTER("cuDevicePrimaryCtxRelease_v2", false);
  auto found = f.contexts.find(device - kFirstDevice);
  if (found == f.contexts.end() || found->second.uses == 0) return kInvalidContext;
  --found->second.uses;
  return kSuccess;
}

Result cuCtxPushCurrent_v2(Context* context) {
  ENTER("cuCtxPushCurrent_v2", false);
  if (!context || context->uses == 0) return kInvalidContext;
  current.push_back(context);
  return kSuccess;
}

Result cuCtxPopCurrent_v2(Context** context) {
  ENTER("cuCtxPopCurrent_v2", false);
  if (current.empty()) return kInvalidContext;
  *context = current.back();
  current.pop_back();
  return kSuccess;
}

Result cuModuleLoadDataEx(Module** module, const void* image, unsigned count, int* options,
                          void** option_values) {
  ENTER("cuModuleLoadDataEx");
  if (std::memcmp(image, ELFMAG, SELFMAG) != 0) {
    for (unsigned i = 0; i < count; ++i) {
      if (options[i] == 5)
        std::strcpy(static_cast<char*>(option_values[i]), "fake ptxas: no PTX here\nat all");
    }
    return kInvalidPtx;
  }
  // Never closed: its number is the path, by which two libraries are one to dlopen(), and one with unique
  // symbols stays after dlclose().
  int file = memfd_create("module", 0);
  auto size = static_cast<ssize_t>(elf_size(image));
  std::string path = "/proc/self/fd/" + std::to_string(file);
  void* library =
      write(file, image, elf_size(image)) == size ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (!library) close(file);
  if (!library) return static_cast<const Elf64_Ehdr*>(image)->e_machine == 190 ? kNoBinary : kInvalidImage;
  *module = *f.modules.insert(new Module{library}).first;
  return kSuccess;
}

Result cuModuleUnload(Module* module) {
  ENTER("cuModuleUnload");
  if (!f.modules.erase(module)) return kInvalidHandle;
  finish_all();
  for (const auto& [name, function] : f.functions[module]) delete function;
  f.functions.erase(module);
  dlclose(module->library);
  delete module;
  return kSuccess;
}

Result cuModuleGetFunction(Function** function, Module* module, const char* name) {
  ENTER("cuModuleGetFunction");
  if (!f.modules.count(module)) return kInvalidHandle;
  auto launch = reinterpret_cast<decltype(Function::launch)>(
      dlsym(module->library, (std::string(name) + "__launch").c_str()));
  auto* params =
      static_cast<const int32_t*>(dlsym(module->library, (std::string(name) + "__params").c_str()));
  if (!launch || !params) return kNotFound;
  Function*& known = f.functions[module][name];
  if (!known) known = new Function{launch, *params};
  *function = known;
  return kSuccess;
}

Result cuFuncSetAttribute(Function* function, int attribute, int value) {
  ENTER("cuFuncSetAttribute");
  if (attribute != 8 || value < 0 || static_cast<unsigned>(value) > kMostShared) return kInvalidValue;
  function->max_shared = static_cast<unsigned>(value);
  return kSuccess;
}

Result cuMemAlloc_v2(uint64_t* address, size_t size) {
  ENTER("cuMemAlloc_v2");
  if (size == 0) return kInvalidValue;
  if (!f.heap) {
    void* heap = mmap(nullptr, kHeap, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (heap == MAP_FAILED) return kOutOfMemory;
    f.heap = static_cast<uint8_t*>(heap);
  }
  size_t held = 0;
  for (const auto& [begin, block] : f.blocks) held += block.size;
  auto memory = static_cast<size_t>(setting("FAKE_CUDA_MEMORY", 1 << 30));
  if (size > memory || held > memory - size) return kOutOfMemory;
  size_t rounded = (size + kAlignment - 1) / kAlignment * kAlignment;
  size_t bytes = (rounded + kPage - 1) / kPage * kPage;
  if (f.heap_used + bytes + 2 * kPage > kHeap) return kOutOfMemory;
  uint8_t* pages = f.heap + f.heap_used + kPage;
  f.heap_used += bytes + kPage;
  if (mprotect(pages, bytes, PROT_READ | PROT_WRITE) != 0) return kOutOfMemory;
  std::memset(pages, 0xff, bytes);
  mprotect(pages, bytes, PROT_NONE);
  *address = reinterpret_cast<uint64_t>(pages + bytes - rounded);
  f.blocks[*address] = {pages, bytes, size, current.back()->ordinal};
  return kSuccess;
}

Result cuMemFree_v2(uint64_t address) {
  ENTER("cuMemFree_v2");
  auto found = f.blocks.find(address);
  if (found == f.blocks.end()) return kInvalidValue;
  finish_all();
  madvise(found->second.pages, found->second.page_bytes, MADV_DONTNEED);
  f.blocks.erase(found);
  return kSuccess;
}

Result cuMemAllocHost_v2(void** data, size_t size) {
  ENTER("cuMemAllocHost_v2");
  *data = std::malloc(size);
  f.pinned[static_cast<uint8_t*>(*data)] = size;
  return kSuccess;
}

Result cuMemFreeHost(void* data) {
  ENTER("cuMemFreeHost");
  if (!f.pinned.count(static_cast<uint8_t*>(data))) return kInvalidValue;
  finish_all();
  f.pinned.erase(static_cast<uint8_t*>(data));
  std::free(data);
  return kSuccess;
}

bool is_pinned(const void* data) {
  auto* byte = static_cast<uint8_t*>(const_cast<void*>(data));
  auto next = fake().pinned.upper_bound(byte);
  return next != fake().pinned.begin() && byte < std::prev(next)->first + std::prev(next)->second;
}

Result cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t size, Stream* stream) {
  ENTER("cuMemcpyHtoDAsync_v2");
  if (!within_block(to, size) || in_heap(reinterpret_cast<uint64_t>(from))) return kInvalidValue;
  if (is_pinned(from)) return give(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), from, size); });
  std::string copy(static_cast<const char*>(from), size);  // pageable memory is read at once
  return give(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), copy.data(), size); });
}

Result cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t size, Stream* stream) {
  ENTER("cuMemcpyDtoHAsync_v2");
  if (!within_block(from, size) || in_heap(reinterpret_cast<uint64_t>(to))) return kInvalidValue;
  return give(stream, [=] { std::memcpy(to, reinterpret_cast<void*>(from), size); });
}

Result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, Stream* stream) {
  ENTER("cuMemcpyDtoDAsync_v2");
  if (!within_block(to, size) || !within_block(from, size)) return kInvalidValue;
  return give(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size); });
}

// For tests: copies that wait.
Result cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) {
  ENTER("cuMemcpyHtoD_v2");
  if (!within_block(to, size)) return kInvalidValue;
  Touching touching;
  std::memcpy(reinterpret_cast<void*>(to), from, size);
  return kSuccess;
}

Result cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) {
  ENTER("cuMemcpyDtoH_v2");
  if (!within_block(from, size)) return kInvalidValue;
  Touching touching;
  std::memcpy(to, reinterpret_cast<void*>(from), size);
  return kSuccess;
}

Result cuMemcpy2DAsync_v2(const Copy2D* copy, Stream* stream) {
  ENTER("cuMemcpy2DAsync_v2");
  Copy2D c = *copy;
  if (c.from_type != 2 || c.to_type != 2 || c.from_x || c.from_y || c.to_x || c.to_y || c.width == 0 ||
      c.height == 0 || c.width > c.from_pitch || c.width > c.to_pitch) {
    return kInvalidValue;
  }
  size_t rows = c.height - 1;
  if (!within_block(c.from_device, rows * c.from_pitch + c.width) ||
      !within_block(c.to_device, rows * c.to_pitch + c.width)) {
    return kInvalidValue;
  }
  return give(stream, [=] {
    for (size_t i = 0; i < c.height; ++i) {
      std::memcpy(reinterpret_cast<void*>(c.to_device + i * c.to_pitch),
                  reinterpret_cast<void*>(c.from_device + i * c.from_pitch), c.width);
    }
  });
}

Result cuMemsetD8Async(uint64_t address, unsigned char value, size_t size, Stream* stream) {
  ENTER("cuMemsetD8Async");
  if (!within_block(address, size)) return kInvalidValue;
  return give(stream, [=] { std::memset(reinterpret_cast<void*>(address), value, size); });
}

Result cuPointerGetAttribute(void* data, int attribute, uint64_t address) {
  ENTER("cuPointerGetAttribute");
  const Block* block = in_heap(address) ? block_of(address) : nullptr;
  if (!block && !is_pinned(reinterpret_cast<void*>(address))) return kInvalidValue;
  if (attribute == 2) {
    *static_cast<unsigned*>(data) = block ? 2 : 1;
  } else if (attribute == 9) {
    *static_cast<int*>(data) = block ? block->ordinal : 0;
  } else {
    return kInvalidValue;
  }
  return kSuccess;
}

Result cuStreamCreate(Stream** stream, unsigned) {
  ENTER("cuStreamCreate");
  *stream = *f.streams.insert(new Stream).first;
  return kSuccess;
}

Result cuStreamDestroy_v2(Stream* stream) {
  ENTER("cuStreamDestroy_v2");
  if (!f.streams.count(stream)) return kInvalidHandle;
  // Nobody waits for its work, which is done some time later.
  for (auto& work : stream->work) f.default_stream.work.push_back(std::move(work));
  f.streams.erase(stream);
  delete stream;
  return kSuccess;
}

Result cuStreamSynchronize(Stream* stream) {
  ENTER("cuStreamSynchronize");
  return known(stream_of(stream)) ? finish(stream_of(stream)) : kInvalidHandle;
}

Result cuEventCreate(Event** event, unsigned) {
  ENTER("cuEventCreate");
  *event = *f.events.insert(new Event).first;
  return kSuccess;
}

Result cuEventDestroy_v2(Event* event) {
  ENTER("cuEventDestroy_v2");
  if (!f.events.count(event)) return kInvalidHandle;
  finish_all();
  f.events.erase(event);
  delete event;
  return kSuccess;
}

Result cuEventRecord(Event* event, Stream* stream) {
  ENTER("cuEventRecord");
  if (!f.events.count(event)) return kInvalidHandle;
  Result result = give(stream, [=] { event->time = std::chrono::steady_clock::now(); });
  event->stream = stream_of(stream);
  event->number = event->stream->given();
  return result;
}

Result cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
  ENTER("cuStreamWaitEvent");
  if (!f.events.count(event)) return kInvalidHandle;
  Stream* other = event->stream;
  uint64_t number = event->number;
  if (!other) return kSuccess;
  return give(stream, [=] {
    if (known(other)) drain(other, number);
  });
}

Result cuEventElapsedTime(float* milliseconds, Event* begin, Event* end) {
  ENTER("cuEventElapsedTime");
  if (!f.events.count(begin) || !f.events.count(end)) return kInvalidHandle;
  if (begin->time.time_since_epoch().count() == 0 || end->time.time_since_epoch().count() == 0)
    return kNotReady;
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
  return kSuccess;
}

Result cuGraphCreate(Graph** graph, unsigned) {
  ENTER("cuGraphCreate");
  *graph = *f.graphs.insert(new Graph).first;
  return kSuccess;
}

Result cuGraphDestroy(Graph* graph) {
  ENTER("cuGraphDestroy");
  if (!f.graphs.erase(graph)) return kInvalidHandle;
  for (Node* node : graph->nodes) delete node;
  delete graph;
  return kSuccess;
}

// Nodes are run in the order in which they were added, which has to be what their dependencies say.
bool in_order(const Graph* graph, Node* const* after, size_t count) {
  return graph->nodes.empty() ? count == 0 : count == 1 && after[0] == graph->nodes.back();
}

Result cuGraphAddKernelNode(Node** node, Graph* graph, Node* const* after, size_t count,
                            const KernelParams* params) {
  ENTER("cuGraphAddKernelNode");
  if (!f.graphs.count(graph)) return kInvalidHandle;
  if (!in_order(graph, after, count)) return kInvalidValue;
  if (Result problem = check_launch(*params)) return problem;
  graph->nodes.push_back(*node = new Node{nullptr, *params, values(*params)});
  return kSuccess;
}

Result cuGraphAddEventRecordNode(Node** node, Graph* graph, Node* const* after, size_t count, Event* event) {
  ENTER("cuGraphAddEventRecordNode");
  if (!f.graphs.count(graph) || !f.events.count(event)) return kInvalidHandle;
  if (!in_order(graph, after, count)) return kInvalidValue;
  graph->nodes.push_back(*node = new Node{event, {}, {}});
  return kSuccess;
}

Result cuGraphInstantiateWithFlags(Exec** exec, Graph* graph, unsigned long long) {
  ENTER("cuGraphInstantiateWithFlags");
  if (!f.graphs.count(graph)) return kInvalidHandle;
  *exec = *f.execs.insert(new Exec).first;
  (*exec)->order = graph->nodes;
  for (Node* node : graph->nodes) (*exec)->nodes[node] = *node;
  return kSuccess;
}

Result cuGraphExecDestroy(Exec* exec) {
  ENTER("cuGraphExecDestroy");
  if (!f.execs.erase(exec)) return kInvalidHandle;
  delete exec;
  return kSuccess;
}

Result cuGraphExecKernelNodeSetParams(Exec* exec, Node* node, const KernelParams* params) {
  ENTER("cuGraphExecKernelNodeSetParams");
  if (!f.execs.count(exec) || !exec->nodes.count(node)) return kInvalidHandle;
  Node& own = exec->nodes[node];
  if (own.event || own.launch.function != params->function) return kInvalidValue;
  if (Result problem = check_launch(*params)) return problem;
  own.launch = *params;
  own.params = values(*params);
  return kSuccess;
}

Result cuGraphLaunch(Exec* exec, Stream* stream) {
  ENTER("cuGraphLaunch");
  if (!f.execs.count(exec)) return kInvalidHandle;
  for (Node* node : exec->order) {
    Node copy = exec->nodes[node];
    Result result = give(stream, [copy] {
      if (copy.event) {
        copy.event->time = std::chrono::steady_clock::now();
      } else {
        run_kernel(copy.launch, copy.params);
      }
    });
    if (result != kSuccess) return result;
  }
  return kSuccess;
}

}  // extern "C"
