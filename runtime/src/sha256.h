// SHA-256 (FIPS 180-4), with the SHA extensions of x86 where the CPU has them.
#ifndef QGRAPH_SRC_SHA256_H_
#define QGRAPH_SRC_SHA256_H_

#include <array>
#include <cstddef>
#include <cstdint>

namespace qg {

using Digest = std::array<uint8_t, 32>;

Digest sha256(const uint8_t* data, size_t size);
// Without the extensions, whatever the CPU has: for tests.
Digest sha256_portable(const uint8_t* data, size_t size);

}  // namespace qg

#endif  // QGRAPH_SRC_SHA256_H_
