// Addresses and sizes of memory as int64, in which plans compute, also where a processor's own are narrower.
#ifndef QGRAPH_SRC_ADDRESS_H_
#define QGRAPH_SRC_ADDRESS_H_

#include <cstdint>

namespace qg {

inline int64_t address_of(const void* pointer) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer));
}

// Whether memory can have so many bytes at all: half of the address space, as for any object of C++.
inline bool addressable(int64_t bytes) {
  return bytes >= 0 && static_cast<uint64_t>(bytes) <= static_cast<uint64_t>(PTRDIFF_MAX);
}

// For errors about sizes that are not.
constexpr const char* kTooManyBytes = sizeof(void*) == 8 ? "more than 2^63 bytes" : "more than 2^31 bytes";

}  // namespace qg

#endif  // QGRAPH_SRC_ADDRESS_H_
