// What a host may bring: threads, memory, a log; and options of callers that are older or newer.
//
//   test_hooks toy.qg decoder.qg
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "aligned_file.h"
#include "check.h"
#include "qgraph/qgraph.h"
#include "qgraph/qgraph.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

bool failed(qg_status status, qg_status expected, const char* text) {
  if (status == expected && std::strstr(qg_last_error(), text)) return true;
  std::fprintf(stderr, "expected status %d and \"%s\", got %d and \"%s\"\n", expected, text, status,
               qg_last_error());
  return false;
}

// A run of the toy model on many blocks.
struct Toy {
  explicit Toy(const qgraph::Model& model, const qg_session_options& options) : session(model, options) {
    for (size_t i = 0; i < ids.size(); ++i) {
      ids[i] = static_cast<int64_t>(i * 7 % 10);
      mask[i] = 1e-39f * static_cast<float>(i) + static_cast<float>(i % 3);  // some are subnormal
    }
    session.bind_input(0, ids.data(), {kBatch, kLength});
    session.bind_input(1, mask.data(), {kBatch, kLength});
    pooled = session.make_output<float>(0);
    twice = session.make_output<float>(1);
    isa = session.make_output<int64_t>(2);
    sum = session.make_output<int64_t>(3);
  }
  bool same(const Toy& other) const {
    return std::memcmp(pooled.data(), other.pooled.data(), pooled.size() * sizeof(float)) == 0 &&
           twice == other.twice && sum == other.sum;
  }

  static constexpr int64_t kBatch = 16, kLength = 20;
  std::vector<int64_t> ids = std::vector<int64_t>(kBatch * kLength), isa, sum;
  std::vector<float> mask = std::vector<float>(kBatch * kLength), pooled, twice;
  qgraph::Session session;
};

qg_session_options defaults() { return QG_SESSION_OPTIONS_INIT; }

Toy expected(const qgraph::Model& model) {
  qg_session_options options = defaults();
  options.threads = 1;
  Toy toy(model, options);
  toy.session.run();
  return toy;
}

// ---- threads

using Pool = std::function<void(int32_t count, const std::function<void(int32_t)>& task)>;

void call_pool(void* context, int32_t count, qg_task task, void* data) {
  (*static_cast<Pool*>(context))(count, [&](int32_t index) { task(data, index); });
}

void flush_subnormals() {
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040);  // flush to zero, subnormals are zero
#endif
}

void test_host_threads(const qgraph::Model& model) {
  const Toy want = expected(model);
  std::atomic<int> calls{0}, most{0};
  const std::map<std::string, Pool> pools = {
      {"threads",
       [&](int32_t count, auto& task) {
         std::vector<std::thread> threads;
         for (int32_t i = 0; i < count; ++i) {
           threads.emplace_back([&, i] {
             flush_subnormals();  // the host's setting, which must not change a bit
             task(i);
           });
         }
         for (std::thread& thread : threads) thread.join();
       }},
      {"in turn",
       [&](int32_t count, auto& task) {
         for (int32_t i = count; i-- > 0;) task(i);
       }},
      {"busy", [&](int32_t, auto&) {}},
      {"half", [&](int32_t count, auto& task) { task(count / 2); }},
      {"wrong numbers",
       [&](int32_t count, auto& task) {
         for (int32_t index : {-1, count + 1000, INT32_MAX, INT32_MIN}) task(index);
       }},
  };
  for (const auto& [name, pool] : pools) {
    Pool counted = [&, &pool = pool](int32_t count, const std::function<void(int32_t)>& task) {
      ++calls;
      most = std::max(most.load(), count);
      pool(count, task);
    };
    qg_session_options options = defaults();
    options.threads = 3;
    options.parallel_for = call_pool;
    options.parallel_context = &counted;
    calls = most = 0;
    Toy toy(model, options);
    CHECK(qg_session_threads(toy.session.get()) == 3);
    for (int round = 0; round < 20; ++round) {
      std::fill(toy.pooled.begin(), toy.pooled.end(), -1.0f);
      toy.session.run();
      if (!toy.same(want)) {
        std::fprintf(stderr, "another result with pool '%s'\n", name.c_str());
        std::exit(1);
      }
    }
    CHECK(calls > 20 && most == 3);
  }
}

// A C++ host may throw; nothing of it gets through, and the session goes on.
void test_a_host_pool_that_throws(const qgraph::Model& model) {
  bool broken = true;
  Pool pool = [&](int32_t count, const std::function<void(int32_t)>& task) {
    if (broken) throw std::runtime_error("the pool is closed");
    for (int32_t i = 0; i < count; ++i) task(i);
  };
  qg_session_options options = defaults();
  options.threads = 2;
  options.parallel_for = call_pool;
  options.parallel_context = &pool;
  Toy toy(model, options);
  CHECK(failed(qg_run(toy.session.get()), QG_INTERNAL, "the pool is closed"));
  broken = false;
  toy.session.run();
  CHECK(toy.same(expected(model)));
}

