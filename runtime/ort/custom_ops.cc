// libqgraph_ort.so: the low-bit operators of the domain `ai.qgraph` as custom operators of ONNX Runtime.
//
// `qgraph compile --export ort` writes a model whose low-bit nodes have two inputs: the node's own, and an
// artifact (FORMAT.md) as uint8 [bytes], with packed weights and code for that one product or lookup, of any
// number of rows:
//
//   QLinearNVFP4(x [.., K], artifact) -> y [.., N]      QGatherNVFP4(ids [..], artifact) -> y [.., H]
//
// An artifact is loaded when ONNX Runtime makes the kernel, from memory of ONNX Runtime. It runs on ONNX
// Runtime's threads.
#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"
#include "qgraph/qgraph.hpp"

namespace {

constexpr size_t kAlignment = 64;  // of artifacts in memory
// Of a run of a session, whose memory for activations in integers stays with the node: rows do not depend on
// each other.
constexpr int64_t kMostRows = 512;

// A status of ONNX Runtime on its way through C++ code.
struct Failure {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status) throw Failure{status};
}

// Runs `body`; what it throws becomes a status that names the node.
template <typename Body>
OrtStatus* guarded(const OrtApi* api, const std::string& node, Body body) noexcept {
  auto failed = [&](OrtErrorCode code, const char* what) {
    char message[1200];  // memory may be what is missing
    std::snprintf(message, sizeof(message), "qgraph: node '%s': %s", node.c_str(), what);
    return api->CreateStatus(code, message);
  };
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const qgraph::Error& error) {
    bool callers = error.status() == QG_INVALID_ARGUMENT || error.status() == QG_BAD_DATA;
    return failed(callers ? ORT_INVALID_ARGUMENT : ORT_FAIL, error.what());
  } catch (const std::exception& error) {
    return failed(ORT_FAIL, error.what());
  }
}

struct Shape {
  ONNXTensorElementDataType type;
  std::vector<int64_t> dims;
  size_t count;
};

Shape shape_of(const OrtApi* api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(api->GetTensorTypeAndShape(value, &raw));
  auto release = [api](OrtTensorTypeAndShapeInfo* info) { api->ReleaseTensorTypeAndShapeInfo(info); };
  std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> info(raw, release);
  Shape shape{};
  size_t rank = 0;
  check(api->GetTensorElementType(raw, &shape.type));
  check(api->GetDimensionsCount(raw, &rank));
  shape.dims.resize(rank);
  check(api->GetDimensions(raw, shape.dims.data(), rank));
  check(api->GetTensorShapeElementCount(raw, &shape.count));
  return shape;
}

qg_dtype dtype_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return QG_F32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return QG_I32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return QG_I64;
    default:
      throw qgraph::Error(QG_INVALID_ARGUMENT,
                          "the input has a data type that is none of float32, int32, int64");
  }
}

// What a run needs for itself: ONNX Runtime may run a kernel on several threads at once.
struct Worker {
  const OrtApi* api;
  const OrtKernelContext* context = nullptr;  // of the run under way
  std::unique_ptr<qgraph::Session> session;
};

// Lends ONNX Runtime's threads to a session.
void parallel_for(void* worker, int32_t count, qg_task task, void* data) {
  struct Call {
    qg_task task;
    void* data;
  } call{task, data};
  auto run = [](void* raw, size_t index) {
    const Call& what = *static_cast<const Call*>(raw);
    what.task(what.data, static_cast<int32_t>(index));
  };
  const Worker& on = *static_cast<const Worker*>(worker);
  OrtStatus* status =
      on.api->KernelContext_ParallelFor(on.context, run, static_cast<size_t>(count), 0, &call);
  if (status) on.api->ReleaseStatus(status);  // what nobody ran is done by the thread that runs the session
}

