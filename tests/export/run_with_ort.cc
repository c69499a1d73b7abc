// A program of ONNX Runtime that runs a file of `--export ort`:
//
//   run_with_ort libonnxruntime.so libqgraph_ort.so model.onnx ROWS INT64...
//
// All inputs are int64 [ROWS, ..] and get the same numbers; the elements of the first output are printed.
// ONNX Runtime's packages for Python bring no headers, so functions are called by their places in OrtApi.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ort/onnxruntime_abi.h"

namespace {

const OrtApi* api = nullptr;

// Calls the function at a place of OrtApi, which returns a status.
template <typename... Parameters>
void call(size_t place, Parameters... parameters) {
  auto function = reinterpret_cast<OrtStatus* (*const*)(Parameters...)>(api)[place];
  OrtStatus* status = function(parameters...);
  if (!status) return;
  auto message = reinterpret_cast<const char* (*const*)(const OrtStatus*)>(api)[2];  // GetErrorMessage
  std::fprintf(stderr, "%s\n", message(status));
  std::exit(1);
}

void release(size_t place, void* object) { reinterpret_cast<void (*const*)(void*)>(api)[place](object); }

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) return 2;
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 2;
  auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
  api = base()->GetApi(kOrtApiVersion);
  if (!api) return std::fprintf(stderr, "ONNX Runtime %s is too old\n", base()->GetVersionString()), 2;

  void *env = nullptr, *options = nullptr, *session = nullptr, *memory = nullptr, *allocator = nullptr;
  call(3, 2, "test", &env);                                            // CreateEnv
  call(6, static_cast<const void*>(env));                              // DisableTelemetryEvents
  call(10, &options);                                                  // CreateSessionOptions
  call(228, options, static_cast<const char*>(argv[2]));               // RegisterCustomOpsLibrary_V2
  call(7, env, static_cast<const char*>(argv[3]), options, &session);  // CreateSession
  call(69, 0, 0, &memory);                                             // CreateCpuMemoryInfo
  call(78, &allocator);                                                // GetAllocatorWithDefaultOptions

  int64_t rows = std::atoll(argv[4]);
  std::vector<int64_t> ids;
  for (int i = 5; i < argc; ++i) ids.push_back(std::atoll(argv[i]));
  const int64_t shape[2] = {rows, static_cast<int64_t>(ids.size()) / rows};

  size_t count = 0;
  call(30, session, &count);  // SessionGetInputCount
  std::vector<char*> names(count);
  std::vector<OrtValue*> inputs(count);
  for (size_t i = 0; i < count; ++i) {
    call(36, session, i, allocator, &names[i]);  // SessionGetInputName
    call(49, memory, static_cast<void*>(ids.data()), ids.size() * sizeof(int64_t), shape, size_t{2},
         ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &inputs[i]);  // CreateTensorWithDataAsOrtValue
  }
  char* name = nullptr;
  call(37, session, size_t{0}, allocator, &name);  // SessionGetOutputName
  OrtValue* output = nullptr;
  call(9, session, nullptr, names.data(), inputs.data(), count, &name, size_t{1}, &output);  // Run

  OrtTensorTypeAndShapeInfo* info = nullptr;
  size_t elements = 0;
  void* data = nullptr;
  call(65, output, &info);
  call(64, info, &elements);
  call(51, output, &data);
  for (size_t i = 0; i < elements; ++i) std::printf("%.9g\n", static_cast<const float*>(data)[i]);

  release(99, info);
  release(96, output);
  for (OrtValue* input : inputs) release(96, input);
  for (char* text : names) call(76, allocator, static_cast<void*>(text));  // AllocatorFree
  call(76, allocator, static_cast<void*>(name));
  release(95, session);
  release(100, options);
  release(94, memory);
  release(92, env);
}