// ---- memory

struct Heap {
  std::map<void*, size_t> blocks;
  uint64_t live = 0;
  size_t calls = 0, limit = SIZE_MAX, shift = 0;

  static void* allocate(void* context, size_t size, size_t alignment) {
    Heap& heap = *static_cast<Heap*>(context);
    ++heap.calls;
    CHECK(alignment == 64 && size > 0 && size % alignment == 0);
    if (heap.live + size > heap.limit) return nullptr;
    void* memory = nullptr;
    CHECK(posix_memalign(&memory, alignment, size + heap.shift) == 0);
    memory = static_cast<char*>(memory) + heap.shift;
    heap.blocks[memory] = size;
    heap.live += size;
    return memory;
  }
  static void deallocate(void* context, void* memory, size_t size) {
    Heap& heap = *static_cast<Heap*>(context);
    CHECK(heap.blocks.at(memory) == size);
    heap.blocks.erase(memory);
    heap.live -= size;
    std::free(static_cast<char*>(memory) - heap.shift);
  }
  qg_session_options options(int threads) {
    qg_session_options options = defaults();
    options.threads = threads;
    options.allocate = allocate;
    options.deallocate = deallocate;
    options.allocator_context = this;
    return options;
  }
};

void test_allocator(const qgraph::Model& model) {
  Heap heap;
  {
    Toy toy(model, heap.options(2));
    toy.session.run();
    CHECK(heap.live > 0 && heap.live == toy.session.memory());
    CHECK(toy.same(expected(model)));
    size_t calls = heap.calls;
    for (int i = 0; i < 10; ++i) toy.session.run();
    CHECK(heap.calls == calls);  // a warm run takes nothing

    heap.limit = heap.live;
    std::vector<int64_t> ids(64 * 64);
    std::vector<float> mask(64 * 64);
    toy.session.bind_input(0, ids.data(), {64, 64});
    toy.session.bind_input(1, mask.data(), {64, 64});
    const std::vector<float> pooled = toy.session.make_output<float>(0),
                             twice = toy.session.make_output<float>(1);
    CHECK(failed(qg_run(toy.session.get()), QG_OUT_OF_MEMORY, "out of memory"));
    heap.limit = SIZE_MAX;
    CHECK(qg_run(toy.session.get()) == QG_OK);
    CHECK(heap.live == toy.session.memory());
  }
  CHECK(heap.blocks.empty() && heap.live == 0);

  heap.shift = 8;
  {
    Toy toy(model, heap.options(1));
    CHECK(failed(qg_run(toy.session.get()), QG_INVALID_ARGUMENT, "not aligned to 64"));
  }
  CHECK(heap.blocks.empty());

  qg_session* session = nullptr;
  qg_session_options half = heap.options(1);
  half.deallocate = nullptr;
  CHECK(failed(qg_session_create(model.get(), &half, &session), QG_INVALID_ARGUMENT, "give both or neither"));
  CHECK(!session);
}

void test_allocator_of_a_state(const qgraph::Model& decoder) {
  Heap heap, other;
  {
    qgraph::Session a(decoder, heap.options(1)), b(decoder, other.options(1));
    std::vector<int64_t> ids{1, 2, 3, 4}, mask{1, 1, 1, 1};
    a.bind_input(0, ids.data(), {2, 2});
    a.bind_input(1, mask.data(), {2, 2});
    const std::vector<float> logits = a.make_output<float>(0);
    const std::vector<int64_t> history = a.make_output<int64_t>(1);
    a.run();
    CHECK(heap.live == a.memory());
    b.copy_state(a, {1, 0, 1});
    CHECK(b.length() == 2 && other.live == b.memory() && other.live > 0);
    b.copy_state(b, {0});
    a.copy_state(b);  // each from its own allocator
    CHECK(heap.live == a.memory() && other.live == b.memory());
  }
  CHECK(heap.blocks.empty() && other.blocks.empty());
}

// ---- log

struct Lines {
  std::mutex mutex;
  std::vector<std::pair<int32_t, std::string>> all;

  static void write(void* context, int32_t level, const char* message) {
    Lines& lines = *static_cast<Lines*>(context);
    std::lock_guard<std::mutex> lock(lines.mutex);
    lines.all.emplace_back(level, message);
  }
  bool has(int32_t level, const std::string& text) const {
    for (const auto& [l, message] : all) {
      if (l == level && message.find(text) != std::string::npos) return true;
    }
    return false;
  }
  qg_load_options options() {
    qg_load_options options = QG_LOAD_OPTIONS_INIT;
    options.log = write;
    options.log_context = this;
    return options;
  }
};

