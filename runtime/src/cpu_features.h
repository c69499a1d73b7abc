// What the CPU, and the operating system on it, can run.
#ifndef QGRAPH_SRC_CPU_FEATURES_H_
#define QGRAPH_SRC_CPU_FEATURES_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace qg {

// "x86_64", "aarch64", "armv7l", "riscv64" or "wasm32", as in a plan's variants.
std::string_view machine_arch();
// What `--target` calls it.
std::string_view machine_target();
// Whether a feature, by its name in FORMAT.md, can be used: the CPU has the instructions and the operating
// system saves the registers. A name that this version does not know is a feature that the machine does not
// have.
bool cpu_has(std::string_view feature);
// All that it has, with blanks between them.
std::string cpu_features();
bool cpu_has_sha_ni();

struct Amx {
  bool tile, int8, bf16;
};
// What of AMX can be used: of what the CPU has (edx of CPUID leaf 7), if the operating system saves the tiles
// (`saved`, XCR0) and lets this process use them, which it is asked only then.
Amx usable_amx(uint32_t leaf7_edx, uint64_t saved, bool (*permitted)());

}  // namespace qg

#endif  // QGRAPH_SRC_CPU_FEATURES_H_
