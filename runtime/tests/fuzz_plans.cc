// Loads and runs every artifact of a corpus: nothing may crash, whatever a correctly signed file says. Their
// kernels return at once, so all that runs is the runtime. Meant to be built with sanitizers.
//
//   fuzz_plans corpus        a corpus is a sequence of (u64 size, bytes)
//
// Prints how many were refused, loaded, and ran, and how many copies of states were made.
#include <cctype>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "aligned_file.h"
#include "check.h"
#include "qgraph/qgraph.h"

namespace {

constexpr int64_t kMaxBytes = 1 << 20;  // of a bound tensor: larger ones are not tried

struct Counts {
  int refused = 0, loaded = 0, runs = 0, failed_runs = 0, copies = 0, failed_copies = 0;
};

// Zeros for a tensor of this shape; false if it is too large.
bool make_tensor(int32_t dtype, const std::vector<int64_t>& shape, std::vector<AlignedBytes>* memory,
                 qg_tensor* tensor) {
  int64_t bytes = static_cast<int64_t>(qg_dtype_size(dtype));
  for (int64_t size : shape) {
    if (size < 0 || size > kMaxBytes || (bytes *= size) > kMaxBytes) return false;
  }
  std::vector<uint8_t> zeros(static_cast<size_t>(bytes));
  memory->push_back(aligned_copy(zeros.data(), zeros.size()));
  *tensor = {memory->back().get(), dtype, static_cast<int32_t>(shape.size()), shape.data(), nullptr};
  return true;
}

// The name of the dim that counts the tokens of a state, or "".
std::string name_of_total(const qg_model* model) {
  for (size_t i = 0; i < qg_model_dim_count(model); ++i) {
    if (qg_model_dim_kind(model, i) == QG_DIM_TOTAL) return qg_model_dim(model, i, nullptr, nullptr);
  }
  return "";
}

// The size that an input's dimension has when every named one is `named`, and added to a state's length.
int64_t input_size(const qg_model* model, const qg_session* session, const char* text, int64_t named) {
  if (std::isdigit(static_cast<unsigned char>(text[0]))) return std::atoll(text);
  return text == name_of_total(model) ? qg_state_length(session) + named : named;
}

bool bind_all(qg_model* model, qg_session* session, int64_t named, std::vector<AlignedBytes>* memory) {
  for (size_t i = 0; i < qg_model_tensor_count(model, QG_INPUT); ++i) {
    std::vector<int64_t> shape;
    for (int32_t axis = 0; axis < qg_model_tensor_rank(model, QG_INPUT, i); ++axis) {
      const char* text = qg_model_tensor_dim(model, QG_INPUT, i, static_cast<size_t>(axis));
      shape.push_back(input_size(model, session, text, named));
    }
    qg_tensor tensor;
    if (!make_tensor(qg_model_tensor_dtype(model, QG_INPUT, i), shape, memory, &tensor)) return false;
    if (qg_bind_input(session, i, &tensor) != QG_OK) return false;
  }
  for (size_t i = 0; i < qg_model_tensor_count(model, QG_OUTPUT); ++i) {
    int32_t ndim = 0;
    int64_t dims[QG_MAX_RANK];
    if (qg_output_shape(session, i, &ndim, dims) != QG_OK) return false;
    std::vector<int64_t> shape(dims, dims + ndim);
    qg_tensor tensor;
    if (!make_tensor(qg_model_tensor_dtype(model, QG_OUTPUT, i), shape, memory, &tensor)) return false;
    if (qg_bind_output(session, i, &tensor) != QG_OK) return false;
  }
  return true;
}

// Into another session and back, with more rows, fewer, three, and all of these.
void copy_states(qg_session* session, qg_session* other, Counts* counts) {
  const int64_t rows[] = {0, 1, 1, 0};
  for (size_t count : {4, 2, 3, 0}) {
    qg_status status = qg_state_copy(other, session, count > 0 ? rows : nullptr, count);
    if (status == QG_OK) status = qg_state_copy(session, other, nullptr, 0);
    CHECK(status != QG_INTERNAL);
    ++(status == QG_OK ? counts->copies : counts->failed_copies);
  }
}

void run(qg_model* model, Counts* counts) {
  qg_session_options options = QG_SESSION_OPTIONS_INIT;
  options.threads = 2;
  options.memory_limit = 8 << 20;
  qg_session *session = nullptr, *other = nullptr;
  // A state may be too large whatever its rows are.
  qg_status created = qg_session_create(model, &options, &session);
  CHECK(created == QG_OK || created == QG_OUT_OF_MEMORY);
  if (created != QG_OK) return;
  CHECK(qg_session_create(model, &options, &other) == QG_OK);
  int64_t capacity = qg_state_capacity(session);
  for (int64_t named : {3, 1, 0, 7}) {
    std::vector<AlignedBytes> memory;
    CHECK(capacity == 0 || qg_state_truncate(session, 0) == QG_OK);
    for (int go_on = 0; go_on < (capacity == 0 ? 1 : 2); ++go_on) {
      int64_t length = qg_state_length(session);
      qg_set_dim(session, "logits", go_on);
      qg_status status = bind_all(model, session, named, &memory) ? qg_run(session) : QG_INVALID_ARGUMENT;
      CHECK(status != QG_INTERNAL);
      ++(status == QG_OK ? counts->runs : counts->failed_runs);
      CHECK(status == QG_OK || qg_state_length(session) == length);
      CHECK(qg_state_length(session) <= capacity);
      if (capacity > 0) copy_states(session, other, counts);
    }
  }
  qg_session_free(other);
  qg_session_free(session);
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 2);
  const std::vector<uint8_t> corpus = read_bytes(argv[1]);
  Counts counts;
  for (size_t position = 0; position < corpus.size();) {
    uint64_t size = 0;
    CHECK(corpus.size() - position >= sizeof(size));
    std::memcpy(&size, &corpus[position], sizeof(size));
    position += sizeof(size);
    CHECK(corpus.size() - position >= size);
    AlignedBytes data = aligned_copy(corpus.data() + position, size);
    position += size;
    qg_model* model = nullptr;
    qg_status status = qg_load_memory(data.get(), size, nullptr, &model);
    if (status == QG_OK) {
      ++counts.loaded;
      run(model, &counts);
    } else {
      CHECK(status == QG_INVALID_FILE || status == QG_UNSUPPORTED);
      ++counts.refused;
    }
    qg_model_free(model);
    if ((counts.loaded + counts.refused) % 8 != 0) continue;
    // Nobody signed any of it.
    const uint8_t key[QG_PUBLIC_KEY_SIZE] = {3};
    qg_load_options options = QG_LOAD_OPTIONS_INIT;
    options.public_key = key;
    status = qg_load_memory(data.get(), size, &options, &model);
    CHECK(status == QG_INVALID_FILE || status == QG_UNTRUSTED);
  }
  std::printf(
      "{\"refused\": %d, \"loaded\": %d, \"runs\": %d, \"failed_runs\": %d, \"copies\": %d, "
      "\"failed_copies\": %d}\n",
      counts.refused, counts.loaded, counts.runs, counts.failed_runs, counts.copies, counts.failed_copies);
}
