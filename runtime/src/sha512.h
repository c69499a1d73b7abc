// SHA-512 (FIPS 180-4), which Ed25519 is built on. Of short messages: tensors are hashed by sha256.h.
#ifndef QGRAPH_SRC_SHA512_H_
#define QGRAPH_SRC_SHA512_H_

#include <array>
#include <cstddef>
#include <cstdint>

namespace qg {

using Digest512 = std::array<uint8_t, 64>;

Digest512 sha512(const uint8_t* data, size_t size);

}  // namespace qg

#endif  // QGRAPH_SRC_SHA512_H_
