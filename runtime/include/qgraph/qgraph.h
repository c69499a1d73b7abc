/* qgraph runtime: loads and runs compiled artifacts (.qg). C99, no dependency but the C and C++ libraries.
 *
 * A model is immutable and shared by any number of sessions. A session holds the buffers and threads of one
 * inference at a time: use one session per host thread. Handles may be freed in any order.
 *
 *   qg_model* model;
 *   qg_session* session;
 *   qg_load("model.qg", NULL, &model);
 *   qg_session_create(model, NULL, &session);
 *   qg_bind_input(session, 0, &ids);
 *   qg_output_shape(session, 0, &ndim, shape);     (the caller owns the output buffers)
 *   qg_bind_output(session, 0, &hidden);
 *   qg_run(session);
 *
 * A model may have a state, as the key-value cache of a decoder: its session holds the tokens of earlier
 * runs, and a run adds those of its inputs. So after a first run with a prompt each further run takes one
 * token:
 *
 *   qg_set_dim(session, "logits", 1);              (of the last position only)
 *   ... bind the prompt, bind the output, qg_run, choose a token ...
 *   while (...) { bind that token, bind the output, qg_run, choose the next }
 *   qg_state_truncate(session, 0);                 (begin another text)
 *
 * examples/generate.c is that loop in full.
 *
 * Every function that can fail returns a qg_status; on failure qg_last_error() of the same thread says what
 * was wrong, in one line. Functions that return a pointer give NULL for an index out of range or a NULL
 * handle. Strings are UTF-8 and live as long as their model handle.
 *
 * Models run on the CPU or on an NVIDIA GPU (qg_load_options.device): see "devices" at the end.
 *
 * An artifact carries native code. Its hashes detect damage, they do not make it trustworthy: loading an
 * artifact equals running a program. qg_load_options.public_key demands a signature. Do not change a file in
 * place while it is loaded: its weights are mapped, not copied.
 */
#ifndef QGRAPH_QGRAPH_H_
#define QGRAPH_QGRAPH_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QG_VERSION "0.1.0"

/* Number of the ABI, part of the shared library's name (libqgraph.so.1). Within one number functions, members
 * at the end of option structs and values of enums are only added, so a program runs with any library of its
 * number that is not older than the header it was compiled with. docs/sdk.md has the whole promise. */
#define QG_ABI_VERSION 1

/* Highest rank of a tensor. */
#define QG_MAX_RANK 8

/* Bytes of the public key that artifacts are signed for (`qgraph keygen`, `qgraph sign`). */
#define QG_PUBLIC_KEY_SIZE 32

/* Defined by whom compiles the runtime into a library of their own, to nothing: then that exports none of
 * it. */
#ifndef QG_API
#if defined(__GNUC__) || defined(__clang__)
#define QG_API __attribute__((visibility("default")))
#else
#define QG_API
#endif
#endif

typedef enum qg_status {
  QG_OK = 0,
  QG_INVALID_ARGUMENT = 1, /* a wrong call: NULL, index, dtype, shape, or inputs that do not fit together */
  QG_INVALID_FILE = 2,     /* damaged, truncated, or not an artifact */
  QG_UNSUPPORTED = 3,      /* intact, but for another format version, processor or operating system */
  QG_NOT_FOUND = 4,        /* no such file */
  QG_IO_ERROR = 5,         /* the operating system refused to open, read, map, or make code executable */
  QG_OUT_OF_MEMORY = 6,    /* no memory or threads left, or above the session's memory limit */
  QG_BAD_DATA = 7,         /* a kernel met input data it refuses, such as an index out of range */
  QG_INTERNAL = 8,         /* a defect of the runtime */
  QG_DEVICE_ERROR = 9,     /* the GPU or its driver failed */
  QG_UNTRUSTED = 10        /* not signed by the owner of qg_load_options.public_key */
} qg_status;

typedef enum qg_dtype {
  QG_F32 = 0,
  QG_F16 = 1,
  QG_BF16 = 2,
  QG_F64 = 3,
  QG_I64 = 4,
  QG_I32 = 5,
  QG_I16 = 6,
  QG_I8 = 7,
  QG_U8 = 8,
  QG_BOOL = 9 /* one byte, 0 or 1 */
} qg_dtype;

/* What gives a named dimension its size. */
typedef enum qg_dim_kind {
  QG_DIM_INPUT = 0,    /* the shapes of inputs */
  QG_DIM_TOTAL = 1,    /* tokens in the state after the run; an input that has this dimension must agree */
  QG_DIM_CAPACITY = 2, /* the session's capacity */
  QG_DIM_OPTION = 3    /* qg_set_dim, else a default that follows from the others */
} qg_dim_kind;

