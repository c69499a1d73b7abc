// The C ABI on the toy artifact: wrong calls, order of freeing, no allocation in a warm run.
//
//   test_session toy.qg
#include <atomic>
#include <cfenv>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "aligned_file.h"
#include "check.h"
#include "counting_allocator.h"
#include "qgraph/qgraph.h"
#include "qgraph/qgraph.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

constexpr int64_t kWidth = 8, kVocabulary = 10;

struct Toy {
  explicit Toy(int64_t batch, int64_t sequence) : batch(batch), sequence(sequence) {
    size_t size = static_cast<size_t>(batch * sequence);
    ids.resize(size);
    mask.resize(size);
    for (size_t i = 0; i < size; ++i) {
      ids[i] = static_cast<int64_t>(i * 7 % kVocabulary);
      mask[i] = static_cast<float>(i % 5) * 0.3f;
    }
    pooled.resize(static_cast<size_t>(batch * kWidth));
    twice.resize(2 * size);
  }
  void bind(qgraph::Session* session) {
    session->bind_input(0, ids.data(), {batch, sequence});
    session->bind_input(1, mask.data(), {batch, sequence});
    session->bind_output(0, pooled.data(), {batch, kWidth});
    session->bind_output(1, twice.data(), {2 * batch, sequence});
    session->bind_output(2, &isa, {1});
    session->bind_output(3, &sum, {});
  }
  int64_t batch, sequence;
  std::vector<int64_t> ids;
  std::vector<float> mask, pooled, twice;
  int64_t isa = -1, sum = -1;
};

bool failed(qg_status status, qg_status expected, const char* text) {
  if (status == expected && std::strstr(qg_last_error(), text)) return true;
  std::fprintf(stderr, "expected status %d and \"%s\", got %d and \"%s\"\n", expected, text, status,
               qg_last_error());
  return false;
}