class Kernel {
 public:
  Kernel(const OrtApi* api, const OrtKernelInfo* info, std::string node) : api_(api), node_(std::move(node)) {
    int constant = 0;
    const OrtValue* value = nullptr;
    check(api->KernelInfoGetConstantInput_tensor(info, 1, &constant, &value));
    if (!constant || !value) {
      throw qgraph::Error(QG_INVALID_ARGUMENT, "its artifact, input 1, is not an initializer");
    }
    Shape shape = shape_of(api, value);
    if (shape.count == 0) throw qgraph::Error(QG_INVALID_ARGUMENT, "its artifact, input 1, is empty");
    void* data = nullptr;
    check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));  // a constant: only read
    model_ = std::make_unique<qgraph::Model>(load(data, shape.count));
    auto inputs = model_->inputs(), outputs = model_->outputs();
    if (inputs.size() != 1 || outputs.size() != 1) refuse_form();
    type_ = inputs[0].dtype;
    input_suffix_ = suffix(inputs[0]);
    output_suffix_ = suffix(outputs[0]);
  }

  const OrtApi* api() const { return api_; }
  const std::string& node() const { return node_; }

  void compute(OrtKernelContext* context) {
    const OrtValue* input = nullptr;
    check(api_->KernelContext_GetInput(context, 0, &input));
    Shape x = shape_of(api_, input);
    if (dtype_of(x.type) != type_) {
      throw qgraph::Error(QG_INVALID_ARGUMENT, "the input has not the data type that it was compiled for");
    }
    if (x.dims.size() < input_suffix_.size() ||
        !std::equal(input_suffix_.begin(), input_suffix_.end(), x.dims.end() - input_suffix_.size())) {
      throw qgraph::Error(QG_INVALID_ARGUMENT,
                          ("the last dimension of its input is not " + std::to_string(width())).c_str());
    }
    std::vector<int64_t> dims(x.dims.begin(), x.dims.end() - input_suffix_.size());
    int64_t rows = 1;
    for (int64_t dim : dims) rows *= dim;
    dims.insert(dims.end(), output_suffix_.begin(), output_suffix_.end());

    OrtValue* output = nullptr;
    void *from = nullptr, *to = nullptr;
    check(api_->KernelContext_GetOutput(context, 0, dims.data(), dims.size(), &output));
    if (rows == 0) return;
    check(api_->GetTensorMutableData(const_cast<OrtValue*>(input), &from));
    check(api_->GetTensorMutableData(output, &to));

    std::unique_ptr<Worker> worker = borrow();
    worker->context = context;
    const int64_t parts = (rows + kMostRows - 1) / kMostRows, most = (rows + parts - 1) / parts;
    for (int64_t done = 0; done < rows; done += most) {
      const int64_t some = std::min(most, rows - done);
      const auto* in = static_cast<const char*>(from) + done * bytes(input_suffix_, type_);
      auto* out = static_cast<char*>(to) + done * bytes(output_suffix_, QG_F32);
      worker->session->bind_input(0, in, type_, with(some, input_suffix_));
      worker->session->bind_output(0, out, QG_F32, with(some, output_suffix_));
      worker->session->run();
    }
    give_back(std::move(worker));  // one that failed is not used again
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  qgraph::Model load(const void* data, size_t size) {
    qg_load_options options = QG_LOAD_OPTIONS_INIT;
    options.device = "cpu";
    options.threads = 1;
    if (reinterpret_cast<uintptr_t>(data) % kAlignment != 0) {
      copy_.reset(std::aligned_alloc(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment));
      if (!copy_) throw std::bad_alloc();
      data = std::memcpy(copy_.get(), data, size);
    }
    return qgraph::Model::from_memory(data, size, options);
  }

  [[noreturn]] static void refuse_form() {
    throw qgraph::Error(QG_INVALID_ARGUMENT, "its artifact is a model of another form: export it anew");
  }

  // The dimensions behind the rows, which are numbers.
  static std::vector<int64_t> suffix(const qgraph::TensorInfo& tensor) {
    if (tensor.dims.empty()) refuse_form();
    std::vector<int64_t> dims;
    for (size_t i = 1; i < tensor.dims.size(); ++i) {
      const std::string& text = tensor.dims[i];
      int64_t dim = 0;
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), dim);
      if (error != std::errc() || end != text.data() + text.size()) refuse_form();
      dims.push_back(dim);
    }
    return dims;
  }

  static std::vector<int64_t> with(int64_t rows, const std::vector<int64_t>& suffix) {
    std::vector<int64_t> dims{rows};
    dims.insert(dims.end(), suffix.begin(), suffix.end());
    return dims;
  }

  // Of a row.
  static int64_t bytes(const std::vector<int64_t>& suffix, qg_dtype dtype) {
    auto size = static_cast<int64_t>(qg_dtype_size(dtype));
    for (int64_t dim : suffix) size *= dim;
    return size;
  }

  int64_t width() const { return input_suffix_.empty() ? 0 : input_suffix_.back(); }

  std::unique_ptr<Worker> borrow() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!idle_.empty()) {
        std::unique_ptr<Worker> worker = std::move(idle_.back());
        idle_.pop_back();
        return worker;
      }
    }
    auto worker = std::make_unique<Worker>();
    worker->api = api_;
    qg_session_options options = QG_SESSION_OPTIONS_INIT;
    options.parallel_for = parallel_for;
    options.parallel_context = worker.get();
    worker->session = std::make_unique<qgraph::Session>(*model_, options);
    return worker;
  }

  void give_back(std::unique_ptr<Worker> worker) {
    std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(worker));
  }

  const OrtApi* api_;
  std::string node_;
  std::unique_ptr<void, Free> copy_;  // of an artifact that does not lie as the runtime needs it
  std::unique_ptr<qgraph::Model> model_;
  qg_dtype type_ = QG_F32;
  std::vector<int64_t> input_suffix_, output_suffix_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> idle_;
};