/* Which side of the model: selects inputs or outputs in the functions that describe both (their `side`). */
typedef enum qg_side { QG_INPUT = 0, QG_OUTPUT = 1 } qg_side;

typedef struct qg_model qg_model;
typedef struct qg_session qg_session;

/* A view of a tensor in memory of the caller. Dense, row-major; the data aligned to its element.
 * `strides`, in elements, may be NULL; strides that are not those of a dense tensor are refused, nothing is
 * copied. `data` may be NULL only if the tensor has no elements. */
typedef struct qg_tensor {
  void* data;
  int32_t dtype; /* qg_dtype */
  int32_t ndim;
  const int64_t* shape;
  const int64_t* strides;
} qg_tensor;

/* ---- errors and version ---- */

/* Version of the library, "major.minor.patch". */
QG_API const char* qg_version(void);
/* QG_ABI_VERSION of the library. */
QG_API int32_t qg_abi_version(void);
/* Message of the last failure on this thread, "" if there was none. Valid until the next failure on this
 * thread. */
QG_API const char* qg_last_error(void);
/* "invalid argument" and so on; "unknown status" for any other number. */
QG_API const char* qg_status_name(int32_t status);
/* "f32" and so on; NULL for any other number. */
QG_API const char* qg_dtype_name(int32_t dtype);
/* Bytes of an element; 0 for any other number. */
QG_API size_t qg_dtype_size(int32_t dtype);

/* ---- hooks: the log, threads and memory of the host ----
 *
 * All are called with the `context` that was given beside them, on threads that are inside a function of this
 * library or inside a qg_task, by several at once where several are. They must not call back into the model
 * or session that called them. */

typedef enum qg_log_level { QG_LOG_INFO = 0, QG_LOG_WARNING = 1, QG_LOG_ERROR = 2 } qg_log_level;

/* A line without its end, alive during the call: what was loaded (info), what is not as fast as it could be
 * (warning), every failure that a function returns (error). A run that succeeds with the memory it has says
 * nothing. */
typedef void (*qg_log)(void* context, int32_t level, const char* message);

typedef void (*qg_task)(void* data, int32_t index);
/* Calls task(data, index) for each index of [0, count), at most once each and on any threads, and returns
 * when all that were called have returned. What they wrote must be visible to the caller then. Tasks share
 * the work among themselves: they may run at the same time or one after another, and whatever is left, as
 * when the pool ran none of them, is done by the thread that called qg_run. */
typedef void (*qg_parallel_for)(void* context, int32_t count, qg_task task, void* data);

/* Memory of `size` bytes, a multiple of `alignment`, at an address that is one, too; NULL if there is none.
 */
typedef void* (*qg_allocate)(void* context, size_t size, size_t alignment);
/* Takes back what qg_allocate gave, with the size that was asked for. */
typedef void (*qg_deallocate)(void* context, void* memory, size_t size);

/* ---- models ---- */

/* `struct_size` is sizeof the struct the caller was compiled with; members beyond it take their defaults,
 * which are zero. A library that is older than its caller refuses members that it does not know, unless they
 * are zero: QG_UNSUPPORTED. So it is with all structs that begin like this. */
typedef struct qg_load_options {
  size_t struct_size;
  const char* isa;    /* NULL: the first variant that the device supports; else this one, or QG_UNSUPPORTED */
  const char* device; /* "cpu", "cuda" (the first GPU), "cuda:1"; NULL: the CPU if the file has code for it,
                         else the first GPU */
  qg_log log;         /* of the model and its sessions; NULL: none */
  void* log_context;
  int32_t threads; /* that verify a large artifact, the caller's included; 0: one a core, at most 16 */
  const uint8_t* public_key; /* QG_PUBLIC_KEY_SIZE bytes, of Ed25519: what is not signed by its owner is
                                QG_UNTRUSTED, which is found out before anything else of the file is looked at
                                than its length and the hash of its header. No key of anybody's, such as 32
                                zeros, is QG_INVALID_ARGUMENT. NULL: signed or not, by anybody */
} qg_load_options;

#define QG_LOAD_OPTIONS_INIT {sizeof(qg_load_options), NULL, NULL, NULL, NULL, 0, NULL}

/* Maps the file, verifies every byte of it, then parses the plan and maps the code; for a GPU it uploads code
 * and weights. `options` may be NULL.
 * On failure *model is NULL. */
QG_API qg_status qg_load(const char* path, const qg_load_options* options, qg_model** model);

/* The same for an artifact in memory, which is not copied: keep it alive and unchanged until the model and
 * all of its sessions are freed. `data` must be aligned to 64 bytes, as the kernels expect weights to be. */
