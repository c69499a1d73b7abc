// What the CPU, and the operating system on it, can run.
#ifndef QGRAPH_SRC_CPU_FEATURES_H_
#define QGRAPH_SRC_CPU_FEATURES_H_

#include <string>
#include <string_view>

namespace qg {

// "x86_64" or "aarch64", as in a plan's variants.
std::string_view machine_arch();
// Whether a feature, by its name in FORMAT.md, can be used: the CPU has the instructions and the operating
// system saves the registers. A name that this version does not know is a feature that the machine does not
// have.
bool cpu_has(std::string_view feature);
// All that it has, with blanks between them.
std::string cpu_features();
bool cpu_has_sha_ni();

}  // namespace qg

#endif  // QGRAPH_SRC_CPU_FEATURES_H_
