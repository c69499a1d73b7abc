// RAII and exceptions over the C ABI of qgraph.h, header only, C++17. The C header documents what each call
// does.
#ifndef QGRAPH_QGRAPH_HPP_
#define QGRAPH_QGRAPH_HPP_

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "qgraph/qgraph.h"

namespace qgraph {

class Error : public std::runtime_error {
 public:
  Error(qg_status status, const char* message) : std::runtime_error(message), status_(status) {}
  qg_status status() const noexcept { return status_; }

 private:
  qg_status status_;
};

inline void check(qg_status status) {
  if (status != QG_OK) throw Error(status, qg_last_error());
}

template <typename T>
struct dtype_of;  // no definition: T has no dtype
template <>
struct dtype_of<float> {
  static constexpr qg_dtype value = QG_F32;
};
template <>
struct dtype_of<double> {
  static constexpr qg_dtype value = QG_F64;
};
template <>
struct dtype_of<std::int64_t> {
  static constexpr qg_dtype value = QG_I64;
};
template <>
struct dtype_of<std::int32_t> {
  static constexpr qg_dtype value = QG_I32;
};
template <>
struct dtype_of<std::int16_t> {
  static constexpr qg_dtype value = QG_I16;
};
template <>
struct dtype_of<std::int8_t> {
  static constexpr qg_dtype value = QG_I8;
};
template <>
struct dtype_of<std::uint8_t> {
  static constexpr qg_dtype value = QG_U8;
};
template <>
struct dtype_of<bool> {
  static constexpr qg_dtype value = QG_BOOL;
};

using PublicKey = std::array<std::uint8_t, QG_PUBLIC_KEY_SIZE>;

struct TensorInfo {
  std::string name;
  qg_dtype dtype;
  std::vector<std::string> dims;
};

class Model {
 public:
  // `device` is "cpu", "cuda", "cuda:1"; nullptr the CPU if the file has code for it, else the first GPU.
  explicit Model(const std::string& path, const char* isa = nullptr, const char* device = nullptr)
      : Model(path, with(isa, device)) {}
  Model(const std::string& path, const qg_load_options& options) {
    qg_model* raw = nullptr;
    check(qg_load(path.c_str(), &options, &raw));
    handle_.reset(raw);
  }
  // The artifact stays the caller's, and must outlive the model and its sessions.
  static Model from_memory(const void* data, std::size_t size,
                           const qg_load_options& options = with(nullptr, nullptr)) {
    Model model;
    qg_model* raw = nullptr;
    check(qg_load_memory(data, size, &options, &raw));
    model.handle_.reset(raw);
    return model;
  }
  // Refuses, with status QG_UNTRUSTED and before any of its code is loaded, what the owner of the key has not
  // signed.
  static Model from_signed(const std::string& path, const PublicKey& key,
                           qg_load_options options = with(nullptr, nullptr)) {
    options.public_key = key.data();
    return Model(path, options);
  }
  // One that is linked into the program: `qgraph compile --format static-lib`.
  explicit Model(const qg_static_model& artifact, const qg_load_options& options = with(nullptr, nullptr)) {
    qg_model* raw = nullptr;
    check(qg_load_static(&artifact, &options, &raw));
    handle_.reset(raw);
  }

  qg_model* get() const noexcept { return handle_.get(); }
  std::string isa() const { return qg_model_isa(get()); }
  std::string device() const { return qg_model_device(get()); }
  std::vector<TensorInfo> inputs() const { return tensors(QG_INPUT); }
  std::vector<TensorInfo> outputs() const { return tensors(QG_OUTPUT); }

  // Index of an input or output by its name.
  std::size_t input(const std::string& name) const { return index(QG_INPUT, name); }
  std::size_t output(const std::string& name) const { return index(QG_OUTPUT, name); }

  // Value of a metadata key, "" if the file has none.
  std::string metadata(const std::string& key) const {
    const char* value = qg_model_metadata(get(), key.c_str());
    return value ? value : "";
  }

 private:
  Model() = default;

  struct Free {
    void operator()(qg_model* model) const noexcept { qg_model_free(model); }
  };

  static qg_load_options with(const char* isa, const char* device) {
    qg_load_options options = QG_LOAD_OPTIONS_INIT;
    options.isa = isa;
    options.device = device;
    return options;
  }

  std::size_t index(qg_side side, const std::string& name) const {
    std::size_t count = qg_model_tensor_count(get(), side), i = 0;
    while (i < count && name != qg_model_tensor_name(get(), side, i)) ++i;
    if (i < count) return i;
    std::string message =
        (side == QG_INPUT ? "the model has no input '" : "the model has no output '") + name;
    throw Error(QG_INVALID_ARGUMENT, (message + "'").c_str());
  }

