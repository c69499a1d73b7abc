"""What a machine can do at most, measured: how fast it reads memory, multiplies and adds. And what it is.

The limits are small C loops, compiled for this machine when they are needed: C and not numpy, so that nothing
but the memory or the arithmetic units is in the way.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compiled import compile_c

DEFAULT_CACHE = 64 << 20  # bytes, where the machine does not say
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-pthread")

# `read_all`: each thread has its part, and reads it as STREAMS streams, for a core's prefetchers follow
# several at once. `fma`, `dot_*`: enough independent chains that latency hides, few enough for registers.
SOURCE = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX512F__)
enum { WIDTH = 64, CHAINS = 12 };
#elif defined(__AVX__)
enum { WIDTH = 32, CHAINS = 10 };
#else
enum { WIDTH = 16, CHAINS = 12 };
#endif
enum { STREAMS = 4, MAX_THREADS = 256 };
typedef int64_t ints __attribute__((vector_size(WIDTH)));
typedef float floats __attribute__((vector_size(WIDTH)));

typedef struct { const char* data; size_t bytes; int64_t n; double result; } part;

static void* read_part(void* p) {
  part* own = p;
  size_t each = own->bytes / STREAMS / sizeof(ints);
  const ints* s = (const ints*)own->data;
  ints a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t i = 0; i < each; ++i) {
    a ^= s[i]; b ^= s[each + i]; c ^= s[2 * each + i]; d ^= s[3 * each + i];
  }
  a ^= b ^ c ^ d;
  own->result = (double)a[0];
  return 0;
}

static void* fma_part(void* p) {
  part* own = p;
  floats x[CHAINS], m = {0}, t = {0};
  m += 0.5f + (float)own->bytes; t += 0.25f;
  for (int j = 0; j < CHAINS; ++j) x[j] = t + (float)j;
  for (int64_t i = 0; i < own->n; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < CHAINS; ++j) x[j] = x[j] * m + t;
  for (int j = 1; j < CHAINS; ++j) x[0] += x[j];
  own->result = x[0][0];
  return 0;
}

#if defined(__AVX512VNNI__)
static void* dot_int8_part(void* p) {
  part* own = p;
  __m512i x[CHAINS], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(1 + (int)own->bytes);
  for (int j = 0; j < CHAINS; ++j) x[j] = _mm512_set1_epi32(j);
  for (int64_t i = 0; i < own->n; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < CHAINS; ++j) x[j] = _mm512_dpbusd_epi32(x[j], a, b);
  for (int j = 1; j < CHAINS; ++j) x[0] = _mm512_add_epi32(x[0], x[j]);
  own->result = _mm512_reduce_add_epi32(x[0]);
  return 0;
}
#endif

#if defined(__AVX512BF16__)
static void* dot_bf16_part(void* p) {
  part* own = p;
  __m512 x[CHAINS];
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00), b = (__m512bh)_mm512_set1_epi16(0x3f00 + (int)own->bytes);
  for (int j = 0; j < CHAINS; ++j) x[j] = _mm512_set1_ps(j);
  for (int64_t i = 0; i < own->n; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < CHAINS; ++j) x[j] = _mm512_dpbf16_ps(x[j], a, b);
  for (int j = 1; j < CHAINS; ++j) x[0] = _mm512_add_ps(x[0], x[j]);
  own->result = _mm512_reduce_add_ps(x[0]);
  return 0;
}
#endif

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
/* Tiles whose sums are 16 x 16: four of them, as many chains as kernels have. */
static int tiles_allowed(void) { /* ARCH_REQ_XCOMP_PERM, XTILEDATA */
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

static void tiles_begin(void) {
  /* Constant: GCC takes it that only a few bytes of it are read, and drops stores to the others. */
  static const uint8_t config[64] __attribute__((aligned(64))) = {
      1, [16] = 64, [18] = 64, [20] = 64, [22] = 64, [24] = 64, [26] = 64, /* bytes of a row */
      [48] = 16, [49] = 16, [50] = 16, [51] = 16, [52] = 16, [53] = 16};  /* rows */
  _tile_loadconfig(config);
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); _tile_zero(4); _tile_zero(5);
}

static void* amx_int8_part(void* p) {
  part* own = p;
  tiles_begin();
  for (int64_t i = 0; i < own->n; ++i) {
    _tile_dpbssd(0, 4, 5); _tile_dpbssd(1, 4, 5); _tile_dpbssd(2, 4, 5); _tile_dpbssd(3, 4, 5);
  }
  _tile_release();
  return 0;
}

static void* amx_bf16_part(void* p) {
  part* own = p;
  tiles_begin();
  for (int64_t i = 0; i < own->n; ++i) {
    _tile_dpbf16ps(0, 4, 5); _tile_dpbf16ps(1, 4, 5); _tile_dpbf16ps(2, 4, 5); _tile_dpbf16ps(3, 4, 5);
  }
  _tile_release();
  return 0;
}
#endif

static double on_threads(void* (*work)(void*), part* parts, int threads) {
  pthread_t ids[MAX_THREADS];
  double sum = 0;
  for (int t = 1; t < threads; ++t) if (pthread_create(&ids[t], 0, work, &parts[t])) abort();
  work(&parts[0]);
  for (int t = 1; t < threads; ++t) pthread_join(ids[t], 0);
  for (int t = 0; t < threads; ++t) sum += parts[t].result;
  return sum;
}

double read_all(const char* data, size_t bytes, int threads) {
  part parts[MAX_THREADS];
  size_t each = bytes / threads / 4096 * 4096;
  for (int t = 0; t < threads; ++t) parts[t] = (part){data + t * each, each, 0, 0};
  return on_threads(read_part, parts, threads);
}

/* Arithmetic operations of one thread; 0 where the machine has no such instruction. `n` counts turns. */
int64_t compute(int kind, int64_t n, int threads, double* result) {
  void* (*work)(void*) = kind == 0 ? fma_part : 0;
  int64_t each = CHAINS * 2 * WIDTH / 4; /* operations of a turn */
#if defined(__AVX512VNNI__)
  if (kind == 1) work = dot_int8_part, each = CHAINS * 2 * 64;
#endif
#if defined(__AVX512BF16__)
  if (kind == 2) work = dot_bf16_part, each = CHAINS * 2 * 32;
#endif
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
  if (kind == 3 && tiles_allowed()) work = amx_int8_part, each = 4 * 2 * 16 * 16 * 64;
  if (kind == 4 && tiles_allowed()) work = amx_bf16_part, each = 4 * 2 * 16 * 16 * 32;
#endif
  if (!work) return 0;
  part parts[MAX_THREADS];
  for (int t = 0; t < threads; ++t) parts[t] = (part){0, 0, n, 0};
  *result = on_threads(work, parts, threads);
  return n * each;
}
"""
KINDS = {"float32 FMA": 0, "int8 dot": 1, "bf16 dot": 2, "AMX int8": 3, "AMX bf16": 4}
TURNS = 800_000  # of a compute loop: a few milliseconds


