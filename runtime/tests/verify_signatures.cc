// Verdicts of the runtime's Ed25519 on a corpus that tests/runtime/test_ed25519.py makes.
//
//   verify_signatures corpus     a sequence of (u64 size, key [32], signature [64], message [size])
//
// Prints two digits a record: 1 if the signature is right, else 0; 1 if somebody can have the key, else 0.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "aligned_file.h"
#include "check.h"
#include "ed25519.h"

int main(int argc, char** argv) {
  CHECK(argc == 2);
  const std::vector<uint8_t> corpus = read_bytes(argv[1]);
  constexpr size_t kFixed = 8 + 32 + 64;
  for (size_t at = 0; at < corpus.size();) {
    uint64_t size = 0;
    qg::PublicKey key;
    qg::Signature signature;
    CHECK(corpus.size() - at >= kFixed);
    std::memcpy(&size, &corpus[at], 8);
    std::memcpy(key.data(), &corpus[at + 8], key.size());
    std::memcpy(signature.data(), &corpus[at + 40], signature.size());
    at += kFixed;
    CHECK(corpus.size() - at >= size);
    // A copy of the exact length, so that a sanitizer sees a read past the end.
    const std::vector<uint8_t> message(corpus.data() + at, corpus.data() + at + size);
    std::printf("%d%d\n", qg::ed25519_verify(key, message.data(), message.size(), signature),
                qg::ed25519_is_key(key));
    at += size;
  }
}
