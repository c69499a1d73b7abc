// State through the C ABI, on the toy decoder: runs that go on, truncate, copy, limits, no allocation by a
// step.
//
//   test_state decoder.qg
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "counting_allocator.h"
#include "qgraph/qgraph.h"
#include "qgraph/qgraph.hpp"

namespace {

constexpr int64_t kTokens = 16, kStateToken = 2 * 8 * 4 + 8;  // bytes a token and row
constexpr int64_t kRefused = 15;                              // a token that fails the last step

// Tokens of a text, by row and position.
int64_t token(int64_t row, int64_t position) { return (row * 5 + position * position + 3) % kRefused; }

// A session with buffers for `batch` rows and up to `most` tokens.
struct Decoder {
  Decoder(const qgraph::Model& model, int64_t batch, int64_t most, int64_t capacity = 0, uint64_t limit = 0,
          int threads = 1)
      : session(model, threads, limit, capacity),
        batch(batch),
        ids(static_cast<size_t>(batch * most)),
        mask(ids.size(), 1),
        history(ids.size()),
        logits(ids.size() * kTokens) {}

  void bind(int64_t count) {
    int64_t total = session.length() + count;
    session.bind_input(0, ids.data(), {batch, count});
    session.bind_input(1, mask.data(), {batch, total});
    session.bind_output(0, logits.data(), {batch, last == 0 ? count : last, kTokens});
    session.bind_output(1, history.data(), {batch, total});
  }
  // The next `count` tokens of each row's text, of rows [first, first + batch).
  void feed(int64_t count, int64_t first = 0) {
    fill(count, first);
    bind(count);
    session.run();
  }
  void fill(int64_t count, int64_t first = 0) {
    for (int64_t i = 0; i < batch * count; ++i) {
      ids[static_cast<size_t>(i)] = token(first + i / count, session.length() + i % count);
    }
  }
  void choose(int64_t positions) { session.set_dim("logits", last = positions); }
  // Whether row `row` holds the text of `text`, as the run before saw it.
  bool holds(int64_t row, int64_t text) const {
    for (int64_t i = 0, total = session.length(); i < total; ++i) {
      if (history[static_cast<size_t>(row * total + i)] != token(text, i)) return false;
    }
    return true;
  }