  std::vector<TensorInfo> tensors(qg_side side) const {
    std::vector<TensorInfo> result;
    for (std::size_t i = 0; i < qg_model_tensor_count(get(), side); ++i) {
      TensorInfo info{qg_model_tensor_name(get(), side, i),
                      static_cast<qg_dtype>(qg_model_tensor_dtype(get(), side, i)),
                      {}};
      for (std::int32_t axis = 0; axis < qg_model_tensor_rank(get(), side, i); ++axis) {
        info.dims.emplace_back(qg_model_tensor_dim(get(), side, i, static_cast<std::size_t>(axis)));
      }
      result.push_back(std::move(info));
    }
    return result;
  }

  std::unique_ptr<qg_model, Free> handle_;
};

class Session {
 public:
  explicit Session(const Model& model, int threads = 0, std::uint64_t memory_limit = 0,
                   std::int64_t capacity = 0)
      : Session(model, with(threads, memory_limit, capacity)) {}
  Session(const Model& model, const qg_session_options& options) {
    qg_session* raw = nullptr;
    check(qg_session_create(model.get(), &options, &raw));
    handle_.reset(raw);
  }

  qg_session* get() const noexcept { return handle_.get(); }

  // The data must stay alive until it is bound anew or the session is gone.
  void bind_input(std::size_t index, const void* data, qg_dtype dtype,
                  const std::vector<std::int64_t>& shape) {
    qg_tensor tensor = view(const_cast<void*>(data), dtype, shape);
    check(qg_bind_input(get(), index, &tensor));
  }
  template <typename T>
  void bind_input(std::size_t index, const T* data, const std::vector<std::int64_t>& shape) {
    bind_input(index, static_cast<const void*>(data), dtype_of<T>::value, shape);
  }

  void bind_output(std::size_t index, void* data, qg_dtype dtype, const std::vector<std::int64_t>& shape) {
    qg_tensor tensor = view(data, dtype, shape);
    check(qg_bind_output(get(), index, &tensor));
  }
  template <typename T>
  void bind_output(std::size_t index, T* data, const std::vector<std::int64_t>& shape) {
    bind_output(index, static_cast<void*>(data), dtype_of<T>::value, shape);
  }

  // Once all inputs are bound: memory of the right size for an output of the next run, bound to it. For a
  // later run with another shape bind anew.
  template <typename T>
  std::vector<T> make_output(std::size_t index) {
    const std::vector<std::int64_t> shape = output_shape(index);
    std::size_t size = 1;
    for (std::int64_t extent : shape) size *= static_cast<std::size_t>(extent);
    std::vector<T> data(size);
    bind_output(index, data.data(), shape);
    return data;
  }

  std::vector<std::int64_t> output_shape(std::size_t index) const {
    std::int64_t shape[QG_MAX_RANK];
    std::int32_t ndim = 0;
    check(qg_output_shape(get(), index, &ndim, shape));
    return std::vector<std::int64_t>(shape, shape + ndim);
  }

  void set_dim(const std::string& name, std::int64_t value) { check(qg_set_dim(get(), name.c_str(), value)); }

  void run() { check(qg_run(get())); }

  std::uint64_t memory() const noexcept { return qg_session_memory(get()); }
  std::int64_t capacity() const noexcept { return qg_state_capacity(get()); }
  std::int64_t length() const noexcept { return qg_state_length(get()); }
  void truncate(std::int64_t length) { check(qg_state_truncate(get(), length)); }
  void reset() { truncate(0); }
  void copy_state(const Session& from) { check(qg_state_copy(get(), from.get(), nullptr, 0)); }
  void copy_state(const Session& from, const std::vector<std::int64_t>& rows) {
    static const std::int64_t none = 0;  // an empty vector may have no data, and is not all rows
    check(qg_state_copy(get(), from.get(), rows.empty() ? &none : rows.data(), rows.size()));
  }

 private:
  struct Free {
    void operator()(qg_session* session) const noexcept { qg_session_free(session); }
  };

  static qg_session_options with(int threads, std::uint64_t memory_limit, std::int64_t capacity) {
    qg_session_options options = QG_SESSION_OPTIONS_INIT;
    options.threads = threads;
    options.memory_limit = memory_limit;
    options.capacity = capacity;
    return options;
  }

  static qg_tensor view(void* data, qg_dtype dtype, const std::vector<std::int64_t>& shape) {
    return qg_tensor{data, dtype, static_cast<std::int32_t>(shape.size()), shape.data(), nullptr};
  }

  std::unique_ptr<qg_session, Free> handle_;
};

}  // namespace qgraph

#endif  // QGRAPH_QGRAPH_HPP_
