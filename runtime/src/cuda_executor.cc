#include "cuda_executor.h"

#include <algorithm>
#include <cstring>

namespace qg::cuda {
namespace {

// Vector loads of kernels are at most this wide.
constexpr uintptr_t kTensorAlignment = 16;
// Larger pageable tensors are left to the driver, which has staging memory of its own.
constexpr int64_t kMaxStaged = int64_t{1} << 20;
// Graphs kept: for a prompt, for a token, and with or without something.
constexpr size_t kMaxGraphs = 4;
constexpr int64_t kMaxPitch = INT32_MAX;  // of a copy of rows

int64_t rounded(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }

}  // namespace

CudaExecutor::CudaExecutor(const CudaProgram& program)
    : program_(program),
      context_(program.context()),
      driver_(context_.driver()),
      stream_(context_),
      status_(context_),
      staging_(context_) {
  for (const Step& step : program.plan().steps) {
    has_status_ |= std::any_of(step.args.begin(), step.args.end(),
                               [](const Arg& arg) { return arg.kind == Arg::Kind::kStatus; });
  }
}

// A run that failed half-way may have left something on the stream that uses what is freed now.
CudaExecutor::~CudaExecutor() {
  context_.release([this](const Driver& driver) { driver.stream_synchronize(stream_.get()); });
}

// ---- memory

void CudaExecutor::copy(const std::vector<RowCopy>& copies) {
  PrimaryContext::Scope scope(context_);
  for (const RowCopy& rows : copies) {
    Copy2D copy{};
    copy.from_type = copy.to_type = kDeviceMemory;
    copy.from_device = reinterpret_cast<Address>(rows.from);
    copy.to_device = reinterpret_cast<Address>(rows.to);
    copy.width = static_cast<size_t>(rows.width);
    copy.from_pitch = static_cast<size_t>(rows.from_pitch);
    copy.to_pitch = static_cast<size_t>(rows.to_pitch);
    copy.height = static_cast<size_t>(rows.count);
    if (std::max(rows.from_pitch, rows.to_pitch) <= kMaxPitch) {
      check(driver_.copy_2d(&copy, stream_.get()), "cannot copy on ", context_.name());
      continue;
    }
    for (size_t i = 0; i < copy.height; ++i) {
      check(driver_.copy_on_device(copy.to_device + i * copy.to_pitch, copy.from_device + i * copy.from_pitch,
                                   copy.width, stream_.get()),
            "cannot copy on ", context_.name());
    }
  }
  check(driver_.stream_synchronize(stream_.get()), "cannot copy on ", context_.name());
}

int64_t CudaExecutor::needed() const {
  return has_status_ ? rounded(static_cast<int64_t>(program_.plan().steps.size() * sizeof(int32_t))) : 0;
}

void CudaExecutor::reserve() {
  if (held() == needed()) return;
  status_.reserve(static_cast<size_t>(needed()));
  clean_status_ = false;
}

int64_t CudaExecutor::status(size_t step) {
  return static_cast<int64_t>(status_.address() + step * sizeof(int32_t));
}

// ---- borders

Reach CudaExecutor::reach(const char* kind, const Port& port, const Binding& binding) {
  if (binding.bytes == 0) return Reach::kDirect;
  PrimaryContext::Scope scope(context_);
  auto address = reinterpret_cast<Address>(binding.data);
  unsigned type = 0;
  constexpr Result kUnknownPointer = 1;  // CUDA_ERROR_INVALID_VALUE: memory that the driver never saw
  Result result = driver_.pointer_attribute(&type, kMemoryType, address);
  if (result == kUnknownPointer) return Reach::kPageable;
  check(result, kind, " '", port.name, "': cannot tell where it lies");
  if (type != kDeviceMemory) return Reach::kPinned;
  Ordinal ordinal = -1;
  check(driver_.pointer_attribute(&ordinal, kDeviceOrdinal, address), kind, " '", port.name,
        "': cannot tell where it lies");
  if (ordinal != context_.ordinal()) {
    fail(QG_INVALID_ARGUMENT, kind, " '", port.name, "' is memory of cuda:", ordinal,
         ", but the model is on ", context_.name());
  }
  return address % kTensorAlignment == 0 ? Reach::kDirect : Reach::kUnaligned;
}

// Pinned memory for the statuses and for all small pageable tensors, with room for a longer state.
void CudaExecutor::lay_out_staging(const std::vector<Transfer>& inputs,
                                   const std::vector<Transfer>& outputs) {
  int64_t total = needed();
  staged_at_.clear();
  for (const std::vector<Transfer>* transfers : {&inputs, &outputs}) {
    for (const Transfer& transfer : *transfers) {
      bool staged = transfer.reach == Reach::kPageable && transfer.room <= kMaxStaged;
      staged_at_.push_back(staged ? total : -1);
      if (staged) total += rounded(transfer.room);
    }
  }
  staging_.reserve(static_cast<size_t>(total));
}

void CudaExecutor::upload(const std::vector<Transfer>& inputs) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Transfer& input = inputs[i];
    auto device = static_cast<Address>(input.device);
    auto bytes = static_cast<size_t>(input.bytes);
    if (input.reach == Reach::kUnaligned) {
      check(driver_.copy_on_device(device, reinterpret_cast<Address>(input.caller), bytes, stream_.get()),
            "cannot copy an input on ", context_.name());
      continue;
    }
    const void* source = input.caller;
    if (staged_at_[i] >= 0) {
      source = std::memcpy(staging_.data() + staged_at_[i], input.caller, bytes);
    }
    check(driver_.copy_to_device(device, source, bytes, stream_.get()), "cannot copy an input to ",
          context_.name());
  }
}