QG_API qg_status qg_load_memory(const void* data, size_t size, const qg_load_options* options,
                                qg_model** model);

/* Code that is part of the program, in a section that may be executed: the image that the container would
 * call `qgraph.code.<isa>`, of that variant and any that share it. In WebAssembly, a table of its functions.
 */
typedef struct qg_static_code {
  const char* isa;
  const void* data;
  size_t size;
} qg_static_code;

/* An artifact that is part of the program, as `qgraph compile --format static-lib` makes it: the container
 * without its code for CPUs, and that code. The header beside the library declares it. */
typedef struct qg_static_model {
  size_t struct_size;
  const void* data; /* aligned to 64 bytes */
  size_t size;
  const qg_static_code* code;
  size_t code_count;
} qg_static_model;

/* Verifies all of it and copies nothing: needs no file system, and no memory that could be made executable.
 */
QG_API qg_status qg_load_static(const qg_static_model* artifact, const qg_load_options* options,
                                qg_model** model);

/* Releases the handle; sessions keep what they need. NULL is allowed. */
QG_API void qg_model_free(qg_model* model);

/* Name of the code variant in use, such as "x86-64-v3". */
QG_API const char* qg_model_isa(const qg_model* model);
/* All code variants for the model's device, in order of preference, and whether it can run them. */
QG_API size_t qg_model_variant_count(const qg_model* model);
QG_API const char* qg_model_variant_name(const qg_model* model, size_t index);
QG_API int qg_model_variant_supported(const qg_model* model, size_t index);

QG_API size_t qg_model_tensor_count(const qg_model* model, int32_t side);
QG_API const char* qg_model_tensor_name(const qg_model* model, int32_t side, size_t index);
/* A qg_dtype, or -1. */
QG_API int32_t qg_model_tensor_dtype(const qg_model* model, int32_t side, size_t index);
/* 0..QG_MAX_RANK, or -1. */
QG_API int32_t qg_model_tensor_rank(const qg_model* model, int32_t side, size_t index);
/* A dimension as text: "384", "batch" or an expression such as "(2 * sequence)". */
QG_API const char* qg_model_tensor_dim(const qg_model* model, int32_t side, size_t index, size_t axis);

/* Named dimensions and their inclusive bounds. Returns the name; `min` and `max` may be NULL. */
QG_API size_t qg_model_dim_count(const qg_model* model);
QG_API const char* qg_model_dim(const qg_model* model, size_t index, int64_t* min, int64_t* max);
/* A qg_dim_kind, or -1. A model has a state if one of its dimensions is a QG_DIM_TOTAL. */
QG_API int32_t qg_model_dim_kind(const qg_model* model, size_t index);

/* Value of a key of the file's metadata ("qgraph.version", "qgraph.scheme", ...), or NULL. */
QG_API const char* qg_model_metadata(const qg_model* model, const char* key);
QG_API size_t qg_model_metadata_count(const qg_model* model);
/* The pairs in the order of their keys. Returns the key; `value` may be NULL. */
QG_API const char* qg_model_metadata_at(const qg_model* model, size_t index, const char** value);

/* The steps of a run, in order: their names (of the graph's nodes) and their kernels. */
QG_API size_t qg_model_step_count(const qg_model* model);
QG_API const char* qg_model_step_name(const qg_model* model, size_t index);
QG_API const char* qg_model_step_kernel(const qg_model* model, size_t index);

/* ---- sessions ---- */

typedef struct qg_session_options {
  size_t struct_size;
  int32_t threads; /* the thread that calls qg_run included; 0: every core this process may use. On a GPU
                      of no effect */
  uint64_t memory_limit;        /* of temporaries, scratch memory and state, in bytes; 0: none. More is
                                   QG_OUT_OF_MEMORY */
  int64_t capacity;             /* tokens that the state has room for; 0: the model's default */
  qg_parallel_for parallel_for; /* NULL: `threads` - 1 threads of the session's own; else none of its own,
                                   and at most `threads` tasks at once. On a GPU of no effect */
  void* parallel_context;
  qg_allocate allocate;     /* of all that qg_session_memory counts; on a GPU of none of it, it is memory */
  qg_deallocate deallocate; /* of the GPU. NULL: aligned_alloc and free; else both of them */
  void* allocator_context;
} qg_session_options;

#define QG_SESSION_OPTIONS_INIT {sizeof(qg_session_options), 0, 0, 0, NULL, NULL, NULL, NULL, NULL}

/* `options` may be NULL. On failure *session is NULL. Results are bit-equal for any number of threads. */
QG_API qg_status qg_session_create(qg_model* model, const qg_session_options* options, qg_session** session);
/* NULL is allowed. Not while qg_run is under way. */
QG_API void qg_session_free(qg_session* session);

