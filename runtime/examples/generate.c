/* Goes on with a text, token for token, by the C ABI alone: the likeliest token each time.
 *
 *   qgraph_generate model.qg COUNT ID [ID ...]      prints up to COUNT token ids
 *
 * Options, in front: --eos ID ends after this token, --capacity N tokens of room, --threads N, --device NAME
 * (cpu, cuda, cuda:1). For decoders compiled with their cache: inputs input_ids and, if the model has them,
 * attention_mask and position_ids; an output logits [1, positions, vocabulary]. Tokenizers are beyond the
 * runtime: ids come in, ids go out. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qgraph/qgraph.h"

/* Tokens of a prompt that one run reads, at most: memory for temporaries grows with them, speed hardly. */
#define AT_ONCE 256

static void fail(const char* what, const char* why) {
  fprintf(stderr, "qgraph_generate: %s%s%s\n", what, *why ? ": " : "", why);
  exit(EXIT_FAILURE);
}

static void check(qg_status status) {
  if (status != QG_OK) fail(qg_status_name(status), qg_last_error());
}

static int64_t parse(const char* text) {
  char* end;
  errno = 0;
  long long value = strtoll(text, &end, 10);
  if (errno != 0 || end == text || *end != '\0' || value < 0) fail(text, "not a number from 0 up");
  return value;
}

static void* allocate(size_t count, size_t size) {
  void* memory = calloc(count > 0 ? count : 1, size);
  if (!memory) fail("out of memory", "");
  return memory;
}

/* Binds [1, length] numbers. */
static void bind_input(qg_session* session, size_t index, int64_t* data, int64_t length) {
  int64_t shape[2] = {1, length};
  qg_tensor tensor = {data, QG_I64, 2, shape, NULL};
  check(qg_bind_input(session, index, &tensor));
}

/* The inputs of the next run: `count` tokens, which follow `length` earlier ones. The mask's ones and the
 * positions 0, 1, 2, ... are those of the whole text. */
static void bind_inputs(const qg_model* model, qg_session* session, int64_t* tokens, int64_t count,
                        int64_t* ones, int64_t* positions) {
  int64_t length = qg_state_length(session);
  for (size_t i = 0; i < qg_model_tensor_count(model, QG_INPUT); ++i) {
    const char* name = qg_model_tensor_name(model, QG_INPUT, i);
    if (strcmp(name, "input_ids") == 0) {
      bind_input(session, i, tokens, count);
    } else if (strcmp(name, "attention_mask") == 0) {
      bind_input(session, i, ones, length + count);
    } else if (strcmp(name, "position_ids") == 0) {
      bind_input(session, i, positions + length, count);
    } else {
      fail("an input that this program does not know", name);
    }
  }
}

/* Runs the model; the scores of the last position, in a buffer that grows with *size. */
static const float* run(const qg_model* model, qg_session* session, float** buffer, size_t* size,
                        int64_t* vocabulary) {
  int32_t ndim;
  int64_t shape[QG_MAX_RANK];
  if (qg_model_tensor_count(model, QG_OUTPUT) != 1 || qg_model_tensor_dtype(model, QG_OUTPUT, 0) != QG_F32) {
    fail("the model's output is not f32 logits alone", "");
  }
  check(qg_output_shape(session, 0, &ndim, shape));
  if (ndim != 3 || shape[0] != 1 || shape[1] < 1 || shape[2] < 1) {
    fail("the model's output is not [1, positions, vocabulary]", "");
  }
  size_t needed = (size_t)(shape[1] * shape[2]);
  if (needed > *size) {
    free(*buffer);
    *buffer = allocate(*size = needed, sizeof(float));
  }
  qg_tensor output = {*buffer, QG_F32, ndim, shape, NULL};
  check(qg_bind_output(session, 0, &output));
  check(qg_run(session));
  *vocabulary = shape[2];
  return *buffer + (shape[1] - 1) * shape[2];
}

/* Index of the greatest; the first of equals. */
static int64_t argmax(const float* scores, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; ++i) {
    if (scores[i] > scores[best]) best = i;
  }
  return best;
}

static int has_option(const qg_model* model, const char* name) {
  for (size_t i = 0; i < qg_model_dim_count(model); ++i) {
    if (qg_model_dim_kind(model, i) == QG_DIM_OPTION &&
        strcmp(qg_model_dim(model, i, NULL, NULL), name) == 0) {
      return 1;
    }
  }
  return 0;
}

int main(int argc, char** argv) {
  qg_load_options load = QG_LOAD_OPTIONS_INIT;
  qg_session_options options = QG_SESSION_OPTIONS_INIT;
  int64_t eos = -1;
  int at = 1;
  for (; at + 1 < argc && strncmp(argv[at], "--", 2) == 0; at += 2) {
    if (strcmp(argv[at], "--device") == 0) {
      load.device = argv[at + 1];
      continue;
    }
    int64_t value = parse(argv[at + 1]);
    if (strcmp(argv[at], "--eos") == 0) {
      eos = value;
    } else if (strcmp(argv[at], "--capacity") == 0) {
      options.capacity = value;
    } else if (strcmp(argv[at], "--threads") == 0) {
      options.threads = value > INT32_MAX ? INT32_MAX : (int32_t)value;
    } else {
      fail(argv[at], "an option that this program does not know");
    }
  }
  if (argc - at < 3) {
    fail(
        "usage: qgraph_generate [--eos ID] [--capacity N] [--threads N] [--device NAME] model.qg COUNT ID "
        "[ID ...]",
        "");
  }
  const char* path = argv[at++];
  int64_t count = parse(argv[at++]);
  int64_t prompt = argc - at;

  qg_model* model;
  qg_session* session;
  check(qg_load(path, &load, &model));
  check(qg_session_create(model, &options, &session));
  int64_t capacity = qg_state_capacity(session);
  if (capacity == 0) fail(path, "has no state: compile a decoder that was exported with its cache");
  if (prompt > capacity || count > capacity - prompt) {
    fail("prompt and COUNT together exceed the room for tokens", "give a larger --capacity");
  }
  if (has_option(model, "logits")) check(qg_set_dim(session, "logits", 1));

  size_t most = (size_t)(prompt + count);
  int64_t* tokens = allocate(most, sizeof(int64_t));
  int64_t* ones = allocate(most, sizeof(int64_t));
  int64_t* positions = allocate(most, sizeof(int64_t));
  for (int64_t i = 0; i < prompt; ++i) tokens[i] = parse(argv[at + i]);
  for (size_t i = 0; i < most; ++i) {
    ones[i] = 1;
    positions[i] = (int64_t)i;
  }
  float* buffer = NULL;
  size_t size = 0;
  int64_t read = 0; /* tokens that the session holds */
  for (int64_t length = prompt; length < prompt + count; ++length) {
    int64_t vocabulary = 0;
    const float* scores = NULL;
    while (read < length) {                             /* the prompt, then the token chosen last */
      int64_t runs = (length - read - 1) / AT_ONCE + 1; /* of equal parts: a token takes as long as some */
      int64_t part = (length - read - 1) / runs + 1;
      bind_inputs(model, session, tokens + read, part, ones, positions);
      scores = run(model, session, &buffer, &size, &vocabulary);
      read += part;
    }
    tokens[length] = argmax(scores, vocabulary);
    printf("%s%" PRId64, length == prompt ? "" : " ", tokens[length]);
    fflush(stdout);
    if (tokens[length] == eos) break;
  }
  printf("\n");
  free(buffer);
  free(positions);
  free(ones);
  free(tokens);
  qg_session_free(session);
  qg_model_free(model);
  return EXIT_SUCCESS;
}
