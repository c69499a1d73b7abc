// The C ABI of qgraph.h: turns exceptions into statuses and messages, and checks what a C caller can get
// wrong.
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <utility>

#include "dtype.h"
#include "error.h"
#include "model.h"
#include "qgraph/qgraph.h"
#include "session.h"

struct qg_model {
  std::shared_ptr<const qg::Model> impl;
};

struct qg_session {
  qg::Session impl;
};

namespace {

// A fixed buffer: reporting that memory ran out must not need memory. Longer messages are cut.
thread_local char last_error[1024];

qg_status report(const qg::Log& log, qg_status status, const char* message) noexcept {
  std::snprintf(last_error, sizeof(last_error), "%s", message);
  log.write(QG_LOG_ERROR, qg_status_name(status), ": ", message);
  return status;
}

// Runs `body`; no exception leaves.
template <typename Body>
qg_status guarded(const qg::Log& log, Body body) noexcept {
  try {
    body();
    return QG_OK;
  } catch (const qg::Error& e) {
    return report(log, e.status(), e.what());
  } catch (const std::bad_alloc& e) {
    return report(log, QG_OUT_OF_MEMORY, qg::out_of_memory_text(e));
  } catch (const std::system_error& e) {  // of std::thread
    return report(log, QG_OUT_OF_MEMORY, e.what());
  } catch (const std::exception& e) {
    return report(log, QG_INTERNAL, e.what());
  } catch (...) {
    return report(log, QG_INTERNAL, "unknown exception");
  }
}

void require(const void* pointer, const char* name) {
  if (!pointer) qg::fail(QG_INVALID_ARGUMENT, name, " is NULL");
}

// The caller's options, of which an older caller may have fewer members, over the defaults.
template <typename Options>
Options merged(const Options* options, Options defaults) {
  if (!options) return defaults;
  size_t size = options->struct_size;
  if (size < sizeof(size)) qg::fail(QG_INVALID_ARGUMENT, "struct_size of the options is not set");
  const char* bytes = reinterpret_cast<const char*>(options);
  for (size_t i = sizeof(defaults); i < size; ++i) {
    if (bytes[i] != 0) {
      qg::fail(QG_UNSUPPORTED, "the caller sets options that this library (", QG_VERSION, ") does not know");
    }
  }
  std::memcpy(&defaults, options, size < sizeof(defaults) ? size : sizeof(defaults));
  return defaults;
}

template <typename Load>
qg_status load(const qg_load_options* options, qg_model** model, Load load_model) noexcept {
  qg::Log log;
  return guarded(log, [&] {
    require(model, "model");
    *model = nullptr;
    qg_load_options merged_options = merged(options, qg_load_options QG_LOAD_OPTIONS_INIT);
    log = qg::Log(merged_options.log, merged_options.log_context);
    *model = new qg_model{load_model(merged_options)};
  });
}

// For functions of a session: its failures go to its log.
template <typename Body>
qg_status with(qg_session* session, Body body) noexcept {
  return guarded(session ? session->impl.log() : qg::Log(), [&] {
    require(session, "session");
    body(session->impl);
  });
}

// NULL only if memory ran out.
const qg::Devices* devices_or_null() noexcept {
  const qg::Devices* found = nullptr;
  guarded(qg::Log(), [&] { found = &qg::devices(); });
  return found;
}

const qg::Device* device_of(size_t index) noexcept {
  const qg::Devices* devices = devices_or_null();
  return devices && index < devices->list.size() ? devices->list[index] : nullptr;
}

const qg::Plan* plan_of(const qg_model* model) { return model ? &model->impl->plan() : nullptr; }

template <typename T>
const T* element(const std::vector<T>& items, size_t index) {
  return index < items.size() ? &items[index] : nullptr;
}

const std::vector<qg::Port>* ports_of(const qg_model* model, int32_t side) {
  const qg::Plan* plan = plan_of(model);
  if (!plan || (side != QG_INPUT && side != QG_OUTPUT)) return nullptr;
  return side == QG_INPUT ? &plan->inputs : &plan->outputs;
}

const qg::Port* port_of(const qg_model* model, int32_t side, size_t index) {
  const std::vector<qg::Port>* ports = ports_of(model, side);
  return ports ? element(*ports, index) : nullptr;
}

const qg::Variant* variant_of(const qg_model* model, size_t index) {
  return model ? element(model->impl->plan().variants, index) : nullptr;
}

const qg::Step* step_of(const qg_model* model, size_t index) {
  return model ? element(model->impl->plan().steps, index) : nullptr;
}

static_assert(static_cast<int32_t>(qg::Dim::Kind::kInput) == QG_DIM_INPUT &&
              static_cast<int32_t>(qg::Dim::Kind::kTotal) == QG_DIM_TOTAL &&
              static_cast<int32_t>(qg::Dim::Kind::kCapacity) == QG_DIM_CAPACITY &&
              static_cast<int32_t>(qg::Dim::Kind::kOption) == QG_DIM_OPTION);

}  // namespace

