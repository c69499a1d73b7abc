// AMX on a CPU that has none: executes, in a handler of SIGILL, the instructions that kernels use.
//
//   amx_install();   // from now on, in every thread of the process
//   amx_steps();     // how many instructions were executed here
//
// Instructions: ldtilecfg, tilerelease, tilezero, tileloadd, tileloaddt1, tilestored, tdpbssd, tdpbsud,
// tdpbusd, tdpbuud, tdpbf16ps, as Intel's Software Developer's Manual, volume 2, has them. What a CPU would
// refuse (no configuration, sizes that do not fit) ends the process by SIGILL here, too, with a line on
// stderr. What a CPU leaves alone is poisoned: rows of a tile beyond its size are NaN in every format after a
// load.
//
// Each thread has tiles of its own. A signal may come between any two instructions, so the code runs on the
// thread's stack with the registers put back by the kernel; only RIP is changed.
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kTiles = 8, kRows = 16, kBytes = 64;

struct State {
  bool configured = false;
  uint8_t rows[kTiles];
  uint16_t bytes[kTiles];
  uint8_t tile[kTiles][kRows][kBytes];
};

thread_local State state;
std::atomic<int64_t> steps{0};
struct sigaction previous;

[[noreturn]] void refuse(const char* why) {
  std::fprintf(stderr, "AMX emulator: %s\n", why);
  std::abort();
}

// A VEX-coded instruction of map 0F38 with 128 bits and W = 0: C4, two bytes of VEX, opcode, ModRM, [SIB,
// disp].
struct Instruction {
  int opcode, prefix, vvvv;  // prefix: 0 none, 1 is 66, 2 is F3, 3 is F2
  int mod, reg, rm;
  uint64_t address = 0;  // of the memory operand
  int64_t stride = 0;    // of its rows, of an operand with an index
  int size = 0;
};

bool decode(const uint8_t* p, const greg_t* registers, Instruction* out) {
  static const int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  if (p[0] != 0xC4 || (p[1] & 0x1F) != 2 || (p[2] & 0x84) != 0) return false;
  const int x = (p[1] & 0x40) ? 0 : 8, b = (p[1] & 0x20) ? 0 : 8;
  out->prefix = p[2] & 3;
  out->vvvv = (~p[2] >> 3) & 15;
  out->opcode = p[3];
  out->mod = p[4] >> 6;
  out->reg = (p[4] >> 3) & 7;  // tiles are 0 .. 7: VEX.R is not used
  out->rm = p[4] & 7;
  out->size = 5;
  if (out->mod == 3) return true;
  int base = out->rm | b, index = -1, shift = 0;
  if (out->rm == 4) {
    const uint8_t sib = p[out->size++];
    shift = sib >> 6;
    index = ((sib >> 3) & 7) | x;
    base = (sib & 7) | b;
    if (index == 4) index = -1;
  }
  const bool no_base = out->mod == 0 && (base & 7) == 5;
  int64_t displacement = 0;
  if (out->mod == 1) {
    displacement = static_cast<int8_t>(p[out->size]);
    out->size += 1;
  } else if (out->mod == 2 || no_base) {
    int32_t word;
    std::memcpy(&word, p + out->size, 4);
    displacement = word;
    out->size += 4;
  }
  uint64_t origin = no_base ? 0 : static_cast<uint64_t>(registers[kOrder[base]]);
  if (no_base && out->rm != 4) origin = reinterpret_cast<uint64_t>(p + out->size);  // relative to RIP
  out->address = origin + static_cast<uint64_t>(displacement);
  out->stride =
      index < 0 ? 0 : static_cast<int64_t>(static_cast<uint64_t>(registers[kOrder[index]]) << shift);
  return true;
}

void check(int tile) {
  if (!state.configured) refuse("a tile is used before ldtilecfg");
  if (state.rows[tile] == 0 || state.bytes[tile] == 0) refuse("a tile is used that has no size");
}

void configure(const uint8_t* config) {
  if (config[0] == 0) {
    state.configured = false;
    return;
  }
  if (config[0] != 1 || config[1] != 0) refuse("ldtilecfg: palette 1, start row 0, please");
  for (int i = 2; i < 16; ++i)
    if (config[i]) refuse("ldtilecfg: reserved bytes");
  for (int t = 0; t < 16; ++t) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * t, 2);
    const uint8_t rows = config[48 + t];
    if (t >= kTiles ? bytes || rows : bytes > kBytes || rows > kRows || (bytes == 0) != (rows == 0))
      refuse("ldtilecfg: sizes");
    if (t < kTiles) state.bytes[t] = bytes, state.rows[t] = rows;
  }
  state.configured = true;
  std::memset(state.tile, 0, sizeof(state.tile));
}

void load(int tile, const Instruction& at) {
  check(tile);
  std::memset(state.tile[tile], 0xFF, sizeof(state.tile[tile]));
  for (int r = 0; r < state.rows[tile]; ++r)
    std::memcpy(state.tile[tile][r], reinterpret_cast<const void*>(at.address + r * at.stride),
                state.bytes[tile]);
}

