// Device functions of qgraph's kernels: what TIR has no word for. Nothing is included: every compiler of CUDA C++
// takes this text as it is. With QG_EMULATED the primitives come from whoever runs it on a CPU.
#define int64_t long long
#define int8_t signed char
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short

#ifndef QG_EMULATED
#define QG_DEVICE static __device__ __forceinline__
#define QG_MEMBER static __device__ __forceinline__
#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)
#define CUDART_INF __longlong_as_double(0x7ff0000000000000ll)
#define CUDART_NAN __longlong_as_double(0x7fffffffffffffffll)

// {lo, hi} as bfloat16, to nearest even; lo in the low half.
QG_DEVICE uint qg_bf16x2(float lo, float hi) {
  uint r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

// The same as float16; and two float16 by two, and less two.
QG_DEVICE uint qg_f16x2(float lo, float hi) {
  uint r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
QG_DEVICE uint qg_f16x2_mul(uint a, uint b) {
  uint r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
QG_DEVICE uint qg_f16x2_sub(uint a, uint b) {
  uint r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

QG_DEVICE float qg_f16_to_float(ushort x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
  return r;
}

// d += a b for a 16 x 16 and b 16 x 8, bfloat16, in the fragments that mma.m16n8k16 has.
QG_DEVICE void qg_mma_bf16(float* d, const uint* a, uint b0, uint b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of float16.
QG_DEVICE void qg_mma_f16(float* d, const uint* a, uint b0, uint b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// Four elements at once; both addresses are multiples of their size together.
QG_DEVICE void qg_copy4(uint* to, const uint* from) { *(uint4*)to = *(const uint4*)from; }
QG_DEVICE void qg_copy4(float* to, const float* from) { *(float4*)to = *(const float4*)from; }
QG_DEVICE void qg_copy4(ushort* to, const ushort* from) { *(uint2*)to = *(const uint2*)from; }
QG_DEVICE void qg_copy4(uchar* to, const uchar* from) { *(uint*)to = *(const uint*)from; }
QG_DEVICE void qg_copy4(int8_t* to, const int8_t* from) { *(uint*)to = *(const uint*)from; }

template <class T>
QG_DEVICE T qg_keep(T x) {
  return x;
}

// The bfloat16 nearest to a number (of the very largest the next one toward zero, which is finite), and what is left
// of the number: an infinity has no rest.
QG_DEVICE float qg_head(float x) {
  uint bits = *(uint*)&x;
  if ((bits & 0x7f800000u) < 0x7f000000u) bits += 0x8000u;
  bits &= 0xffff0000u;
  return *(float*)&bits;
}
QG_DEVICE float qg_rest(float x, float head) { return x == head ? 0.0f : x - head; }

// Saturating; of a NaN, 0.
QG_DEVICE int qg_to_int32(float x) { return __float2int_rz(x); }
QG_DEVICE int64_t qg_to_int64(float x) { return x != x ? 0 : __float2ll_rz(x); }

// Two E2M1 codes whose sign bits are 15 and 31 and whose other bits follow them, times a pair of scales, 2^14 times
// what they should be: exact in float16 for scales of E4M3 over 2^8.
QG_DEVICE uint qg_e2m1_pair(uint codes, uint scales) {
  return qg_f16x2_mul((codes & 0x80008000u) | (codes >> 3 & 0x0e000e00u), scales);
}

// A pair of the scale of E4M3 bits, times 2^6.
QG_DEVICE uint qg_e4m3_pair(uchar bits) {
  uint half = (bits & 0x80u) << 8 | (bits & 0x7fu) << 7;  // times 2^-8
  return qg_f16x2_mul(half << 16 | half, 0x74007400u);    // 2^14
}

// The codes of E2M1 and positive E4M3 numbers; of a NaN, of E4M3, its NaN.
QG_DEVICE uint qg_e2m1_code(float x) {
  float small = x * 1.17549435e-38f;  // 2^-126: E2M1's exponents begin where float32's do
  uint bits = *(uint*)&small;
  return (bits >> 22 & 7) | (bits >> 28 & 8);
}
QG_DEVICE uchar qg_e4m3_code(float x) {
  if (x != x) return 0x7f;
  float small = x * 7.52316385e-37f;  // 2^-120
  return (uchar)(*(uint*)&small >> 20);
}

// qg_e4m3_pair of byte `at` of four, for scales that may be NaN.
QG_DEVICE uint qg_e4m3_pair_of(uint bytes, int at) {
  uchar bits = (uchar)(bytes >> (8 * at));
  return bits == 0x7f ? 0x7fff7fffu : qg_e4m3_pair(bits);
}

// d += a b for a 16 x 64 and b 64 x 8 of E2M1 with a scale of E4M3 for every 16 inputs. Lane (g, t) has the codes of
// inputs 8 t .. and 32 + 8 t .. of rows g and g + 8 (a: row g, row g + 8, and the same of the second 32) and of column
// g (b), and the four scales of each of them.
QG_DEVICE void qg_mma_fp4(float* d, const uint* a, uint b0, uint b1, uint scales, uint scales8, uint scales_b) {
#if defined(__CUDA_ARCH_FEAT_SM120_ALL)
  // Lanes 0 and 1 of four give the scales of rows g and g + 8, lane 0 those of column g.
  uint scales_a = threadIdx.x & 1 ? scales8 : scales;
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%11,%12}, {%13}, {%14,%15};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(scales_a), "h"((ushort)0),
        "h"((ushort)0), "r"(scales_b), "h"((ushort)0), "h"((ushort)0));
#else
  // Numbers times scales are exact in float16 over 2^8.
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  int own = (threadIdx.x & 3) >> 1;  // of the two blocks of 32 inputs
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int block = 2 * half + own;
    uint low = qg_e4m3_pair_of(scales, block), high = qg_e4m3_pair_of(scales8, block);
    uint right = qg_e4m3_pair_of(scales_b, block), b = half ? b1 : b0;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      uint left[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        left[2 * j] = qg_e2m1_pair(a[2 * half] << (12 - 4 * (i + j)), low);
        left[2 * j + 1] = qg_e2m1_pair(a[2 * half + 1] << (12 - 4 * (i + j)), high);
      }
      uint first = qg_e2m1_pair(b << (12 - 4 * i), right), second = qg_e2m1_pair(b << (8 - 4 * i), right);
      qg_mma_f16(sum, left, first, second);
    }
  }
  for (int r = 0; r < 4; ++r) d[r] = fmaf(sum[r], 65536.0f, d[r]);
#endif
}

// Two fields of up to 10 bits, where `mask` has them, less what `less` has above 1024: exact in float16.
QG_DEVICE uint qg_field_pair(uint fields, uint mask, uint flip, uint less) {
  return qg_f16x2_sub(((fields & mask) ^ flip) | 0x64006400u, less);
}

// A float16 integer below 1024, as the pair that qg_field_pair takes off.
QG_DEVICE uint qg_less(uint value) { return (value | value << 16) + 0x64006400u; }

// The power of two that takes a magnitude, the largest of a row as bits, to 2^14 .. 2^15; and its inverse.
QG_DEVICE float qg_to_unit(int largest) {
  int exponent = largest >> 23;
  exponent = exponent < 15 ? 15 : exponent;
  int bits = (127 + 14 + 127 - exponent) << 23;
  return *(float*)&bits;
}
QG_DEVICE float qg_from_unit(int largest) {
  int exponent = largest >> 23;
  exponent = exponent < 15 ? 15 : exponent;
  int bits = (exponent - 14) << 23;
  return *(float*)&bits;
}

// A number's bits without its sign; of an infinity or NaN, 0.
QG_DEVICE int qg_finite_bits(float x) {
  int bits = *(int*)&x & 0x7fffffff;
  return bits < 0x7f800000 ? bits : 0;
}

// Two numbers as the sum of two pairs of float16, which hold them to 2^-23: an infinity has no rest.
QG_DEVICE void qg_split_f16(float lo, float hi, uint* head, uint* rest) {
  *head = qg_f16x2(lo, hi);
  float first = qg_f16_to_float((ushort)(*head)), second = qg_f16_to_float((ushort)(*head >> 16));
  *rest = qg_f16x2(lo == first ? 0.0f : lo - first, hi == second ? 0.0f : hi - second);
}

// Code j of 32 codes of 3 bits in three words (layout n16b3).
QG_DEVICE uint qg_three(uint w0, uint w1, uint w2, int j) {
  if (j == 30) return (w0 >> 30 ^ w1 >> 29) & 7;
  if (j == 31) return (w2 >> 30 ^ w1 >> 28) & 7;
  return (j < 10 ? w0 : j < 20 ? w1 : w2) >> (3 * (j % 10)) & 7;
}

// Digit j, from the first of three bytes on, of five digits a byte (layout n16t5): -1, 0 or 1.
QG_DEVICE float qg_trit(int b0, int b1, int b2, int j) {
  int place = j % 5, digits = (j < 5 ? b0 : j < 10 ? b1 : b2) + 121;
  int power = place == 0 ? 81 : place == 1 ? 27 : place == 2 ? 9 : place == 3 ? 3 : 1;
  return float(digits / power % 3 - 1);
}

// TIR's: the second operand where they are unordered.
template <class T>
QG_DEVICE T qg_max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
QG_DEVICE T qg_min(T a, T b) {
  return a < b ? a : b;
}

// Dynamic shared memory.
#ifndef QG_EMULATED
extern __shared__ uint4 qg_dynamic[];
#endif
QG_DEVICE void qg_dynamic_put(int at, uint word) { ((uint*)qg_dynamic)[at] = word; }
QG_DEVICE void qg_dynamic_get4(uint* to, int at) { *(uint4*)to = *(const uint4*)((const uint*)qg_dynamic + at); }

// Reductions of a block's threads, in an order that is always the same. `scratch` has an element for each warp.
struct QgSum {
  template <class T>
  QG_MEMBER T of(T a, T b) {
    return a + b;
  }
};
struct QgProd {
  template <class T>
  QG_MEMBER T of(T a, T b) {
    return a * b;
  }
};
struct QgMax {  // keeps a NaN
  template <class T>
  QG_MEMBER T of(T a, T b) {
    return a != a ? a : a > b ? a : b;
  }
};
struct QgMin {
  template <class T>
  QG_MEMBER T of(T a, T b) {
    return a != a ? a : a < b ? a : b;
  }
};

template <class Op, class T>
QG_DEVICE T qg_warp_reduce(T v) {
  for (int step = 16; step > 0; step >>= 1) v = Op::of(v, __shfl_xor_sync(0xffffffffu, v, step));
  return v;
}

template <class Op, class T>
QG_DEVICE T qg_block_reduce(T v, T* scratch) {
  v = qg_warp_reduce<Op>(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = scratch[0];
  for (int warp = 1; warp < int(blockDim.x / 32); ++warp) v = Op::of(v, scratch[warp]);
  return v;
}

// The same for reductions of a part of a warp: lanes that differ in the bits of `mask` alone.
template <class T>
QG_DEVICE T qg_lanes_sum(T v, int mask) {
  for (int step = 16; step > 0; step >>= 1)
    if (mask & step) v = v + __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

template <class T>
QG_DEVICE T qg_lanes_max(T v, int mask) {
  for (int step = 16; step > 0; step >>= 1)
    if (mask & step) v = QgMax::of(v, __shfl_xor_sync(0xffffffffu, v, step));
  return v;
}

#define qg_block_sum qg_block_reduce<QgSum>
#define qg_block_prod qg_block_reduce<QgProd>
#define qg_block_max qg_block_reduce<QgMax>
#define qg_block_min qg_block_reduce<QgMin>
#define qg_warp_sum qg_warp_reduce<QgSum>
#define qg_warp_max qg_warp_reduce<QgMax>
#define max qg_max
#define min qg_min

