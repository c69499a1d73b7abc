// Ed25519 (RFC 8032): verification alone.
#ifndef QGRAPH_SRC_ED25519_H_
#define QGRAPH_SRC_ED25519_H_

#include <array>
#include <cstddef>
#include <cstdint>

namespace qg {

using PublicKey = std::array<uint8_t, 32>;
using Signature = std::array<uint8_t, 64>;

// Whether `signature` is that of the message by the owner of the key: RFC 8032, 5.1.7, with the check that
// has no cofactor, S < L, and points in their canonical encoding alone. There is nothing secret here, so its
// time depends on its input.
bool ed25519_verify(const PublicKey& key, const uint8_t* message, size_t size, const Signature& signature);

// Whether somebody can have the private key to it: a point, and not one of the eight of small order, for
// which anybody can sign. 32 zeros are such a one, and what a forgotten key looks like.
bool ed25519_is_key(const PublicKey& key);

}  // namespace qg

#endif  // QGRAPH_SRC_ED25519_H_
