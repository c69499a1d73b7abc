// Kernels of the toy artifact: self-contained C, so that the runtime is tested without TVM. ISA_ID differs
// per variant.
typedef long long i64;

#define BLOCK 16

static i64 clip(i64 value, i64 limit) { return value < limit ? value : limit; }

// y[i] = x[i] + bias[i % n], a block is BLOCK elements.
void add_bias(const float* x, const float* bias, float* y, i64 size, i64 n, i64 begin, i64 end) {
  for (i64 i = begin * BLOCK; i < clip(end * BLOCK, size); ++i) y[i] = x[i] + bias[i % n];
}

// y[r, :] = x[r, :] * s[r], a block is a row of n.
void scale_rows(const float* x, const float* s, float* y, i64 n, i64 begin, i64 end) {
  for (i64 r = begin; r < end; ++r) {
    for (i64 j = 0; j < n; ++j) y[r * n + j] = x[r * n + j] * s[r];
  }
}

// y[r, :] = table[ids[r], :], a block is a row of n. Status 1 and zeros where ids[r] is not in [0, rows).
void gather(const i64* ids, const float* table, float* y, i64 rows, i64 n, int* status, i64 begin, i64 end) {
  for (i64 r = begin; r < end; ++r) {
    int valid = ids[r] >= 0 && ids[r] < rows;
    if (!valid) *status = 1;
    for (i64 j = 0; j < n; ++j) y[r * n + j] = valid ? table[ids[r] * n + j] : 0.0f;
  }
}

// y[b, :] = sum over t of x[b, t, :], a block is one b. Goes through two scratch buffers, to see that they
// are the thread's own and apart: `copy` of a row, `sum` of n floats.
void pool_rows(const float* x, float* y, i64 length, i64 n, float* copy, float* sum, i64 begin, i64 end) {
  for (i64 b = begin; b < end; ++b) {
    for (i64 j = 0; j < n; ++j) sum[j] = 0.0f;
    for (i64 t = 0; t < length; ++t) {
      for (i64 j = 0; j < n; ++j) copy[j] = x[(b * length + t) * n + j];
      for (i64 j = 0; j < n; ++j) sum[j] += copy[j];
    }
    for (i64 j = 0; j < n; ++j) y[b * n + j] = sum[j];
  }
}

// A block is BLOCK elements.
void copy(const float* x, float* y, i64 size, i64 begin, i64 end) {
  for (i64 i = begin * BLOCK; i < clip(end * BLOCK, size); ++i) y[i] = x[i];
}

// state[b, h, past + t, :] = x[b, t, h, :] for t < length, a block is one (b, h).
void append(const float* x, float* state, i64 past, i64 length, i64 heads, i64 capacity, i64 n, i64 begin,
            i64 end) {
  for (i64 r = begin; r < end; ++r) {
    for (i64 t = 0; t < length; ++t) {
      for (i64 j = 0; j < n; ++j) {
        state[(r * capacity + past + t) * n + j] = x[((r / heads * length + t) * heads + r % heads) * n + j];
      }
    }
  }
}

// state[b, past + t] = ids[b, t] for t < length, a block is one b.
void append_ids(const i64* ids, i64* state, i64 past, i64 length, i64 capacity, i64 begin, i64 end) {
  for (i64 b = begin; b < end; ++b) {
    for (i64 t = 0; t < length; ++t) state[b * capacity + past + t] = ids[b * length + t];
  }
}

// y[b, j] = (j + 1) * mask[b, j], a block is one b.
void weigh(const i64* mask, float* y, i64 total, i64 begin, i64 end) {
  for (i64 i = begin * total; i < end * total; ++i) y[i] = (float)((i % total + 1) * mask[i]);
}

// y[b, l, h, :] = sum over j <= p of weights[b, j] state[b, h, j, :], p = total - last + l the position of
// the l-th of the last ones. A block is one (b, l).
void attend(const float* state, const float* weights, float* y, i64 total, i64 last, i64 heads, i64 capacity,
            i64 n, i64 begin, i64 end) {
  for (i64 r = begin; r < end; ++r) {
    i64 b = r / last, p = total - last + r % last;
    for (i64 h = 0; h < heads; ++h) {
      float* out = y + (r * heads + h) * n;
      for (i64 k = 0; k < n; ++k) out[k] = 0.0f;
      for (i64 j = 0; j <= p; ++j) {
        const float* token = state + ((b * heads + h) * capacity + j) * n;
        for (i64 k = 0; k < n; ++k) out[k] += weights[b * total + j] * token[k];
      }
    }
  }
}

// y[b, j] = state[b, j] for j < total, a block is one b.
void recall(const i64* state, i64* y, i64 total, i64 capacity, i64 begin, i64 end) {
  for (i64 b = begin; b < end; ++b) {
    for (i64 j = 0; j < total; ++j) y[b * total + j] = state[b * capacity + j];
  }
}

// Status 7 if one of the ids is `bad`, a block is one id.
void refuse(const i64* ids, i64 bad, int* status, i64 begin, i64 end) {
  for (i64 i = begin; i < end; ++i) {
    if (ids[i] == bad) *status = 7;
  }
}

void isa_id(i64* y, i64 begin, i64 end) {
  for (i64 i = begin; i < end; ++i) y[i] = ISA_ID;
}

// The most arguments there can be: y[0] = sum over i of (i + 1) * a_i.
void many(i64* y, i64 a0, i64 a1, i64 a2, i64 a3, i64 a4, i64 a5, i64 a6, i64 a7, i64 a8, i64 a9, i64 a10,
          i64 a11, i64 a12, i64 a13, i64 a14, i64 a15, i64 a16, i64 a17, i64 a18, i64 a19, i64 a20, i64 a21,
          i64 a22, i64 a23, i64 a24, i64 a25, i64 a26, i64 a27, i64 a28, i64 begin, i64 end) {
  for (i64 i = begin; i < end; ++i) {
    y[i] = a0 + 2 * a1 + 3 * a2 + 4 * a3 + 5 * a4 + 6 * a5 + 7 * a6 + 8 * a7 + 9 * a8 + 10 * a9 + 11 * a10 +
           12 * a11 + 13 * a12 + 14 * a13 + 15 * a14 + 16 * a15 + 17 * a16 + 18 * a17 + 19 * a18 + 20 * a19 +
           21 * a20 + 22 * a21 + 23 * a22 + 24 * a23 + 25 * a24 + 26 * a25 + 27 * a26 + 28 * a27 + 29 * a28;
  }
}