  qgraph::Session session;
  int64_t batch, last = 0;
  std::vector<int64_t> ids, mask, history;
  std::vector<float> logits;
};

template <typename F>
bool fails(F call, qg_status status, const char* text) {
  try {
    call();
  } catch (const qgraph::Error& e) {
    if (e.status() == status && std::strstr(e.what(), text)) return true;
    std::fprintf(stderr, "expected status %d and \"%s\", got %d and \"%s\"\n", status, text, e.status(),
                 e.what());
    return false;
  }
  std::fprintf(stderr, "expected \"%s\", got no error\n", text);
  return false;
}

void test_pieces_equal_the_whole(const qgraph::Model& model) {
  for (int64_t batch : {1, 3}) {
    Decoder whole(model, batch, 12), pieces(model, batch, 12);
    whole.feed(12);
    pieces.feed(5);
    for (int i = 0; i < 7; ++i) pieces.feed(1);
    CHECK(pieces.session.length() == 12 && pieces.history == whole.history);
    for (int64_t b = 0; b < batch; ++b) {
      CHECK(std::memcmp(&whole.logits[static_cast<size_t>((b * 12 + 11) * kTokens)],
                        &pieces.logits[static_cast<size_t>(b * kTokens)], kTokens * sizeof(float)) == 0);
      CHECK(whole.holds(b, b));
    }
  }
}

void test_option_dim(const qgraph::Model& model) {
  Decoder all(model, 2, 6), some(model, 2, 7);
  all.feed(6);
  some.choose(2);
  some.feed(6);
  for (size_t b = 0; b < 2; ++b) {
    CHECK(std::memcmp(&all.logits[(b * 6 + 4) * kTokens], &some.logits[b * 2 * kTokens],
                      2 * kTokens * sizeof(float)) == 0);
  }
  auto choose = [&](const char* name, int64_t size) {
    return [&some, name, size] { some.session.set_dim(name, size); };
  };
  CHECK(fails(choose("logits", 4097), QG_INVALID_ARGUMENT, "logits must lie in [1, 4096], got 4097"));
  CHECK(fails(choose("logits", -1), QG_INVALID_ARGUMENT, "got -1: or give 0 for its default"));
  for (const char* name : {"batch", "total_sequence", "x"}) {
    CHECK(fails(choose(name, 1), QG_INVALID_ARGUMENT, "is not a dimension to choose: the model has logits"));
  }
  CHECK(fails([&] { some.feed(1); }, QG_INVALID_ARGUMENT, "logits must be at most sequence with logits=2"));
  CHECK(some.session.length() == 6);
  some.choose(0);
  some.feed(1);
  CHECK(qg_set_dim(nullptr, "logits", 1) == QG_INVALID_ARGUMENT);
  CHECK(qg_set_dim(some.session.get(), nullptr, 1) == QG_INVALID_ARGUMENT);
}

void test_limits_and_failures(const qgraph::Model& model) {
  Decoder decoder(model, 2, 17);
  CHECK(decoder.session.capacity() == 16 && decoder.session.length() == 0 && decoder.session.memory() == 0);
  CHECK(fails([&] { decoder.feed(17); }, QG_INVALID_ARGUMENT,
              "holds 0 tokens and has room for 16, so 17 more do not fit: make a session with a larger"));
  decoder.feed(10);
  CHECK(fails([&] { decoder.feed(7); }, QG_INVALID_ARGUMENT,
              "the state holds 10 tokens and has room for 16, so 7 more do not fit: truncate or reset it, or "
              "make a session with a larger capacity"));
  CHECK(decoder.session.length() == 10);
  // A mask of another length; then a kernel that fails after the state was written.
  decoder.bind(1);
  decoder.session.bind_input(1, decoder.mask.data(), {2, 10});
  CHECK(fails([&] { decoder.session.run(); }, QG_INVALID_ARGUMENT,
              "input 'attention_mask' axis 1: expected total_sequence = 11 with"));
  decoder.fill(2);
  decoder.ids[0] = kRefused;
  decoder.bind(2);
  CHECK(fails([&] { decoder.session.run(); }, QG_BAD_DATA, "step 'refuse': the kernel reports status 7"));
  CHECK(decoder.session.length() == 10);
  decoder.feed(2);
  CHECK(decoder.session.length() == 12 && decoder.holds(0, 0) && decoder.holds(1, 1));

  for (int64_t length : {13, -1}) {
    CHECK(fails([&] { decoder.session.truncate(length); }, QG_INVALID_ARGUMENT, "tokens: it holds 12"));
  }
  decoder.session.truncate(4);
  decoder.feed(12);
  CHECK(decoder.session.length() == 16 && decoder.holds(0, 0) && decoder.holds(1, 1));
  CHECK(fails([&] { decoder.feed(1); }, QG_INVALID_ARGUMENT, "holds 16 tokens"));

  Decoder most(model, 1, 600, 600);  // the dim's own bound is below the capacity
  most.feed(500);
  CHECK(fails([&] { most.feed(13); }, QG_INVALID_ARGUMENT, "must lie in [1, 512]"));
  most.session.reset();
  most.feed(512);

  for (int64_t capacity : {int64_t{-1}, (int64_t{1} << 40) + 1}) {
    CHECK(fails([&] { qgraph::Session(model, 1, 0, capacity); }, QG_INVALID_ARGUMENT,
                "the model allows 1 to 1099511627776 tokens, or 0 for its default of 16"));
  }
}

void test_rows(const qgraph::Model& model) {
  Decoder three(model, 3, 8);
  three.feed(4);
  three.batch = 2;
  CHECK(fails([&] { three.feed(1); }, QG_INVALID_ARGUMENT,
              "the state holds 4 tokens of 3 rows, but the inputs have 2: reset the state first"));
  three.session.reset();
  three.feed(5);
  CHECK(three.holds(0, 0) && three.holds(1, 1));
  three.session.reset();
  three.batch = 3;  // more rows again
  three.feed(5);
  CHECK(three.holds(2, 2));

  // Rows follow the batch, too, when it is that of a refused run before, or of the last run before a copy.
  three.session.reset();
  three.batch = 2;
  three.bind(1);
  three.session.bind_input(1, three.mask.data(), {2, 2});
  CHECK(fails([&] { three.session.run(); }, QG_INVALID_ARGUMENT, "expected total_sequence = 1"));
  for (int i = 0; i < 3; ++i) three.feed(1);
  CHECK(three.holds(1, 1));
  Decoder one(model, 1, 8);
  for (int i = 0; i < 2; ++i) one.feed(1);
  one.session.copy_state(three.session);
  one.session.reset();
  for (int i = 0; i < 3; ++i) one.feed(1);
  CHECK(one.holds(0, 0));
}

void test_copy(const qgraph::Model& model) {
  Decoder source(model, 3, 16);
  source.feed(6);
  Decoder fork(model, 3, 16, 20);  // of another capacity, so another layout
  fork.session.copy_state(source.session);
  CHECK(fork.session.length() == 6);
  source.feed(2);
  fork.feed(3);
  for (int64_t row = 0; row < 3; ++row) CHECK(source.holds(row, row) && fork.holds(row, row));
  CHECK(source.session.length() == 8 && fork.session.length() == 9);

  // Rows in another order, more than there were, into a session that held other ones and into itself.
  Decoder beams(model, 4, 16);
  beams.feed(3, 7);
  for (Decoder* target : {&beams, &source}) {
    target->session.copy_state(source.session, {2, 0, 0, 1});
    Decoder view(model, 4, 16);
    view.session.copy_state(target->session);
    view.feed(1);
    const int64_t texts[] = {2, 0, 0, 1};
    for (int64_t row = 0; row < 4; ++row) {
      for (int64_t i = 0; i < 8; ++i) {
        CHECK(view.history[static_cast<size_t>(row * 9 + i)] == token(texts[row], i));
      }
    }
    if (target == &beams) CHECK(source.session.length() == 8);
  }
  source.batch = 1;
  source.session.copy_state(source.session, {3});
  CHECK(fails([&] { beams.session.copy_state(source.session, {0, 1}); }, QG_INVALID_ARGUMENT,
              "row 1 of a state of 1 does not exist"));
  CHECK(fails([&] { beams.session.copy_state(source.session, {-1}); }, QG_INVALID_ARGUMENT, "row -1"));
  CHECK(fails([&] { beams.session.copy_state(source.session, std::vector<int64_t>{}); }, QG_INVALID_ARGUMENT,
              "the number of rows to copy is 0"));
  CHECK(beams.session.length() == 8);
  Decoder small(model, 1, 7, 7), empty(model, 1, 7);
  CHECK(fails([&] { small.session.copy_state(source.session); }, QG_INVALID_ARGUMENT,
              "a state of 8 tokens does not fit a session with a capacity of 7"));
  small.feed(2);
  small.session.copy_state(empty.session);
  CHECK(small.session.length() == 0);
  qgraph::Session alone(model, 1);
  CHECK(qg_state_copy(alone.get(), nullptr, nullptr, 0) == QG_INVALID_ARGUMENT);
  CHECK(qg_state_copy(nullptr, alone.get(), nullptr, 0) == QG_INVALID_ARGUMENT);
  CHECK(qg_state_truncate(nullptr, 0) == QG_INVALID_ARGUMENT);
  CHECK(qg_state_length(nullptr) == 0 && qg_state_capacity(nullptr) == 0);
}

void test_models_are_told_apart(const qgraph::Model& model, const char* path) {
  qgraph::Model other(path);
  qgraph::Session a(model, 1), b(other, 1);
  CHECK(fails([&] { a.copy_state(b); }, QG_INVALID_ARGUMENT, "the sessions are of different models"));
}

void test_memory_limit(const qgraph::Model& model) {
  // The slots: hidden for what a run adds, weights for a full state. Then the two values of the state.
  auto round = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  auto arena = [&](int64_t rows, int64_t added) {
    return round(rows * added * kTokens * 4) + round(rows * 16 * 4);
  };
  auto state = [&](int64_t rows) { return round(rows * 16 * 64) + round(rows * 16 * 8); };
  CHECK(state(1) == 16 * kStateToken);
  const int64_t limit = arena(2, 4) + state(2);
  Decoder decoder(model, 2, 16, 0, static_cast<uint64_t>(limit));
  decoder.feed(4);
  CHECK(decoder.session.memory() == static_cast<uint64_t>(limit));
  CHECK(fails([&] { decoder.feed(5); }, QG_OUT_OF_MEMORY, "above the limit of"));
  CHECK(decoder.session.length() == 4);
  decoder.feed(3);
  CHECK(fails([&] { decoder.session.copy_state(decoder.session, {0, 1, 1, 0, 0}); }, QG_OUT_OF_MEMORY,
              "above the limit of"));
  CHECK(decoder.session.length() == 7);
  decoder.feed(3);
  CHECK(decoder.holds(0, 0) && decoder.holds(1, 1));
  // Memory of earlier shapes goes where it stands in the way: one row with a long prompt, then two rows.
  decoder.session.reset();
  decoder.batch = 1;
  decoder.feed(12);
  CHECK(decoder.session.memory() <= static_cast<uint64_t>(limit));
  decoder.session.reset();
  decoder.batch = 2;
  decoder.feed(4);
  CHECK(decoder.session.memory() <= static_cast<uint64_t>(limit) && decoder.holds(1, 1));
  // A copy with more rows, after which there is no room for the arena of before.
  decoder.session.copy_state(decoder.session, {1, 0});
  decoder.bind(1);
  decoder.session.run();
}

void test_steps_allocate_nothing(const qgraph::Model& model) {
  for (int threads : {1, 2}) {
    Decoder decoder(model, 2, 256, 256, 0, threads);
    decoder.choose(1);
    decoder.feed(7);
    decoder.feed(1);
    // Shapes in fixed arrays: those of the C++ face are vectors.
    int64_t ids[] = {2, 1}, mask[] = {2, 0}, logits[] = {2, 1, kTokens}, history[] = {2, 0};
    qg_tensor tensors[] = {{decoder.ids.data(), QG_I64, 2, ids, nullptr},
                           {decoder.mask.data(), QG_I64, 2, mask, nullptr},
                           {decoder.logits.data(), QG_F32, 3, logits, nullptr},
                           {decoder.history.data(), QG_I64, 2, history, nullptr}};
    qg_session* session = decoder.session.get();
    const int64_t before = allocations;
    const uint64_t memory = decoder.session.memory();
    constexpr int kSteps = 10000;
    for (int step = 0; step < kSteps; ++step) {
      if (qg_state_length(session) == 256) CHECK(qg_state_truncate(session, step % 100) == QG_OK);
      mask[1] = history[1] = qg_state_length(session) + 1;
      for (size_t i = 0; i < 2; ++i) CHECK(qg_bind_input(session, i, &tensors[i]) == QG_OK);
      int32_t ndim = 0;
      int64_t shape[QG_MAX_RANK];
      CHECK(qg_output_shape(session, 1, &ndim, shape) == QG_OK && shape[1] == history[1]);
      for (size_t i = 0; i < 2; ++i) CHECK(qg_bind_output(session, i, &tensors[2 + i]) == QG_OK);
      CHECK(qg_run(session) == QG_OK);
    }
    CHECK(allocations == before);
    CHECK(decoder.session.memory() == memory);
    // A prompt again, and a step: what grew once is enough.
    CHECK(qg_state_truncate(session, 0) == QG_OK);
    decoder.feed(7);
    decoder.feed(1);
    CHECK(decoder.session.memory() == memory);
  }
}

void test_an_older_caller(qg_model* model) {
  qg_session_options options = QG_SESSION_OPTIONS_INIT;
  options.capacity = -5;  // beyond what the caller says that it has
  options.struct_size = offsetof(qg_session_options, capacity);
  qg_session* session = nullptr;
  CHECK(qg_session_create(model, &options, &session) == QG_OK);
  CHECK(qg_state_capacity(session) == 16);
  qg_session_free(session);
}

void test_description(qg_model* model) {
  const int32_t kinds[] = {QG_DIM_OPTION, QG_DIM_INPUT, QG_DIM_INPUT, QG_DIM_TOTAL, QG_DIM_CAPACITY};
  CHECK(qg_model_dim_count(model) == 5);
  for (size_t i = 0; i < 5; ++i) CHECK(qg_model_dim_kind(model, i) == kinds[i]);
  CHECK(qg_model_dim_kind(model, 5) == -1 && qg_model_dim_kind(nullptr, 0) == -1);
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 2);
  qgraph::Model model(argv[1]);
  test_pieces_equal_the_whole(model);
  test_option_dim(model);
  test_limits_and_failures(model);
  test_rows(model);
  test_copy(model);
  test_models_are_told_apart(model, argv[1]);
  test_memory_limit(model);
  test_steps_allocate_nothing(model);
  test_an_older_caller(model.get());
  test_description(model.get());
}
