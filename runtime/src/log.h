// The host's log callback.
#ifndef QGRAPH_SRC_LOG_H_
#define QGRAPH_SRC_LOG_H_

#include "error.h"
#include "qgraph/qgraph.h"

namespace qg {

class Log {
 public:
  Log() = default;
  Log(qg_log callback, void* context) : callback_(callback), context_(context) {}

  // To spare the work of putting a message together.
  explicit operator bool() const { return callback_ != nullptr; }

  // Concatenates strings and integers. What the callback throws ends here: a log must not fail what it tells
  // of.
  template <typename... Parts>
  void write(qg_log_level level, const Parts&... parts) const noexcept {
    if (!callback_) return;
    try {
      callback_(context_, level, cat(parts...).c_str());
    } catch (...) {
    }
  }

 private:
  qg_log callback_ = nullptr;
  void* context_ = nullptr;
};

}  // namespace qg

#endif  // QGRAPH_SRC_LOG_H_