/* Number of threads in use. */
QG_API int32_t qg_session_threads(const qg_session* session);
/* Bytes now allocated for temporaries, scratch memory and state. */
QG_API uint64_t qg_session_memory(const qg_session* session);

/* The view's shape is copied, its data is not: keep the data alive until it is bound anew or the session is
 * freed. Inputs are only read. Bindings stay from run to run. Dtype, rank, fixed dimensions and the bounds of
 * named ones are checked here, whether inputs agree in their named dimensions when the shapes are first
 * needed. */
QG_API qg_status qg_bind_input(qg_session* session, size_t index, const qg_tensor* tensor);

/* Chooses the size of a dimension of kind QG_DIM_OPTION, for all runs from now on; 0 is its default. */
QG_API qg_status qg_set_dim(qg_session* session, const char* name, int64_t value);

/* Once all inputs are bound: an output's rank and shape in the next run. `shape` has room for QG_MAX_RANK. */
QG_API qg_status qg_output_shape(qg_session* session, size_t index, int32_t* ndim, int64_t* shape);

/* Dtype and rank are checked here, the shape by qg_run. Buffers of outputs must not overlap each other or an
 * input. */
QG_API qg_status qg_bind_output(qg_session* session, size_t index, const qg_tensor* tensor);

/* Runs the model. Allocates nothing while the shapes are those of the run before; the length of the state may
 * be another. After a failure the outputs hold nothing of use, and the session can be used again: its state
 * holds the tokens that it held before. */
QG_API qg_status qg_run(qg_session* session);

/* ---- state ---- */

/* Tokens that the state has room for; 0 for a model without a state. A run that would add more is
 * QG_INVALID_ARGUMENT. Memory for all of them is taken by the first run. */
QG_API int64_t qg_state_capacity(const qg_session* session);
/* Tokens that the state holds. */
QG_API int64_t qg_state_length(const qg_session* session);

/* Forgets all tokens but the first `length`; 0 empties the state. While it holds tokens it has a fixed number
 * of rows, the batch of the run that began it: a run of another batch is QG_INVALID_ARGUMENT. */
QG_API qg_status qg_state_truncate(qg_session* session, int64_t length);

/* Copies the tokens that `from` holds, so that both go on from there independently. `rows` NULL: all rows.
 * Else the state of `to` has `count` rows then, row i that of rows[i] in `from`: to try several
 * continuations, or to drop a text that has ended. `to` may be `from`. Both are sessions of one model handle;
 * their capacities may differ. Copying an empty state empties `to`. On failure `to` is as before. */
QG_API qg_status qg_state_copy(qg_session* to, const qg_session* from, const int64_t* rows, size_t count);

/* ---- timing ---- */

/* Switches the timing of steps on or off (off at first). */
QG_API qg_status qg_session_profile(qg_session* session, int enabled);
/* Nanoseconds that a step took in the last run with timing on, or -1. */
QG_API int64_t qg_session_step_time(const qg_session* session, size_t step);

/* ---- devices ---- */

/* What models can be loaded on: the CPU, which is the first, and the GPUs that the NVIDIA driver shows. The
 * driver (libcuda.so.1, of CUDA 11.4 or later) is looked for when a model or one of these functions first
 * asks for it, never before, and need not be there. Once it has been found, a fork()ed child cannot use GPUs.
 */
QG_API size_t qg_device_count(void);
/* "cpu", "cuda:0": what qg_load_options.device takes. */
QG_API const char* qg_device_name(size_t index);
/* "NVIDIA H200, compute capability 9.0, 140 GiB", or the CPU's features. */
QG_API const char* qg_device_description(size_t index);
/* Why there is no GPU among them, in one line; NULL if there is one. */
QG_API const char* qg_device_problem(void);

/* Name of the device that the model was loaded on. */
QG_API const char* qg_model_device(const qg_model* model);

/* On a GPU, a model's weights, temporaries and state are in its memory, and so is what its sessions' limits
 * and sizes of memory count; inputs and outputs in memory of the host are copied by qg_run. A tensor that is
 * bound may itself be memory of that GPU: then kernels read or write it where it is. It must be ready when
 * qg_run is called, or the session must wait for the stream that makes it so. When qg_run returns, all is
 * done. */

/* The session's CUstream; NULL on the CPU. */
QG_API void* qg_session_stream(const qg_session* session);
/* Lets the session's work from now on wait for what `stream`, a CUstream of any kind, has been given so far.
 */
QG_API qg_status qg_session_wait(qg_session* session, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* QGRAPH_QGRAPH_H_ */
