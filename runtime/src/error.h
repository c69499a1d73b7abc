// The one exception of the runtime's inside. It never leaves the library: c_api.cc turns it into a status and
// a message.
#ifndef QGRAPH_SRC_ERROR_H_
#define QGRAPH_SRC_ERROR_H_

#include <exception>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "qgraph/qgraph.h"

namespace qg {

class Error : public std::exception {
 public:
  Error(qg_status status, std::string message) : status_(status), message_(std::move(message)) {}
  qg_status status() const noexcept { return status_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  qg_status status_;
  std::string message_;
};

// Concatenates strings and integers.
template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::string text;
  auto append = [&text](const auto& part) {
    if constexpr (std::is_integral_v<std::decay_t<decltype(part)>>) {
      text += std::to_string(part);
    } else {
      text += std::string_view(part);
    }
  };
  (append(parts), ...);
  return text;
}

template <typename... Parts>
[[noreturn]] void fail(qg_status status, const Parts&... parts) {
  throw Error(status, cat(parts...));
}

}  // namespace qg

#endif  // QGRAPH_SRC_ERROR_H_