void test_null_and_range(const char* path) {
  CHECK(std::string(qg_version()) == QG_VERSION);
  CHECK(std::string(qg_status_name(QG_BAD_DATA)) == "bad data");
  CHECK(std::string(qg_status_name(99)) == "unknown status");
  CHECK(std::string(qg_dtype_name(QG_BF16)) == "bf16" && qg_dtype_size(QG_BF16) == 2);
  CHECK(!qg_dtype_name(-1) && qg_dtype_size(10) == 0);
  qg_model* model = nullptr;
  CHECK(failed(qg_load(nullptr, nullptr, &model), QG_INVALID_ARGUMENT, "path is NULL"));
  CHECK(failed(qg_load(path, nullptr, nullptr), QG_INVALID_ARGUMENT, "model is NULL"));
  CHECK(
      failed(qg_load("/nonexistent/x.qg", nullptr, &model), QG_NOT_FOUND, "/nonexistent/x.qg: cannot open"));
  CHECK(failed(qg_load_memory(nullptr, 8, nullptr, &model), QG_INVALID_ARGUMENT, "data is NULL"));
  std::vector<uint8_t> bytes = read_bytes(path);
  bytes.insert(bytes.begin(), 1, 0);
  AlignedBytes shifted = aligned_copy(bytes.data(), bytes.size());
  CHECK(failed(qg_load_memory(shifted.get() + 1, bytes.size() - 1, nullptr, &model), QG_INVALID_ARGUMENT,
               "aligned"));
  qg_load_options empty = {};
  CHECK(failed(qg_load(path, &empty, &model), QG_INVALID_ARGUMENT, "struct_size"));
  empty.struct_size = sizeof(size_t);  // an older caller, without `isa`
  empty.isa = reinterpret_cast<const char*>(1);
  CHECK(qg_load(path, &empty, &model) == QG_OK);
  qg_model_free(model);

  CHECK(!qg_model_isa(nullptr) && qg_model_variant_count(nullptr) == 0 && !qg_model_variant_name(nullptr, 0));
  CHECK(qg_model_tensor_count(nullptr, QG_INPUT) == 0 && qg_model_tensor_rank(nullptr, QG_INPUT, 0) == -1);
  CHECK(!qg_model_metadata(nullptr, "x") && !qg_model_metadata_at(nullptr, 0, nullptr) &&
        qg_model_dim_count(nullptr) == 0);
  CHECK(qg_model_step_count(nullptr) == 0 && !qg_model_step_name(nullptr, 0) &&
        !qg_model_dim(nullptr, 0, nullptr, nullptr));
  qg_session* session = nullptr;
  CHECK(failed(qg_session_create(nullptr, nullptr, &session), QG_INVALID_ARGUMENT, "model is NULL"));
  CHECK(failed(qg_run(nullptr), QG_INVALID_ARGUMENT, "session is NULL"));
  CHECK(failed(qg_bind_input(nullptr, 0, nullptr), QG_INVALID_ARGUMENT, "session is NULL"));
  CHECK(qg_session_step_time(nullptr, 0) == -1 && qg_session_threads(nullptr) == 0 &&
        qg_session_memory(nullptr) == 0);
  qg_model_free(nullptr);
  qg_session_free(nullptr);

  CHECK(qg_load(path, nullptr, &model) == QG_OK);
  CHECK(qg_model_tensor_count(model, QG_INPUT) == 2 && qg_model_tensor_count(model, QG_OUTPUT) == 4);
  CHECK(qg_model_tensor_count(model, 2) == 0 && !qg_model_tensor_name(model, QG_INPUT, 2));
  CHECK(qg_model_tensor_dtype(model, QG_INPUT, 9) == -1 && !qg_model_tensor_dim(model, QG_INPUT, 0, 2));
  CHECK(std::string(qg_model_tensor_dim(model, QG_OUTPUT, 1, 0)) == "(2 * batch)");
  CHECK(!qg_model_variant_name(model, 3) && qg_model_variant_supported(model, 3) == 0);
  CHECK(std::string(qg_model_metadata(model, "qgraph.format")) == "1" &&
        !qg_model_metadata(model, "nothing"));
  CHECK(!qg_model_metadata(model, nullptr) && !qg_model_metadata_at(model, 999, nullptr));
  CHECK(!qg_model_step_name(model, 999) && !qg_model_step_kernel(model, 999));
  qg_model_free(model);
}

