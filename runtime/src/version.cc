#include "version.h"

#include <array>
#include <optional>
#include <string_view>

namespace qg {
namespace {

using Release = std::array<int, 3>;

// "1.2.3", or that and letters, digits, '.', '+' and '-' behind it. Nothing for what is no release: files say
// what they like.
std::optional<Release> parse_release(std::string_view text) {
  constexpr size_t kMaxText = 32;
  if (text.size() > kMaxText) return std::nullopt;
  Release release = {};
  size_t at = 0;
  for (size_t part = 0; part < release.size(); ++part) {
    const size_t start = at;
    for (; at < text.size() && text[at] >= '0' && text[at] <= '9' && at - start < 6; ++at)
      release[part] = 10 * release[part] + (text[at] - '0');
    if (at == start) return std::nullopt;
    if (part + 1 < release.size() && (at == text.size() || text[at++] != '.')) return std::nullopt;
  }
  for (char c : text.substr(at)) {
    const bool usual = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    if (!usual && c != '.' && c != '+' && c != '-') return std::nullopt;
  }
  return release;
}

}  // namespace

void require_version(const char* what, int64_t version, int64_t oldest, int64_t newest,
                     const std::string* writer) {
  if (version >= oldest && version <= newest) return;
  const std::string by = writer && parse_release(*writer) ? cat("qgraph ", *writer) : "";
  const std::string todo = version > newest
                               ? cat("update the runtime", by.empty() ? "" : cat(" to ", by, " or later"))
                               : cat("compile the model again with this qgraph, or use the runtime of ",
                                     by.empty() ? "the qgraph that wrote it" : by);
  const std::string reads = oldest == newest ? cat(newest) : cat(oldest, " to ", newest);
  fail(QG_UNSUPPORTED, what, " ", version, ", this library (qgraph ", QG_VERSION, ") reads ", reads, ": ",
       todo);
}

Error explained(const Error& error, const std::string* writer) {
  if (error.status() != QG_INVALID_FILE || !writer) return error;
  const std::optional<Release> theirs = parse_release(*writer), ours = parse_release(QG_VERSION);
  if (!theirs || *theirs <= *ours) return error;
  return Error(QG_UNSUPPORTED, cat(error.what(), ": the file is of qgraph ", *writer, ", this library of ",
                                   QG_VERSION, ": update the runtime"));
}

}  // namespace qg
