// Which versions of the format this library reads, and what it says of others: who meets a file of another
// version must learn what to do.
#ifndef QGRAPH_SRC_VERSION_H_
#define QGRAPH_SRC_VERSION_H_

#include <cstdint>
#include <string>

#include "error.h"

namespace qg {

// Of `qgraph.format` and of a plan's `version` (FORMAT.md). The oldest ones stay as long as they can be read:
// tests/golden has files of each.
constexpr int64_t kOldestFormat = 1, kNewestFormat = 1;
constexpr int64_t kOldestPlan = 1, kNewestPlan = 1;

// Throws Error(QG_UNSUPPORTED) for a version outside of [oldest, newest]. `what` has it: "artifact of format"
// or "plan of version". `writer`: what the file says of the qgraph that wrote it, or NULL.
void require_version(const char* what, int64_t version, int64_t oldest, int64_t newest,
                     const std::string* writer);

// What the reader of a file whose hashes are right cannot make sense of, as the error to throw: if a later
// qgraph wrote the file, the file is not wrong, but the library too old: QG_UNSUPPORTED.
Error explained(const Error& error, const std::string* writer);

}  // namespace qg

#endif  // QGRAPH_SRC_VERSION_H_