void test_bindings(const char* path) {
  qgraph::Model model(path);
  qgraph::Session session(model, 1);
  Toy toy(2, 3);
  auto input = [&](qg_tensor tensor) { return qg_bind_input(session.get(), 0, &tensor); };
  const int64_t shape[] = {2, 3}, strides[] = {3, 1}, transposed[] = {1, 2}, negative[] = {-1, 3},
                high[] = {2, 3, 1};
  const int64_t many[] = {INT64_MAX, INT64_MAX};
  int64_t* data = toy.ids.data();
  CHECK(failed(input({nullptr, QG_I64, 2, shape, nullptr}), QG_INVALID_ARGUMENT, "data is NULL"));
  CHECK(failed(input({data, QG_I64, 2, nullptr, nullptr}), QG_INVALID_ARGUMENT, "shape is NULL"));
  CHECK(failed(input({data, QG_I64, -1, shape, nullptr}), QG_INVALID_ARGUMENT, "ndim is -1"));
  CHECK(failed(input({data, QG_I64, 9, shape, nullptr}), QG_INVALID_ARGUMENT, "ndim is 9"));
  CHECK(failed(input({data, QG_I64, 3, high, nullptr}), QG_INVALID_ARGUMENT,
               "input 'ids': expected i64 [batch, sequence], got i64 [2, 3, 1]"));
  CHECK(failed(input({data, QG_I32, 2, shape, nullptr}), QG_INVALID_ARGUMENT, "got i32 [2, 3]"));
  CHECK(failed(input({data, 77, 2, shape, nullptr}), QG_INVALID_ARGUMENT, "got an unknown dtype [2, 3]"));
  CHECK(failed(input({data, QG_I64, 2, negative, nullptr}), QG_INVALID_ARGUMENT, "negative dimension"));
  CHECK(failed(input({data, QG_I64, 2, many, nullptr}), QG_INVALID_ARGUMENT, "more than 2^63 bytes"));
  CHECK(failed(input({data, QG_I64, 2, shape, transposed}), QG_INVALID_ARGUMENT, "not dense"));
  CHECK(failed(input({reinterpret_cast<char*>(data) + 1, QG_I64, 2, shape, nullptr}), QG_INVALID_ARGUMENT,
               "not aligned"));
  CHECK(failed(qg_bind_input(session.get(), 0, nullptr), QG_INVALID_ARGUMENT, "tensor is NULL"));
  qg_tensor good = {data, QG_I64, 2, shape, strides};
  CHECK(failed(qg_bind_input(session.get(), 2, &good), QG_INVALID_ARGUMENT,
               "input 2 does not exist: the model has 2"));
  CHECK(failed(qg_bind_output(session.get(), 4, &good), QG_INVALID_ARGUMENT,
               "output 4 does not exist: the model has 4"));
  CHECK(failed(qg_run(session.get()), QG_INVALID_ARGUMENT, "input 'ids' is not bound"));
  CHECK(input(good) == QG_OK);
  int32_t ndim = 0;
  int64_t out[QG_MAX_RANK];
  CHECK(failed(qg_output_shape(session.get(), 0, &ndim, out), QG_INVALID_ARGUMENT,
               "input 'mask' is not bound"));
  CHECK(
      failed(qg_output_shape(session.get(), 4, &ndim, out), QG_INVALID_ARGUMENT, "output 4 does not exist"));
  CHECK(failed(qg_output_shape(session.get(), 0, &ndim, nullptr), QG_INVALID_ARGUMENT, "shape is NULL"));
  session.bind_input(1, toy.mask.data(), {2, 3});
  CHECK((session.output_shape(1) == std::vector<int64_t>{4, 3}) && session.output_shape(3).empty());
  CHECK(failed(qg_run(session.get()), QG_INVALID_ARGUMENT, "output 'pooled' is not bound"));

  toy.bind(&session);
  session.run();
  CHECK(toy.sum >= 0);
  session.bind_output(0, toy.pooled.data(), {1, kWidth});
  CHECK(failed(qg_run(session.get()), QG_INVALID_ARGUMENT,
               "output 'pooled': expected f32 [2, 8], got f32 [1, 8]"));
  toy.bind(&session);
  session.bind_output(2, &toy.sum, {1});
  CHECK(failed(qg_run(session.get()), QG_INVALID_ARGUMENT, "output 'sum' overlaps output 'isa'"));
  toy.bind(&session);
  session.bind_output(2, &toy.ids[5], {1});
  CHECK(failed(qg_run(session.get()), QG_INVALID_ARGUMENT, "output 'isa' overlaps input 'ids'"));
  toy.bind(&session);
  session.run();
  toy.ids[3] = kVocabulary;
  CHECK(failed(qg_run(session.get()), QG_BAD_DATA, "step 'embed': an index is out of range"));
  toy.ids[3] = 0;
  session.run();
  try {
    session.bind_input(0, toy.mask.data(), {2, 3});
    CHECK(false);
  } catch (const qgraph::Error& e) {
    CHECK(e.status() == QG_INVALID_ARGUMENT && std::strstr(e.what(), "got f32 [2, 3]"));
  }
}

