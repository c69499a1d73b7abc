// What SHA-256 and SHA-512 share (FIPS 180-4): padding, and the digest of a state.
#ifndef QGRAPH_SRC_SHA2_H_
#define QGRAPH_SRC_SHA2_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace qg {

// The hash whose words are `Word`, from its initial state. `compress(state, data, blocks)` takes whole
// blocks.
template <typename Word, typename Compress>
std::array<uint8_t, 8 * sizeof(Word)> sha2(std::array<Word, 8> state, const uint8_t* data, size_t size,
                                           Compress compress) {
  constexpr size_t kBlock = 16 * sizeof(Word), kLength = 2 * sizeof(Word);
  compress(state, data, size / kBlock);
  // The tail, a one bit, zeros, and the length in bits, big-endian, at the end of the last block.
  uint8_t last[2 * kBlock] = {};
  const size_t rest = size % kBlock;
  if (rest > 0) std::memcpy(last, data + size - rest, rest);
  last[rest] = 0x80;
  const size_t blocks = rest + 1 + kLength > kBlock ? 2 : 1;
  const uint64_t bits = uint64_t{size} * 8;
  for (size_t i = 0; i < 8; ++i) last[blocks * kBlock - 1 - i] = static_cast<uint8_t>(bits >> (8 * i));
  compress(state, last, blocks);
  std::array<uint8_t, 8 * sizeof(Word)> out;
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<uint8_t>(state[i / sizeof(Word)] >> (8 * (sizeof(Word) - 1 - i % sizeof(Word))));
  }
  return out;
}

}  // namespace qg

#endif  // QGRAPH_SRC_SHA2_H_