void test_log(const char* path) {
  Lines lines;
  const qg_load_options options = lines.options();
  qg_model* none = nullptr;
  CHECK(qg_load("/nonexistent.qg", &options, &none) == QG_NOT_FOUND);
  CHECK(lines.has(QG_LOG_ERROR, "not found: /nonexistent.qg: cannot open"));

  qgraph::Model model(path, options);
  CHECK(lines.has(QG_LOG_WARNING, "variant 'future' needs warp_drive"));
  CHECK(lines.has(QG_LOG_INFO, "variant '" + model.isa() + "'"));
  qg_session_options wrong = defaults();
  wrong.threads = -1;
  qg_session* session = nullptr;
  CHECK(qg_session_create(model.get(), &wrong, &session) == QG_INVALID_ARGUMENT);
  CHECK(lines.has(QG_LOG_ERROR, "invalid argument: threads is -1"));

  Toy toy(model, defaults());
  toy.session.run();
  CHECK(lines.has(QG_LOG_INFO, "memory: " + std::to_string(toy.session.memory()) + " bytes with batch=16"));
  size_t count = lines.all.size();
  for (int i = 0; i < 10; ++i) toy.session.run();
  CHECK(lines.all.size() == count);  // what is as it should be is not worth a word
  toy.ids[3] = 99;
  CHECK(qg_run(toy.session.get()) == QG_BAD_DATA);
  CHECK(lines.has(QG_LOG_ERROR, "bad data: step 'embed'"));
}

void test_a_log_that_throws(const char* path) {
  qg_load_options options = QG_LOAD_OPTIONS_INIT;
  options.log = [](void*, int32_t, const char*) { throw std::runtime_error("the disk is full"); };
  qgraph::Model model(path, options);
  Toy toy(model, defaults());
  toy.session.run();
  CHECK(failed(qg_state_truncate(toy.session.get(), 1), QG_INVALID_ARGUMENT, "has no state"));
}

void test_threads_of_the_check(const char* path) {
  qg_load_options options = QG_LOAD_OPTIONS_INIT;
  qg_model* model = nullptr;
  for (int32_t threads : {1, 2, 100}) {
    options.threads = threads;
    CHECK(qg_load(path, &options, &model) == QG_OK);
    qg_model_free(model);
  }
  options.threads = -1;
  CHECK(failed(qg_load(path, &options, &model), QG_INVALID_ARGUMENT, "threads is -1"));
}

void test_memory_of_the_caller(const char* path) {
  const std::vector<uint8_t> bytes = read_bytes(path);
  const AlignedBytes aligned = aligned_copy(bytes.data(), bytes.size());
  const qgraph::Model model = qgraph::Model::from_memory(aligned.get(), bytes.size());
  Toy toy(model, defaults());
  toy.session.run();
  CHECK(toy.same(expected(qgraph::Model(path))));
}

// ---- versions

template <typename Options>
struct Newer {
  Options known;
  int64_t added;
};

void test_a_newer_caller(const char* path) {
  CHECK(qg_abi_version() == QG_ABI_VERSION);
  Newer<qg_load_options> load = {QG_LOAD_OPTIONS_INIT, 0};
  load.known.struct_size = sizeof(load);
  qg_model* model = nullptr;
  CHECK(qg_load(path, &load.known, &model) == QG_OK);
  Newer<qg_session_options> options = {QG_SESSION_OPTIONS_INIT, 0};
  options.known.struct_size = sizeof(options);
  qg_session* session = nullptr;
  CHECK(qg_session_create(model, &options.known, &session) == QG_OK);
  qg_session_free(session);
  options.added = 1;
  CHECK(failed(qg_session_create(model, &options.known, &session), QG_UNSUPPORTED, "does not know"));
  qg_model_free(model);
  load.added = 1;
  CHECK(failed(qg_load(path, &load.known, &model), QG_UNSUPPORTED, "does not know"));
}

// Who was compiled before the hooks: what lies behind its struct is not looked at.
void test_an_older_caller(const qgraph::Model& model) {
  qg_session_options options = defaults();
  options.struct_size = offsetof(qg_session_options, parallel_for);
  std::memset(&options.parallel_for, 0xff, sizeof(options) - options.struct_size);
  qg_session* session = nullptr;
  CHECK(qg_session_create(model.get(), &options, &session) == QG_OK);
  qg_session_free(session);
}

void test_names(const qgraph::Model& model) {
  CHECK(model.input("mask") == 1 && model.output("sum") == 3);
  try {
    model.output("none");
    CHECK(false);
  } catch (const qgraph::Error& error) {
    CHECK(error.status() == QG_INVALID_ARGUMENT && std::strstr(error.what(), "has no output 'none'"));
  }
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 3);
  const qgraph::Model model(argv[1]);
  test_host_threads(model);
  test_a_host_pool_that_throws(model);
  test_allocator(model);
  test_allocator_of_a_state(qgraph::Model(argv[2]));
  test_log(argv[1]);
  test_a_log_that_throws(argv[1]);
  test_threads_of_the_check(argv[1]);
  test_memory_of_the_caller(argv[1]);
  test_a_newer_caller(argv[1]);
  test_an_older_caller(model);
  test_names(model);
}