// An operator: what ONNX Runtime asks of it are functions that are given this.
struct Operator : OrtCustomOp {
  const char* name = nullptr;
  ONNXTensorElementDataType input = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
};

std::string name_of(const OrtApi* api, const OrtKernelInfo* info) {
  std::string name(256, '\0');
  size_t size = name.size();
  if (OrtStatus* status = api->KernelInfo_GetNodeName(info, name.data(), &size)) {  // longer than that
    api->ReleaseStatus(status);
    return "?";
  }
  return name.c_str();
}

Operator describe(const char* name, ONNXTensorElementDataType input) {
  Operator op{};
  op.version = kOrtApiVersion;
  op.name = name;
  op.input = input;
  op.GetName = [](const OrtCustomOp* self) { return static_cast<const Operator*>(self)->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.GetInputType = [](const OrtCustomOp* self, size_t index) {
    return index == 0 ? static_cast<const Operator*>(self)->input : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputCharacteristic = op.GetInputCharacteristic;
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputMinArity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputHomogeneity = op.GetVariadicInputMinArity;
  op.GetStartVersion = op.GetVariadicInputMinArity;
  op.GetEndVersion = op.GetVariadicInputMinArity;
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info,
                         void** kernel) -> OrtStatus* {
    *kernel = nullptr;
    std::string node = name_of(api, info);
    return guarded(api, node, [&] { *kernel = new Kernel(api, info, node); });
  };
  op.KernelComputeV2 = [](void* raw, OrtKernelContext* context) -> OrtStatus* {
    Kernel& kernel = *static_cast<Kernel*>(raw);
    return guarded(kernel.api(), kernel.node(), [&] { kernel.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

constexpr ONNXTensorElementDataType kFloats = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr ONNXTensorElementDataType kIndices = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // of 32 or 64 bits

// The names of passes/lowbit_weights.py and lowbit_functions.py.
const std::array<Operator, 17>& operators() {
  static const std::array<Operator, 17> all{
      describe("QLinearNVFP4", kFloats),         describe("QLinearTernary", kFloats),
      describe("QLinearInt2", kFloats),          describe("QLinearInt3", kFloats),
      describe("QLinearInt4", kFloats),          describe("QLinearInt4Sym", kFloats),
      describe("QLinearInt8", kFloats),          describe("DynamicQDQNVFP4", kFloats),
      describe("DynamicQDQInt8", kFloats),       describe("QGatherNVFP4", kIndices),
      describe("QGatherColumnsNVFP4", kIndices), describe("QGatherColumnsTernary", kIndices),
      describe("QGatherColumnsInt2", kIndices),  describe("QGatherColumnsInt3", kIndices),
      describe("QGatherColumnsInt4", kIndices),  describe("QGatherColumnsInt4Sym", kIndices),
      describe("QGatherColumnsInt8", kIndices),
  };
  return all;
}

OrtStatus* make_domain(const OrtApi* api, OrtCustomOpDomain** domain) {
  if (OrtStatus* status = api->CreateCustomOpDomain("ai.qgraph", domain)) return status;
  for (const Operator& op : operators()) {
    if (OrtStatus* status = api->CustomOpDomain_Add(*domain, &op)) return status;
  }
  return nullptr;
}

}  // namespace

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (!api) {
    // Without an API there is no status to return, but every version has the first one's functions.
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "qgraph: this needs ONNX Runtime 1.17 or later");
  }
  // Sessions refer to a domain as long as they live, and nobody says how long: it is never released. One for
  // each ONNX Runtime that the process has.
  static std::mutex mutex;
  static std::map<const OrtApi*, OrtCustomOpDomain*> domains;
  std::lock_guard<std::mutex> lock(mutex);
  OrtCustomOpDomain*& domain = domains[api];
  if (!domain) {
    OrtCustomOpDomain* made = nullptr;
    if (OrtStatus* status = make_domain(api, &made)) return status;
    domain = made;
  }
  return api->AddCustomOpDomain(options, domain);
}