void test_no_allocation_when_warm(const char* path) {
  qgraph::Model model(path);
  for (int threads : {1, 3}) {
    qgraph::Session session(model, threads);
    Toy toy(4, 9), other(4, 9);
    toy.bind(&session);
    session.run();
    int64_t before = allocations;
    for (int i = 0; i < 100; ++i) session.run();
    const int64_t shape[] = {4, 9};
    for (int i = 0; i < 100; ++i) {  // other buffers of the same shape
      qg_tensor tensor = {(i % 2 == 0 ? other : toy).mask.data(), QG_F32, 2, shape, nullptr};
      CHECK(qg_bind_input(session.get(), 1, &tensor) == QG_OK);
      CHECK(qg_run(session.get()) == QG_OK);
    }
    CHECK(allocations == before);
  }
}

void test_memory_and_file_agree(const char* path) {
  std::vector<uint8_t> bytes = read_bytes(path);
  AlignedBytes copy = aligned_copy(bytes.data(), bytes.size());
  qg_model* raw = nullptr;
  CHECK(qg_load_memory(copy.get(), bytes.size(), nullptr, &raw) == QG_OK);
  qg_session* session = nullptr;
  CHECK(qg_session_create(raw, nullptr, &session) == QG_OK);
  qg_model_free(raw);  // the session keeps what it needs
  CHECK(qg_session_threads(session) >= 1);
  qg_session_free(session);

  Toy a(3, 5), b(3, 5);
  {
    auto model = std::make_unique<qgraph::Model>(path);
    qgraph::Session first(*model, 1), second(*model, 2);
    model.reset();
    a.bind(&first);
    b.bind(&second);
    first.run();
    second.run();
  }
  CHECK(a.pooled == b.pooled && a.twice == b.twice && a.sum == b.sum);
}

// Results must not depend on the host's rounding mode or flush-to-zero, and both must be as before
// afterwards.
void test_float_environment(const char* path) {
#if defined(__x86_64__)
  qgraph::Model model(path);
  Toy a(8, 16), b(8, 16);
  for (float& m : a.mask) m *= 1e-39f;  // subnormal products
  b.mask = a.mask;
  qgraph::Session session(model, 2);
  a.bind(&session);
  session.run();
  unsigned before = _mm_getcsr(), strange = before | 0x8040 | 0x6000;  // flush to zero, toward zero
  _mm_setcsr(strange);
  b.bind(&session);
  session.run();
  CHECK(_mm_getcsr() == strange);
  _mm_setcsr(before);
  CHECK(a.pooled == b.pooled && a.pooled[0] != 0.0f);
#else
  (void)path;
#endif
}

// Two threads in one session: one of them is refused, nothing breaks.
void test_shared_session_is_refused(const char* path) {
  qgraph::Model model(path);
  qgraph::Session session(model, 2);
  Toy toy(64, 64);
  toy.bind(&session);
  std::atomic<int> refused{0}, ran{0};
  auto work = [&] {
    for (int i = 0; i < 200; ++i) {
      qg_status status = qg_run(session.get());
      CHECK(status == QG_OK || failed(status, QG_INVALID_ARGUMENT, "in use by another thread"));
      ++(status == QG_OK ? ran : refused);
    }
  };
  std::thread other(work);
  work();
  other.join();
  CHECK(ran > 0 && ran + refused == 400);
}

void test_last_error_is_per_thread() {
  qg_model* model = nullptr;
  CHECK(qg_load(nullptr, nullptr, &model) != QG_OK);
  std::thread([] { CHECK(std::string(qg_last_error()).empty()); }).join();
  std::string long_path(5000, 'x');
  CHECK(qg_load(long_path.c_str(), nullptr, &model) == QG_IO_ERROR);
  CHECK(std::strlen(qg_last_error()) == 1023);
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 2);
  test_null_and_range(argv[1]);
  test_bindings(argv[1]);
  test_no_allocation_when_warm(argv[1]);
  test_memory_and_file_agree(argv[1]);
  test_float_environment(argv[1]);
  test_shared_session_is_refused(argv[1]);
  test_last_error_is_per_thread();
}