void CudaExecutor::download(const std::vector<Transfer>& outputs) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    const Transfer& output = outputs[i];
    auto device = static_cast<Address>(output.device);
    auto bytes = static_cast<size_t>(output.bytes);
    int64_t staged = staged_at_[staged_at_.size() - outputs.size() + i];
    if (output.reach == Reach::kUnaligned) {
      check(driver_.copy_on_device(reinterpret_cast<Address>(output.caller), device, bytes, stream_.get()),
            "cannot copy an output on ", context_.name());
      continue;
    }
    check(driver_.copy_to_host(staged >= 0 ? staging_.data() + staged : output.caller, device, bytes,
                               stream_.get()),
          "cannot copy an output from ", context_.name());
  }
}

// ---- running

void CudaExecutor::run(const StepTable& table, const std::vector<Transfer>& inputs,
                       const std::vector<Transfer>& outputs, std::vector<int64_t>* times) {
  PrimaryContext::Scope scope(context_);
  lay_out_staging(inputs, outputs);
  CudaGraph& graph = graph_for(table, times != nullptr);
  if (has_status_ && !clean_status_) {
    check(driver_.memset(status_.address(), 0, status_.size(), stream_.get()), "cannot write to ",
          context_.name());
  }
  clean_status_ = false;
  try {
    upload(inputs);
    graph.launch(stream_.get());
    download(outputs);
    if (has_status_) {
      check(driver_.copy_to_host(staging_.data(), status_.address(), status_.size(), stream_.get()),
            "cannot read from ", context_.name());
    }
  } catch (const Error&) {
    driver_.stream_synchronize(stream_.get());  // what has begun uses memory of the caller
    throw;
  }
  check(driver_.stream_synchronize(stream_.get()), "a run on ", context_.name(), " failed");
  check_statuses();
  clean_status_ = true;
  for (size_t i = 0; i < outputs.size(); ++i) {
    int64_t staged = staged_at_[inputs.size() + i];
    if (staged < 0) continue;
    std::memcpy(outputs[i].caller, staging_.data() + staged, static_cast<size_t>(outputs[i].bytes));
  }
  if (!times) return;
  std::fill(times->begin(), times->end(), 0);
  for (size_t n = 0; n < graph.steps().size(); ++n) {
    float milliseconds = 0;
    check(driver_.event_elapsed(&milliseconds, events_[n].get(), events_[n + 1].get()), "cannot time steps");
    (*times)[graph.steps()[n]] = static_cast<int64_t>(static_cast<double>(milliseconds) * 1e6);
  }
}

void CudaExecutor::check_statuses() {
  if (!has_status_) return;
  const std::vector<Step>& steps = program_.plan().steps;
  for (size_t i = 0; i < steps.size(); ++i) {
    int32_t status;
    std::memcpy(&status, staging_.data() + i * sizeof(status), sizeof(status));
    check_status(steps[i], status);
  }
}

// The graph for the table's steps, up to date and the first of graphs_.
CudaGraph& CudaExecutor::graph_for(const StepTable& table, bool timed) {
  while (timed && events_.size() <= table.blocks.size()) events_.emplace_back(context_, 0u);
  auto found = std::find_if(graphs_.begin(), graphs_.end(), [&](const std::unique_ptr<CudaGraph>& graph) {
    return graph->timed() == timed && graph->fits(table);
  });
  if (found == graphs_.end()) {
    if (graphs_.size() == kMaxGraphs) graphs_.pop_back();
    graphs_.insert(graphs_.begin(), std::make_unique<CudaGraph>(program_, table, timed ? &events_ : nullptr));
    return *graphs_.front();
  }
  std::rotate(graphs_.begin(), found, found + 1);
  try {
    graphs_.front()->update(table);
  } catch (const Error&) {
    graphs_.erase(graphs_.begin());
    throw;
  }
  return *graphs_.front();
}

void CudaExecutor::wait(void* stream) {
  PrimaryContext::Scope scope(context_);
  OwnEvent event(context_, kEventWithoutTiming);
  check(driver_.event_record(event.get(), static_cast<Stream>(stream)), "cannot wait for a stream");
  check(driver_.stream_wait(stream_.get(), event.get(), 0), "cannot wait for a stream");
}

}  // namespace qg::cuda