@dataclass(frozen=True)
class Limit:
    """Something the machine does at most so fast. A call of `run` does `amount`: bytes, or operations."""

    name: str
    amount: int
    run: Callable[[], object]


@cache
def _library() -> ctypes.CDLL:
    """Raises ResourceError where no C compiler compiles the loops."""
    found = compile_c(SOURCE, *FLAGS)
    found.read_all.restype = ctypes.c_double
    found.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    found.compute.restype = ctypes.c_int64
    found.compute.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.POINTER(ctypes.c_double)]
    return found


def memory_limit(threads: int, size: int) -> Limit:
    """Reading `size` bytes of memory once, each thread its share."""
    import numpy as np

    library = _library()
    data = np.ones(size // 8 + 8, np.int64)  # written: memory that was only reserved is one page of zeros
    address = -(-data.ctypes.data // 64) * 64

    def run(keep: object = data) -> None:
        library.read_all(address, size, threads)

    return Limit("DRAM read", size, run)


def compute_limits(threads: int) -> list[Limit]:
    """What the arithmetic units do at most, for every kind of operation that the machine has."""
    library, result = _library(), ctypes.c_double()

    def limit(name: str, kind: int) -> Limit:
        amount = library.compute(kind, 1, threads, result) * TURNS * threads
        return Limit(name, amount, lambda: library.compute(kind, TURNS, threads, result))

    return [found for name, kind in KINDS.items() if (found := limit(name, kind)).amount]


def last_level_cache() -> int:
    """Bytes of the largest cache that a core reaches."""
    sizes = [
        int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in ("K", "M", "G")
    ]
    return max(sizes, default=DEFAULT_CACHE)


def processor() -> str:
    """The model of the CPU, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Neighbours:
    """How busy others keep the machine, from now on: on a shared one a median means little without it."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds, of all cores: busy, stolen by the hypervisor; and those of this process."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, irq, soft, steal = (int(f) / os.sysconf("SC_CLK_TCK") for f in fields)
        own = os.times()
        mine = own.user + own.system + own.children_user + own.children_system
        return user + nice + system + irq + soft, steal, mine

    def shares(self, seconds: float) -> dict[str, float]:
        """Of the cores' time in these seconds: what other processes had, and what was stolen."""
        end = self._read()
        if self._start is None or end is None:
            return {}
        busy, stolen, mine = (b - a for a, b in zip(self._start, end, strict=True))
        whole = seconds * (os.cpu_count() or 1)
        return {"others": max(0.0, busy - mine) / whole, "stolen": stolen / whole}


def description() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": cores(),
        "last_level_cache": last_level_cache(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
