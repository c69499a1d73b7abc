// The part of the CUDA driver API that the runtime uses. libcuda.so.1 is never linked but opened at first
// need, so that one library serves machines with and without a GPU.
//
// Types and numbers are those of the API's documented ABI, which is stable from driver to driver: a function
// whose signature changed got another symbol.
#ifndef QGRAPH_SRC_CUDA_DRIVER_H_
#define QGRAPH_SRC_CUDA_DRIVER_H_

#include <cstddef>
#include <cstdint>

#include "error.h"

namespace qg::cuda {

using Result = int;  // 0 is success
using Ordinal = int;
using Address = unsigned long long;  // of device memory
using Context = struct ContextTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;
using Stream = struct StreamTag*;
using Event = struct EventTag*;
using Graph = struct GraphTag*;
using GraphNode = struct GraphNodeTag*;
using GraphExec = struct GraphExecTag*;

constexpr Result kOutOfMemory = 2;
constexpr Result kNoDevice = 100;
constexpr Result kInvalidImage = 200;

constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;  // of a device
constexpr int kMaxDynamicSharedBytes = 8;                                  // of a function
constexpr int kMemoryType = 2, kDeviceOrdinal = 9;                         // of a pointer
constexpr unsigned kHostMemory = 1, kDeviceMemory = 2;
constexpr unsigned kNonBlockingStream = 1;
constexpr unsigned kEventWithoutTiming = 2;
constexpr int kJitErrorLog = 5, kJitErrorLogBytes = 6;

struct KernelParams {  // CUDA_KERNEL_NODE_PARAMS, version 1
  Function function;
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  void** params;
  void** extra;
};

struct Copy2D {  // CUDA_MEMCPY2D
  size_t from_x, from_y;
  unsigned from_type;
  const void* from_host;
  Address from_device;
  void* from_array;
  size_t from_pitch;
  size_t to_x, to_y;
  unsigned to_type;
  void* to_host;
  Address to_device;
  void* to_array;
  size_t to_pitch;
  size_t width, height;
};

// (member, symbol, parameters)
#define QG_CUDA_FUNCTIONS(F)                                                                                \
  F(init, "cuInit", (unsigned flags))                                                                       \
  F(error_name, "cuGetErrorName", (Result, const char**))                                                   \
  F(error_text, "cuGetErrorString", (Result, const char**))                                                 \
  F(device_count, "cuDeviceGetCount", (int*))                                                               \
  F(device_get, "cuDeviceGet", (int* device, Ordinal))                                                      \
  F(device_name, "cuDeviceGetName", (char*, int size, int device))                                          \
  F(device_memory, "cuDeviceTotalMem_v2", (size_t*, int device))                                            \
  F(device_attribute, "cuDeviceGetAttribute", (int*, int attribute, int device))                            \
  F(context_retain, "cuDevicePrimaryCtxRetain", (Context*, int device))                                     \
  F(context_release, "cuDevicePrimaryCtxRelease_v2", (int device))                                          \
  F(context_push, "cuCtxPushCurrent_v2", (Context))                                                         \
  F(context_pop, "cuCtxPopCurrent_v2", (Context*))                                                          \
  F(module_load, "cuModuleLoadDataEx", (Module*, const void*, unsigned count, int* options, void** values)) \
  F(module_unload, "cuModuleUnload", (Module))                                                              \
  F(module_function, "cuModuleGetFunction", (Function*, Module, const char* name))                          \
  F(function_set, "cuFuncSetAttribute", (Function, int attribute, int value))                               \
  F(memory_alloc, "cuMemAlloc_v2", (Address*, size_t))                                                      \
  F(memory_free, "cuMemFree_v2", (Address))                                                                 \
  F(host_alloc, "cuMemAllocHost_v2", (void**, size_t))                                                      \
  F(host_free, "cuMemFreeHost", (void*))                                                                    \
  F(copy_to_device, "cuMemcpyHtoDAsync_v2", (Address, const void*, size_t, Stream))                         \
  F(copy_to_host, "cuMemcpyDtoHAsync_v2", (void*, Address, size_t, Stream))                                 \
  F(copy_on_device, "cuMemcpyDtoDAsync_v2", (Address, Address, size_t, Stream))                             \
  F(copy_2d, "cuMemcpy2DAsync_v2", (const Copy2D*, Stream))                                                 \
  F(memset, "cuMemsetD8Async", (Address, unsigned char, size_t, Stream))                                    \
  F(pointer_attribute, "cuPointerGetAttribute", (void* data, int attribute, Address))                       \
  F(stream_create, "cuStreamCreate", (Stream*, unsigned flags))                                             \
  F(stream_destroy, "cuStreamDestroy_v2", (Stream))                                                         \
  F(stream_synchronize, "cuStreamSynchronize", (Stream))                                                    \
  F(stream_wait, "cuStreamWaitEvent", (Stream, Event, unsigned flags))                                      \
  F(event_create, "cuEventCreate", (Event*, unsigned flags))                                                \
  F(event_destroy, "cuEventDestroy_v2", (Event))                                                            \
  F(event_record, "cuEventRecord", (Event, Stream))                                                         \
  F(event_elapsed, "cuEventElapsedTime", (float* milliseconds, Event, Event))                               \
  F(graph_create, "cuGraphCreate", (Graph*, unsigned flags))                                                \
  F(graph_destroy, "cuGraphDestroy", (Graph))                                                               \
  F(graph_kernel, "cuGraphAddKernelNode",                                                                   \
    (GraphNode*, Graph, const GraphNode* after, size_t count, const KernelParams*))                         \
  F(graph_event, "cuGraphAddEventRecordNode",                                                               \
    (GraphNode*, Graph, const GraphNode* after, size_t count, Event))                                       \
  F(graph_instantiate, "cuGraphInstantiateWithFlags", (GraphExec*, Graph, unsigned long long flags))        \
  F(graph_exec_destroy, "cuGraphExecDestroy", (GraphExec))                                                  \
  F(graph_set_kernel, "cuGraphExecKernelNodeSetParams", (GraphExec, GraphNode, const KernelParams*))        \
  F(graph_launch, "cuGraphLaunch", (GraphExec, Stream))

struct Driver {
#define QG_CUDA_MEMBER(member, symbol, parameters) Result(*member) parameters = nullptr;
  QG_CUDA_FUNCTIONS(QG_CUDA_MEMBER)
#undef QG_CUDA_MEMBER
  int version = 0;  // 1000 major + 10 minor
};

// The driver, initialised; the same for the whole process. Throws Error(QG_UNSUPPORTED) if there is none, or
// none that the runtime can use; and in a child of a fork() after the first call, which CUDA does not
// survive.
const Driver& driver();

// Whether driver() was called before the fork() that made this process: nothing of it can be used or freed.
bool lost_by_fork();

// Throws the Error that a result other than success stands for; `what` says what was tried.
[[noreturn]] void fail_with(Result result, const std::string& what);

template <typename... What>
void check(Result result, const What&... what) {
  if (result != 0) fail_with(result, cat(what...));
}

}  // namespace qg::cuda

#endif  // QGRAPH_SRC_CUDA_DRIVER_H_