extern "C" {

const char* qg_version(void) { return QG_VERSION; }

int32_t qg_abi_version(void) { return QG_ABI_VERSION; }

const char* qg_last_error(void) { return last_error; }

const char* qg_status_name(int32_t status) {
  switch (status) {
    case QG_OK:
      return "ok";
    case QG_INVALID_ARGUMENT:
      return "invalid argument";
    case QG_INVALID_FILE:
      return "invalid file";
    case QG_UNSUPPORTED:
      return "unsupported";
    case QG_NOT_FOUND:
      return "not found";
    case QG_IO_ERROR:
      return "I/O error";
    case QG_OUT_OF_MEMORY:
      return "out of memory";
    case QG_BAD_DATA:
      return "bad data";
    case QG_INTERNAL:
      return "internal error";
    case QG_DEVICE_ERROR:
      return "device error";
    case QG_UNTRUSTED:
      return "untrusted";
  }
  return "unknown status";
}

const char* qg_dtype_name(int32_t dtype) { return qg::is_dtype(dtype) ? qg::kDTypes[dtype].name : nullptr; }

size_t qg_dtype_size(int32_t dtype) { return qg::is_dtype(dtype) ? qg::kDTypes[dtype].size : 0; }

qg_status qg_load(const char* path, const qg_load_options* options, qg_model** model) {
  return load(options, model, [&](const qg_load_options& merged_options) {
    require(path, "path");
    return qg::Model::from_file(path, merged_options);
  });
}

qg_status qg_load_memory(const void* data, size_t size, const qg_load_options* options, qg_model** model) {
  return load(options, model, [&](const qg_load_options& merged_options) {
    require(data, "data");
    return qg::Model::from_memory({sizeof(qg_static_model), data, size, nullptr, 0}, merged_options);
  });
}

qg_status qg_load_static(const qg_static_model* artifact, const qg_load_options* options, qg_model** model) {
  return load(options, model, [&](const qg_load_options& merged_options) {
    require(artifact, "artifact");
    const qg_static_model whole = merged(artifact, qg_static_model{});
    require(whole.data, "data");
    if (whole.code_count > 0) require(whole.code, "code");
    return qg::Model::from_memory(whole, merged_options);
  });
}

void qg_model_free(qg_model* model) { delete model; }

const char* qg_model_isa(const qg_model* model) {
  return model ? model->impl->variant().isa.c_str() : nullptr;
}

size_t qg_model_variant_count(const qg_model* model) { return model ? plan_of(model)->variants.size() : 0; }

const char* qg_model_variant_name(const qg_model* model, size_t index) {
  const qg::Variant* variant = variant_of(model, index);
  return variant ? variant->isa.c_str() : nullptr;
}

int qg_model_variant_supported(const qg_model* model, size_t index) {
  const qg::Variant* variant = variant_of(model, index);
  return variant && model->impl->supported(*variant) ? 1 : 0;
}

size_t qg_model_tensor_count(const qg_model* model, int32_t side) {
  const std::vector<qg::Port>* ports = ports_of(model, side);
  return ports ? ports->size() : 0;
}

const char* qg_model_tensor_name(const qg_model* model, int32_t side, size_t index) {
  const qg::Port* port = port_of(model, side, index);
  return port ? port->name.c_str() : nullptr;
}

int32_t qg_model_tensor_dtype(const qg_model* model, int32_t side, size_t index) {
  const qg::Port* port = port_of(model, side, index);
  return port ? plan_of(model)->values[port->value].dtype : -1;
}

int32_t qg_model_tensor_rank(const qg_model* model, int32_t side, size_t index) {
  const qg::Port* port = port_of(model, side, index);
  return port ? static_cast<int32_t>(port->dims.size()) : -1;
}

const char* qg_model_tensor_dim(const qg_model* model, int32_t side, size_t index, size_t axis) {
  const qg::Port* port = port_of(model, side, index);
  return port && axis < port->dims.size() ? port->dims[axis].c_str() : nullptr;
}

size_t qg_model_dim_count(const qg_model* model) { return model ? plan_of(model)->dims.size() : 0; }

const char* qg_model_dim(const qg_model* model, size_t index, int64_t* min, int64_t* max) {
  const qg::Dim* dim = model ? element(plan_of(model)->dims, index) : nullptr;
  if (!dim) return nullptr;
  if (min) *min = dim->min;
  if (max) *max = dim->max;
  return plan_of(model)->dim_names[index].c_str();
}

int32_t qg_model_dim_kind(const qg_model* model, size_t index) {
  const qg::Dim* dim = model ? element(plan_of(model)->dims, index) : nullptr;
  return dim ? static_cast<int32_t>(dim->kind) : -1;
}

const char* qg_model_metadata(const qg_model* model, const char* key) {
  const std::string* value = model && key ? model->impl->artifact().metadata(key) : nullptr;
  return value ? value->c_str() : nullptr;
}

size_t qg_model_metadata_count(const qg_model* model) {
  return model ? model->impl->artifact().metadata().size() : 0;
}

const char* qg_model_metadata_at(const qg_model* model, size_t index, const char** value) {
  const auto* pair = model ? element(model->impl->artifact().metadata(), index) : nullptr;
  if (!pair) return nullptr;
  if (value) *value = pair->second.c_str();
  return pair->first.c_str();
}

size_t qg_model_step_count(const qg_model* model) { return model ? plan_of(model)->steps.size() : 0; }

const char* qg_model_step_name(const qg_model* model, size_t index) {
  const qg::Step* step = step_of(model, index);
  return step ? step->name.c_str() : nullptr;
}

const char* qg_model_step_kernel(const qg_model* model, size_t index) {
  const qg::Step* step = step_of(model, index);
  return step ? plan_of(model)->kernels[step->kernel].c_str() : nullptr;
}

qg_status qg_session_create(qg_model* model, const qg_session_options* options, qg_session** session) {
  return guarded(model ? model->impl->log() : qg::Log(), [&] {
    require(session, "session");
    *session = nullptr;
    require(model, "model");
    qg_session_options o = merged(options, qg_session_options QG_SESSION_OPTIONS_INIT);
    *session = new qg_session{qg::Session(model->impl, o)};
  });
}

void qg_session_free(qg_session* session) { delete session; }

int32_t qg_session_threads(const qg_session* session) { return session ? session->impl.threads() : 0; }

uint64_t qg_session_memory(const qg_session* session) { return session ? session->impl.memory() : 0; }

qg_status qg_bind_input(qg_session* session, size_t index, const qg_tensor* tensor) {
  return with(session, [&](qg::Session& self) {
    require(tensor, "tensor");
    self.bind_input(index, *tensor);
  });
}

qg_status qg_output_shape(qg_session* session, size_t index, int32_t* ndim, int64_t* shape) {
  return with(session, [&](qg::Session& self) {
    require(ndim, "ndim");
    require(shape, "shape");
    self.output_shape(index, ndim, shape);
  });
}

qg_status qg_bind_output(qg_session* session, size_t index, const qg_tensor* tensor) {
  return with(session, [&](qg::Session& self) {
    require(tensor, "tensor");
    self.bind_output(index, *tensor);
  });
}

qg_status qg_set_dim(qg_session* session, const char* name, int64_t value) {
  return with(session, [&](qg::Session& self) {
    require(name, "name");
    self.set_dim(name, value);
  });
}

qg_status qg_run(qg_session* session) {
  return with(session, [&](qg::Session& self) { self.run(); });
}

int64_t qg_state_capacity(const qg_session* session) { return session ? session->impl.capacity() : 0; }

int64_t qg_state_length(const qg_session* session) { return session ? session->impl.length() : 0; }

qg_status qg_state_truncate(qg_session* session, int64_t length) {
  return with(session, [&](qg::Session& self) { self.truncate(length); });
}

qg_status qg_state_copy(qg_session* to, const qg_session* from, const int64_t* rows, size_t count) {
  return guarded(to ? to->impl.log() : qg::Log(), [&] {
    require(to, "to");
    require(from, "from");
    to->impl.copy_state(from->impl, rows, count);
  });
}

qg_status qg_session_profile(qg_session* session, int enabled) {
  return with(session, [&](qg::Session& self) { self.profile(enabled != 0); });
}

int64_t qg_session_step_time(const qg_session* session, size_t step) {
  return session ? session->impl.step_time(step) : -1;
}

size_t qg_device_count(void) {
  const qg::Devices* devices = devices_or_null();
  return devices ? devices->list.size() : 0;
}

const char* qg_device_name(size_t index) {
  const qg::Device* device = device_of(index);
  return device ? device->name().c_str() : nullptr;
}

const char* qg_device_description(size_t index) {
  const qg::Device* device = device_of(index);
  return device ? device->description().c_str() : nullptr;
}

const char* qg_device_problem(void) {
  const qg::Devices* devices = devices_or_null();
  return devices && !devices->problem.empty() ? devices->problem.c_str() : nullptr;
}

const char* qg_model_device(const qg_model* model) {
  return model ? model->impl->device().name().c_str() : nullptr;
}

void* qg_session_stream(const qg_session* session) { return session ? session->impl.stream() : nullptr; }

qg_status qg_session_wait(qg_session* session, void* stream) {
  return with(session, [&](qg::Session& self) { self.wait(stream); });
}

}  // extern "C"