void store(int tile, const Instruction& at) {
  check(tile);
  for (int r = 0; r < state.rows[tile]; ++r)
    std::memcpy(reinterpret_cast<void*>(at.address + r * at.stride), state.tile[tile][r], state.bytes[tile]);
}

// Sizes of c += a b: a has a row for each of c, b a column for each of c, and a row for every four bytes of
// a's.
void check_product(int c, int a, int b) {
  check(c), check(a), check(b);
  if (c == a || a == b || c == b) refuse("a product of a tile with itself");
  if (state.rows[a] != state.rows[c] || state.bytes[b] != state.bytes[c] ||
      state.bytes[a] != 4 * state.rows[b])
    refuse("a product of tiles whose sizes do not fit");
}

template <typename A, typename B>
void dot_bytes(int c, int a, int b) {
  for (int m = 0; m < state.rows[c]; ++m)
    for (int n = 0; n < state.bytes[c] / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, state.tile[c][m] + 4 * n, 4);
      for (int k = 0; k < state.bytes[a]; ++k) {
        const int left = static_cast<A>(state.tile[a][m][k]);
        const int right = static_cast<B>(state.tile[b][k / 4][4 * n + k % 4]);
        sum += static_cast<uint32_t>(left * right);
      }
      std::memcpy(state.tile[c][m] + 4 * n, &sum, 4);
    }
}

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

float bf16(const uint8_t* p) {  // subnormal operands are zeros
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return flushed(value);
}

// Two sums, of the even and of the odd products, from zero over all of a's pairs, each a chain of fused
// multiply-adds; then their sum, then that of it and c; all to nearest even, subnormal results zeros.
void dot_bf16(int c, int a, int b) {
  for (int m = 0; m < state.rows[c]; ++m)
    for (int n = 0; n < state.bytes[c] / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < state.rows[b]; ++k) {
        const uint8_t *left = state.tile[a][m] + 4 * k, *right = state.tile[b][k] + 4 * n;
        even = flushed(std::fma(bf16(left), bf16(right), even));
        odd = flushed(std::fma(bf16(left + 2), bf16(right + 2), odd));
      }
      std::memcpy(&sum, state.tile[c][m] + 4 * n, 4);
      sum = flushed(flushed(sum) + flushed(even + odd));
      std::memcpy(state.tile[c][m] + 4 * n, &sum, 4);
    }
}

bool execute(const Instruction& i) {
  const bool memory = i.mod != 3;
  if (i.opcode == 0x49 && i.prefix == 0) {
    if (memory) {
      configure(reinterpret_cast<const uint8_t*>(i.address));
    } else {
      state.configured = false;  // tilerelease
    }
  } else if (i.opcode == 0x49 && i.prefix == 3 && !memory) {
    check(i.reg);
    std::memset(state.tile[i.reg], 0, sizeof(state.tile[i.reg]));
  } else if (i.opcode == 0x4B && memory && i.rm == 4 && (i.prefix == 3 || i.prefix == 1)) {
    load(i.reg, i);
  } else if (i.opcode == 0x4B && memory && i.rm == 4 && i.prefix == 2) {
    store(i.reg, i);
  } else if ((i.opcode == 0x5E || (i.opcode == 0x5C && i.prefix == 2)) && !memory && i.vvvv < kTiles) {
    check_product(i.reg, i.rm, i.vvvv);
    if (i.opcode == 0x5C) {
      dot_bf16(i.reg, i.rm, i.vvvv);
    } else if (i.prefix == 3) {
      dot_bytes<int8_t, int8_t>(i.reg, i.rm, i.vvvv);
    } else if (i.prefix == 2) {
      dot_bytes<int8_t, uint8_t>(i.reg, i.rm, i.vvvv);
    } else if (i.prefix == 1) {
      dot_bytes<uint8_t, int8_t>(i.reg, i.rm, i.vvvv);
    } else {
      dot_bytes<uint8_t, uint8_t>(i.reg, i.rm, i.vvvv);
    }
  } else {
    return false;
  }
  return true;
}

void on_illegal(int number, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction instruction;
  const auto* at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (decode(at, registers, &instruction) && execute(instruction)) {
    registers[REG_RIP] += instruction.size;
    ++steps;
    return;
  }
  // Somebody else's: as if this handler were not there.
  sigaction(number, &previous, nullptr);
}

}  // namespace

extern "C" int amx_install() {
  struct sigaction action = {}, before;
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO;
  const int result = sigaction(SIGILL, &action, &before);
  if (result == 0 && before.sa_sigaction != on_illegal) previous = before;
  return result;
}

extern "C" int64_t amx_steps() { return steps.load(); }

// Whether this thread's tiles are released, as they must be when a kernel returns.
extern "C" int amx_released() { return !state.configured; }
