/* Pure C99: runs a model on token ids, with the log and the memory of the program.
 *
 *   qgraph_c model.qg ID [ID ...]
 *
 * Every input is [1, length] int64: the ids for `input_ids`, ones for `attention_mask`, else zeros. Prints
 * the shape and the first numbers of each f32 output. What the runtime has to say goes to stderr. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qgraph/qgraph.h"

static void fail(const char* what, const char* why) {
  fprintf(stderr, "qgraph_c: %s%s%s\n", what, *why ? ": " : "", why);
  exit(EXIT_FAILURE);
}

static void check(qg_status status) {
  if (status != QG_OK) fail(qg_status_name(status), qg_last_error());
}

static void log_line(void* context, int32_t level, const char* message) {
  static const char* const names[] = {"info", "warning", "error"};
  fprintf(context, "%s: %s\n", level >= 0 && level <= QG_LOG_ERROR ? names[level] : "?", message);
}

/* malloc with a head that keeps where the block begins. `alignment` is a power of two. */
static void* allocate(void* context, size_t size, size_t alignment) {
  size_t* live = context;
  unsigned char* block = malloc(size + alignment + sizeof(void*));
  if (!block) return NULL;
  uintptr_t address = (uintptr_t)(block + sizeof(void*)) + alignment - 1;
  unsigned char* memory = block + ((address & ~(uintptr_t)(alignment - 1)) - (uintptr_t)block);
  memcpy(memory - sizeof(void*), &block, sizeof(void*));
  *live += size;
  return memory;
}

static void deallocate(void* context, void* memory, size_t size) {
  size_t* live = context;
  void* block;
  memcpy(&block, (unsigned char*)memory - sizeof(void*), sizeof(void*));
  *live -= size;
  free(block);
}

static int64_t* numbers(int64_t count, int64_t value) {
  int64_t* data = malloc((size_t)count * sizeof(int64_t));
  if (!data) fail("out of memory", "");
  for (int64_t i = 0; i < count; ++i) data[i] = value;
  return data;
}

/* Binds memory of the right size to an f32 output; the caller frees it. */
static float* bind_output(const qg_model* model, qg_session* session, size_t index, int64_t* count) {
  int32_t ndim;
  int64_t shape[QG_MAX_RANK];
  check(qg_output_shape(session, index, &ndim, shape));
  const char* name = qg_model_tensor_name(model, QG_OUTPUT, index);
  if (qg_model_tensor_dtype(model, QG_OUTPUT, index) != QG_F32) fail(name, "this output is not f32");
  printf("%s [", name);
  *count = 1;
  for (int32_t axis = 0; axis < ndim; ++axis) {
    printf("%s%" PRId64, axis > 0 ? ", " : "", shape[axis]);
    *count *= shape[axis];
  }
  printf("]\n");
  float* data = malloc((size_t)*count * sizeof(float) + 1);
  if (!data) fail("out of memory", "");
  qg_tensor tensor = {data, QG_F32, ndim, shape, NULL};
  check(qg_bind_output(session, index, &tensor));
  return data;
}

int main(int argc, char** argv) {
  if (argc < 3) fail("usage: qgraph_c model.qg ID [ID ...]", "");
  int64_t length = argc - 2, shape[2] = {1, length};
  int64_t *ids = numbers(length, 0), *ones = numbers(length, 1), *zeros = numbers(length, 0);
  for (int64_t i = 0; i < length; ++i) ids[i] = strtoll(argv[i + 2], NULL, 10);

  size_t live = 0;
  qg_load_options load = QG_LOAD_OPTIONS_INIT;
  load.log = log_line;
  load.log_context = stderr;
  qg_session_options options = QG_SESSION_OPTIONS_INIT;
  options.allocate = allocate;
  options.deallocate = deallocate;
  options.allocator_context = &live;
  qg_model* model;
  qg_session* session;
  check(qg_load(argv[1], &load, &model));
  check(qg_session_create(model, &options, &session));

  for (size_t i = 0; i < qg_model_tensor_count(model, QG_INPUT); ++i) {
    const char* name = qg_model_tensor_name(model, QG_INPUT, i);
    int64_t* data = strcmp(name, "input_ids") == 0 ? ids : strcmp(name, "attention_mask") == 0 ? ones : zeros;
    qg_tensor tensor = {data, QG_I64, 2, shape, NULL};
    check(qg_bind_input(session, i, &tensor));
  }
  size_t outputs = qg_model_tensor_count(model, QG_OUTPUT);
  float** data = calloc(outputs + 1, sizeof(float*));
  int64_t* counts = numbers((int64_t)outputs + 1, 0);
  if (!data) fail("out of memory", "");
  for (size_t i = 0; i < outputs; ++i) data[i] = bind_output(model, session, i, &counts[i]);
  check(qg_run(session));
  for (size_t i = 0; i < outputs; ++i) {
    printf("%s:", qg_model_tensor_name(model, QG_OUTPUT, i));
    for (int64_t j = 0; j < counts[i] && j < 4; ++j) printf(" %.9g", data[i][j]);
    printf("\n");
    free(data[i]);
  }
  printf("%zu bytes while it ran, ", live);
  qg_session_free(session);
  qg_model_free(model);
  printf("%zu afterwards\n", live);
  free(data);
  free(counts);
  free(ids);
  free(ones);
  free(zeros);
  return EXIT_SUCCESS;
}
