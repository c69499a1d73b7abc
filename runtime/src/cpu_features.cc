#include "cpu_features.h"

#include <array>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace qg {

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

bool bit(uint32_t word, int n) { return word >> n & 1; }

// Register sets that the operating system saves on a context switch (XCR0); 0 if it uses no XSAVE.
uint64_t saved_registers(const Registers& leaf1) {
  if (!bit(leaf1.ecx, 27)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Intel SDM volume 2, CPUID: leaf 1 (ecx) and leaf 7 (ebx, ecx).
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

}  // namespace

std::string_view machine_arch() { return "x86_64"; }

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
bool cpu_has(std::string_view name) { return name == "neon"; }  // part of the base architecture
std::string cpu_features() { return "neon"; }
bool cpu_has_sha_ni() { return false; }

#else
#error "qgraph's runtime supports x86_64 and aarch64"
#endif

}  // namespace qg
