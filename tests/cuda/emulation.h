// Runs CUDA C++ of qgraph's kernels on a CPU: each thread of a block is a fiber, blocks run one after
// another.
//
// Compiled before the text of codegen/cuda/text.py; then, for each kernel, QG_EMULATE(kernel) exports
//   void <kernel>__launch(void** params, uint32_t grid, uint32_t threads, uint32_t shared)
//   int32_t <kernel>__params
// A barrier that not all threads reach, or an exchange that not all lanes of a warp take part in, aborts.
#pragma once
#define QG_EMULATED 1
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static thread_local
#define alignas(bytes) __attribute__((aligned(bytes)))  // which may stand where CUDA's text has it
#define QG_DEVICE static inline
#define QG_MEMBER static inline

namespace emulation {

struct Index {
  int x, y, z;
};

struct __attribute__((aligned(16))) Vector4 {
  uint32_t x, y, z, w;
};

constexpr int kStack = 1 << 16;

struct Fiber {
  void* sp = nullptr;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

inline thread_local Index thread_index, block_index, block_size, grid_size;
inline thread_local std::vector<Fiber> fibers;
inline thread_local int current, alive, waiting, phase;
inline thread_local int lane_waiting[32], lane_phase[32];
inline thread_local uint64_t exchanged[32][32][8];
inline thread_local std::vector<Vector4> dynamic;
inline thread_local void* scheduler_sp;
inline thread_local const std::function<void()>* body;
inline thread_local int64_t idle;  // switches since anybody got on

#if defined(__x86_64__)
// Saves what a callee must keep and the stack pointer, and takes up another stack.
extern "C" void qg_emulation_switch(void** from, void* to);
__asm__(
    ".text\n.weak qg_emulation_switch\nqg_emulation_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
#else
#error "the emulation switches stacks on x86-64 only"
#endif

inline void yield() {
  if (++idle > int64_t{1} << 26) {
    std::fprintf(stderr, "emulation: threads wait for each other for ever\n");
    std::abort();
  }
  qg_emulation_switch(&fibers[current].sp, scheduler_sp);
}

inline void enter() {
  (*body)();
  fibers[current].done = true;
  --alive;
  idle = 0;
  qg_emulation_switch(&fibers[current].sp, scheduler_sp);
  std::abort();
}

inline void sync_block() {
  int mine = phase;
  if (alive != block_size.x) {
    std::fprintf(stderr, "emulation: a barrier that %d threads never reach\n", block_size.x - alive);
    std::abort();
  }
  if (++waiting == alive) {
    waiting = 0;
    ++phase;
    idle = 0;
  } else {
    while (phase == mine) yield();
  }
}

inline void sync_warp() {
  int warp = thread_index.x / 32, mine = lane_phase[warp];
  if (++lane_waiting[warp] == 32) {
    lane_waiting[warp] = 0;
    ++lane_phase[warp];
    idle = 0;
  } else {
    while (lane_phase[warp] == mine) yield();
  }
}

// What lane `source` of the warp has.
template <class T>
T from_lane(T value, int source) {
  static_assert(sizeof(T) <= sizeof exchanged[0][0]);
  int warp = thread_index.x / 32;
  std::memcpy(exchanged[warp][thread_index.x % 32], &value, sizeof value);
  sync_warp();
  std::memcpy(&value, exchanged[warp][source], sizeof value);
  sync_warp();
  return value;
}

inline void run(uint32_t grid, uint32_t threads, uint32_t shared, const std::function<void()>& function) {
  dynamic.resize(shared / sizeof(Vector4) + 1);
  if (threads % 32 != 0 || threads == 0 || threads > 1024) std::abort();
  body = &function;
  block_size = {static_cast<int>(threads), 1, 1};
  grid_size = {static_cast<int>(grid), 1, 1};
  if (fibers.size() < threads) fibers.resize(threads);
  for (uint32_t block = 0; block < grid; ++block) {
    block_index = {static_cast<int>(block), 0, 0};
    alive = static_cast<int>(threads);
    waiting = phase = 0;
    std::memset(lane_waiting, 0, sizeof lane_waiting);
    idle = 0;
    for (uint32_t i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[i];
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      fiber.done = false;
      // As qg_emulation_switch leaves a stack: six registers and where to go on; the stack aligned as at a
      // call.
      void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStack) &
                                            ~uintptr_t{15});
      *--top = nullptr;
      *--top = reinterpret_cast<void*>(&enter);
      for (int k = 0; k < 6; ++k) *--top = nullptr;
      fiber.sp = top;
    }
    while (alive > 0) {
      for (uint32_t i = 0; i < threads; ++i) {
        if (fibers[i].done) continue;
        current = static_cast<int>(i);
        thread_index = {current, 0, 0};
        qg_emulation_switch(&scheduler_sp, fibers[i].sp);
      }
    }
  }
}

template <class... Args, size_t... I>
void call(void (*kernel)(Args...), void** params, uint32_t grid, uint32_t threads, uint32_t shared,
          std::index_sequence<I...>) {
  std::function<void()> function = [&] { kernel(*static_cast<Args*>(params[I])...); };
  run(grid, threads, shared, function);
}

template <class... Args>
void launch(void (*kernel)(Args...), void** params, uint32_t grid, uint32_t threads, uint32_t shared) {
  call(kernel, params, grid, threads, shared, std::index_sequence_for<Args...>());
}

template <class... Args>
constexpr int32_t count(void (*)(Args...)) {
  return sizeof...(Args);
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace emulation

#define qg_dynamic emulation::dynamic.data()
#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size
#define __syncthreads() emulation::sync_block()
#define __syncwarp() emulation::sync_warp()
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN
#define CUDART_INF static_cast<double>(INFINITY)
#define CUDART_NAN static_cast<double>(NAN)

using uint4 = emulation::Vector4;
struct __attribute__((aligned(16))) float4 {
  float x, y, z, w;
};
struct __attribute__((aligned(8))) uint2 {
  uint32_t x, y;
};

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::from_lane(value, (emulation::thread_index.x % 32) ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::from_lane(value, lane);
}

inline int __float2int_rz(float x) {
  return x != x ? 0 : x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : static_cast<int>(x);
}
inline long long __float2ll_rz(float x) {
  if (x != x) return INT64_MIN;
  return x >= 9223372036854775808.0f   ? INT64_MAX
         : x < -9223372036854775808.0f ? INT64_MIN
                                       : static_cast<long long>(x);
}

inline uint32_t qg_bf16x2(float lo, float hi) {
  return emulation::to_bf16(lo) | emulation::to_bf16(hi) << 16;
}

inline float qg_f16_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

inline uint32_t to_f16(float value) {
  _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline uint32_t qg_f16x2(float lo, float hi) { return to_f16(lo) | to_f16(hi) << 16; }
inline uint32_t qg_f16x2_mul(uint32_t a, uint32_t b) {
  return qg_f16x2(qg_f16_to_float(a) * qg_f16_to_float(b),
                  qg_f16_to_float(a >> 16) * qg_f16_to_float(b >> 16));
}
inline uint32_t qg_f16x2_sub(uint32_t a, uint32_t b) {
  return qg_f16x2(qg_f16_to_float(a) - qg_f16_to_float(b),
                  qg_f16_to_float(a >> 16) - qg_f16_to_float(b >> 16));
}

// Products exact, sums in float32; the hardware's order of these is its own.
template <class Half>
void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Half half_of) {
  using namespace emulation;
  int warp = thread_index.x / 32, lane = thread_index.x % 32;
  auto& regs = reinterpret_cast<uint32_t (&)[32][16]>(exchanged[warp]);
  for (int i = 0; i < 4; ++i) regs[lane][i] = a[i];
  regs[lane][4] = b0;
  regs[lane][5] = b1;
  sync_warp();
  for (int r = 0; r < 4; ++r) {
    int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
    float sum = d[r];
    for (int k = 0; k < 16; ++k) {
      int from_a = row % 8 * 4 + k % 8 / 2, from_b = column * 4 + k % 8 / 2, half = 16 * (k % 2);
      sum += half_of(regs[from_a][row / 8 + k / 8 * 2] >> half) * half_of(regs[from_b][4 + k / 8] >> half);
    }
    d[r] = sum;
  }
  sync_warp();
}

inline void qg_mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  mma(d, a, b0, b1, [](uint32_t bits) { return emulation::bits_to_float(bits << 16); });
}
inline void qg_mma_f16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  mma(d, a, b0, b1, [](uint32_t bits) { return qg_f16_to_float(static_cast<uint16_t>(bits)); });
}

#define QG_EMULATE(kernel)                                                                            \
  extern "C" void kernel##__launch(void** params, uint32_t grid, uint32_t threads, uint32_t shared) { \
    emulation::launch(kernel, params, grid, threads, shared);                                         \
  }                                                                                                   \
  extern "C" const int32_t kernel##__params = emulation::count(kernel);
