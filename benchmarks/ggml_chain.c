// A chain of linear layers by llama.cpp's libraries, for benchmarks/ggml_engine.py. Weights go where
// llama.cpp would put them: into the first of the CPU's special buffers (repacked, AMX) that takes their
// type, else into a plain one.
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

typedef struct {
  struct ggml_context *weights_context, *graph_context;
  ggml_backend_buffer_t buffer;
  ggml_backend_t backend;
  ggml_gallocr_t allocator;
  struct ggml_tensor **weights, *x, *y;
  struct ggml_cgraph* graph;
  int64_t inputs, outputs;
  int layers;
} chain;

static struct ggml_context* context(size_t tensors) {
  struct ggml_init_params params = {
      tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(tensors, false), NULL, true};
  return ggml_init(params);
}

static void quiet(enum ggml_log_level level, const char* text, void* data) {
  (void)level, (void)text, (void)data;
}

// The type's number, -1 if there is none of that name.
int find_type(const char* name) {
  ggml_log_set(quiet, NULL);
  for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
    const char* known = ggml_type_name(type);
    if (known && strcmp(known, name) == 0) return type;
  }
  return -1;
}

int64_t block_of(int type) { return ggml_blck_size(type); }
size_t row_bytes(int type, int64_t inputs) { return ggml_row_size(type, inputs); }

// Rounds [outputs, inputs] float32 to `target`, outputs * row_bytes bytes.
void round_weight(int type, const float* source, void* target, int64_t outputs, int64_t inputs) {
  ggml_quantize_chunk(type, source, target, 0, outputs, inputs, NULL);
}

static ggml_backend_buffer_type_t best_buffer(int type, int64_t inputs, int64_t outputs) {
  ggml_backend_reg_t registry = ggml_backend_cpu_reg();
  ggml_backend_dev_t device = ggml_backend_reg_dev_get(registry, 0);
  ggml_backend_dev_get_extra_bufts_t extra =
      (ggml_backend_dev_get_extra_bufts_t)ggml_backend_reg_get_proc_address(
          registry, "ggml_backend_dev_get_extra_bufts");
  for (ggml_backend_buffer_type_t* at = extra ? extra(device) : NULL; at && *at; ++at) {
    struct ggml_context* probe = context(8);
    struct ggml_tensor* weight = ggml_new_tensor_2d(probe, type, inputs, outputs);
    struct ggml_tensor* x = ggml_new_tensor_2d(probe, GGML_TYPE_F32, inputs, 512);
    struct ggml_tensor* y = ggml_mul_mat(probe, weight, x);
    weight->buffer = ggml_backend_buft_alloc_buffer(*at, 0);  // what llama.cpp asks with, too
    bool takes = ggml_backend_dev_supports_op(device, y);
    ggml_backend_buffer_free(weight->buffer);
    ggml_free(probe);
    if (takes) return *at;
  }
  return ggml_backend_cpu_buffer_type();
}

// `data` holds `layers` weights of outputs * row_bytes bytes. NULL without memory.
chain* open_chain(int type, int64_t inputs, int64_t outputs, int layers, int threads, const char* data) {
  chain* c = calloc(1, sizeof *c);
  c->inputs = inputs, c->outputs = outputs, c->layers = layers;
  c->weights_context = context(layers + 8);
  c->weights = calloc(layers, sizeof *c->weights);
  for (int i = 0; i < layers; ++i)
    c->weights[i] = ggml_new_tensor_2d(c->weights_context, type, inputs, outputs);
  c->buffer =
      ggml_backend_alloc_ctx_tensors_from_buft(c->weights_context, best_buffer(type, inputs, outputs));
  if (!c->buffer) return NULL;
  size_t size = outputs * ggml_row_size(type, inputs);
  for (int i = 0; i < layers; ++i) ggml_backend_tensor_set(c->weights[i], data + i * size, 0, size);
  c->backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(c->backend, threads);
  return c;
}

const char* buffer_name(chain* c) { return ggml_backend_buft_name(ggml_backend_buffer_get_type(c->buffer)); }

static void drop_graph(chain* c) {
  if (c->allocator) ggml_gallocr_free(c->allocator);
  if (c->graph_context) ggml_free(c->graph_context);
}

// Makes the graph for x [rows, inputs]; false without memory.
bool bind_rows(chain* c, int64_t rows, const float* x) {
  drop_graph(c);
  size_t nodes = 2 * c->layers + 8;
  c->graph_context = context(nodes);
  struct ggml_tensor* value = c->x = ggml_new_tensor_2d(c->graph_context, GGML_TYPE_F32, c->inputs, rows);
  ggml_set_input(c->x);
  for (int i = 0; i < c->layers; ++i) {
    if (i && c->outputs > c->inputs)
      value = ggml_view_2d(c->graph_context, value, c->inputs, rows, value->nb[1], 0);
    value = ggml_mul_mat(c->graph_context, c->weights[i], value);
  }
  c->y = value;
  ggml_set_output(c->y);
  c->graph = ggml_new_graph_custom(c->graph_context, nodes, false);
  ggml_build_forward_expand(c->graph, c->y);
  c->allocator = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
  if (!ggml_gallocr_alloc_graph(c->allocator, c->graph)) return false;
  ggml_backend_tensor_set(c->x, x, 0, rows * c->inputs * sizeof(float));
  return true;
}

bool run_chain(chain* c) { return ggml_backend_graph_compute(c->backend, c->graph) == GGML_STATUS_SUCCESS; }
void read_output(chain* c, float* y) { ggml_backend_tensor_get(c->y, y, 0, ggml_nbytes(c->y)); }

void close_chain(chain* c) {
  drop_graph(c);
  ggml_backend_free(c->backend);
  ggml_backend_buffer_free(c->buffer);
  ggml_free(c->weights_context);
  free(c->weights);
  free(c);
}
