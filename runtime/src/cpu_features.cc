#include "cpu_features.h"

#include <array>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__arm__)
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qg {
namespace {

bool bit(uint64_t word, int n) { return word >> n & 1; }

}  // namespace

Amx usable_amx(uint32_t leaf7_edx, uint64_t saved, bool (*permitted)()) {
  constexpr int kBf16 = 22, kTile = 24, kInt8 = 25, kConfig = 17, kData = 18;
  const bool tile = bit(leaf7_edx, kTile) && bit(saved, kConfig) && bit(saved, kData) && permitted();
  return {tile, tile && bit(leaf7_edx, kInt8), tile && bit(leaf7_edx, kBf16)};
}

#if defined(__x86_64__)
namespace {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf) {
  Registers r;
  __get_cpuid_count(leaf, 0, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros if the CPU has no such leaf
  return r;
}

// Register sets that the operating system saves on a context switch (XCR0); 0 if it uses no XSAVE.
uint64_t saved_registers(const Registers& leaf1) {
  if (!bit(leaf1.ecx, 27)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Intel SDM volume 2, CPUID: leaf 1 (ecx) and leaf 7 (ebx, ecx; edx below).
struct Features {
  bool avx2, fma, f16c, bmi2, avx512f, avx512bw, avx512vl, avx512dq, avx512cd, avx512vbmi, avx512vnni, sha_ni;
  Features() {
    Registers one = cpuid(1), seven = cpuid(7);
    uint64_t saved = saved_registers(one);
    bool avx = (saved & 0x06) == 0x06 && bit(one.ecx, 28);       // XMM and YMM
    bool avx512 = (saved & 0xE6) == 0xE6 && bit(seven.ebx, 16);  // also opmask and ZMM
    avx2 = avx && bit(seven.ebx, 5);
    fma = avx && bit(one.ecx, 12);
    f16c = avx && bit(one.ecx, 29);
    bmi2 = bit(seven.ebx, 8);
    avx512f = avx512;
    avx512bw = avx512 && bit(seven.ebx, 30);
    avx512vl = avx512 && bit(seven.ebx, 31);
    avx512dq = avx512 && bit(seven.ebx, 17);
    avx512cd = avx512 && bit(seven.ebx, 28);
    avx512vbmi = avx512 && bit(seven.ecx, 1);
    avx512vnni = avx512 && bit(seven.ecx, 11);
    sha_ni = bit(seven.ebx, 29) && bit(one.ecx, 19) && bit(one.ecx, 9);  // with SSE4.1 and SSSE3
  }
};

const Features& features() {
  static const Features instance;
  return instance;
}

// Linux keeps the registers of tiles from a process until it asks: they make every signal's frame 8 KiB
// larger. It refuses where a thread's stack for signals is too small for that.
bool permitted_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

// Not a part of Features: nobody asks for tiles who has no code for them.
const Amx& amx() {
  static const Amx instance = usable_amx(cpuid(7).edx, saved_registers(cpuid(1)), permitted_tiles);
  return instance;
}

}  // namespace

std::string_view machine_arch() { return "x86_64"; }
std::string_view machine_target() { return "x86_64-linux"; }

namespace {

struct Named {
  std::string_view name;
  bool has;
};

const std::array<Named, 11>& table() {
  const Features& f = features();
  static const std::array<Named, 11> names{{{"avx2", f.avx2},
                                            {"fma", f.fma},
                                            {"f16c", f.f16c},
                                            {"bmi2", f.bmi2},
                                            {"avx512f", f.avx512f},
                                            {"avx512bw", f.avx512bw},
                                            {"avx512vl", f.avx512vl},
                                            {"avx512dq", f.avx512dq},
                                            {"avx512cd", f.avx512cd},
                                            {"avx512vbmi", f.avx512vbmi},
                                            {"avx512vnni", f.avx512vnni}}};
  return names;
}

}  // namespace

bool cpu_has(std::string_view name) {
  for (const Named& feature : table()) {
    if (feature.name == name) return feature.has;
  }
  if (name == "amx-tile") return amx().tile;
  if (name == "amx-int8") return amx().int8;
  if (name == "amx-bf16") return amx().bf16;
  return false;
}

std::string cpu_features() {
  std::string names;
  for (const Named& feature : table()) {
    if (feature.has) names += (names.empty() ? "" : " ") + std::string(feature.name);
  }
  return names.empty() ? "baseline" : names;
}

bool cpu_has_sha_ni() { return features().sha_ni; }

#elif defined(__aarch64__)

std::string_view machine_arch() { return "aarch64"; }
std::string_view machine_target() { return "aarch64-linux"; }
bool cpu_has(std::string_view name) { return name == "neon"; }  // part of the base architecture
std::string cpu_features() { return "neon"; }
bool cpu_has_sha_ni() { return false; }

#elif defined(__arm__) && __ARM_ARCH >= 7 && defined(__ARM_FP)

namespace {

// Bits of AT_HWCAP, of a process in 32 bits, whatever the kernel and its `uname -m` are.
struct HwCap {
  std::string_view name;
  int bit;
};
constexpr HwCap kHwCaps[] = {{"neon", 12}, {"vfpv4", 16}, {"idiva", 17}};

}  // namespace

std::string_view machine_arch() { return "armv7l"; }
std::string_view machine_target() { return "armv7-linux"; }
bool cpu_has(std::string_view name) {
  for (const HwCap& cap : kHwCaps) {
    if (cap.name == name) return bit(getauxval(AT_HWCAP), cap.bit);
  }
  return false;
}
std::string cpu_features() {
  std::string names;
  for (const HwCap& cap : kHwCaps) {
    if (cpu_has(cap.name)) names += (names.empty() ? "" : " ") + std::string(cap.name);
  }
  return names.empty() ? "baseline" : names;
}
bool cpu_has_sha_ni() { return false; }

#elif defined(__riscv) && __riscv_xlen == 64

std::string_view machine_arch() { return "riscv64"; }
std::string_view machine_target() { return "riscv64-linux"; }
bool cpu_has(std::string_view) { return false; }  // its variants ask for nothing beyond rv64gc
std::string cpu_features() { return "baseline"; }
bool cpu_has_sha_ni() { return false; }

#elif defined(__wasm32__)

std::string_view machine_arch() { return "wasm32"; }
std::string_view machine_target() { return "wasm32"; }
bool cpu_has(std::string_view name) { return name == "simd128"; }  // else no module with kernels could begin
std::string cpu_features() { return "simd128"; }
bool cpu_has_sha_ni() { return false; }

#else
#error "qgraph's runtime supports x86_64, aarch64, armv7 with floating point, riscv64, and wasm32"
#endif

}  // namespace qg
