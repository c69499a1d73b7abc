#include "ed25519.h"

#include <cstring>
#include <vector>

#include "sha512.h"

namespace qg {
namespace {

constexpr size_t kWords = 8;
// 256 bits, the lowest word first: a plain number, or an element of the field modulo p = 2^255 - 19, which is
// then any number of those that are congruent to it. 2^256 = 38 modulo p brings everything back into 256
// bits.
using Wide = std::array<uint32_t, kWords>;

constexpr Wide kPrime = {0xffffffed, 0xffffffff, 0xffffffff, 0xffffffff,
                         0xffffffff, 0xffffffff, 0xffffffff, 0x7fffffff};
constexpr Wide kBaseOrder = {0x5cf5d3ed, 0x5812631a, 0xa2f79cd6, 0x14def9de, 0, 0, 0, 0x10000000};  // L
constexpr Wide kCurveD = {0x135978a3, 0x75eb4dca, 0x4141d8ab, 0x00700a4d,
                          0x7779e898, 0x8cc74079, 0x2b6ffe73, 0x52036cee};  // -121665 / 121666
constexpr Wide kRootOfMinusOne = {0x4a0ea0b0, 0xc4ee1b27, 0xad2fe478, 0x2f431806,
                                  0x3dfbd7a7, 0x2b4d0099, 0x4fc1df0b, 0x2b832480};
constexpr Wide kFieldZero = {}, kFieldOne = {1};

// ---- numbers ----

Wide read_wide(const uint8_t* bytes) {
  Wide a = {};
  for (size_t i = 0; i < 32; ++i) a[i / 4] |= uint32_t{bytes[i]} << (8 * (i % 4));
  return a;
}

bool less(const Wide& a, const Wide& b) {
  for (size_t i = kWords; i-- > 0;) {
    if (a[i] != b[i]) return a[i] < b[i];
  }
  return false;
}

// a -= b; what is borrowed in the end, 0 or 1.
uint32_t subtract_from(Wide& a, const Wide& b) {
  uint32_t borrow = 0;
  for (size_t i = 0; i < kWords; ++i) {
    uint64_t difference = uint64_t{a[i]} - b[i] - borrow;
    a[i] = static_cast<uint32_t>(difference);
    borrow = difference >> 63;
  }
  return borrow;
}

// a += b, a small number; what is carried in the end, 0 or 1.
uint32_t add_small(Wide& a, uint64_t b) {
  for (uint32_t& word : a) {
    b += word;
    word = static_cast<uint32_t>(b);
    b >>= 32;
  }
  return static_cast<uint32_t>(b);
}

uint32_t bit(const Wide& a, size_t index) { return a[index / 32] >> (index % 32) & 1; }

// A digest, as a number of 512 bits, modulo L: bit for bit from the highest.
Wide modulo_order(const Digest512& digest) {
  Wide remainder = {};
  for (size_t i = 512; i-- > 0;) {
    uint32_t carry = digest[i / 8] >> (i % 8) & 1;
    for (uint32_t& word : remainder) {
      uint32_t next = word >> 31;
      word = word << 1 | carry;
      carry = next;
    }
    if (!less(remainder, kBaseOrder)) subtract_from(remainder, kBaseOrder);
  }
  return remainder;
}

// ---- the field ----

// After a carry out of 256 bits: adds 38 for it, which may carry once more, and then leaves a small number.
void fold(Wide& a, uint64_t carry) {
  if (add_small(a, 38 * carry)) add_small(a, 38);
}

Wide operator+(const Wide& a, const Wide& b) {
  Wide sum;
  uint64_t carry = 0;
  for (size_t i = 0; i < kWords; ++i) {
    carry += uint64_t{a[i]} + b[i];
    sum[i] = static_cast<uint32_t>(carry);
    carry >>= 32;
  }
  fold(sum, carry);
  return sum;
}

Wide operator-(const Wide& a, const Wide& b) {
  Wide difference = a;
  // What was borrowed is 2^256, which was 38 too much; taking that off may borrow once more.
  constexpr Wide kFold = {38};
  if (subtract_from(difference, b) && subtract_from(difference, kFold)) subtract_from(difference, kFold);
  return difference;
}

Wide operator*(const Wide& a, const Wide& b) {
  uint32_t product[2 * kWords] = {};
#pragma GCC unroll 8
  for (size_t i = 0; i < kWords; ++i) {
    uint64_t carry = 0;  // below 2^32: (2^32 - 1)^2 + 2 (2^32 - 1) = 2^64 - 1
#pragma GCC unroll 8
    for (size_t j = 0; j < kWords; ++j) {
      carry += uint64_t{a[i]} * b[j] + product[i + j];
      product[i + j] = static_cast<uint32_t>(carry);
      carry >>= 32;
    }
    product[i + kWords] = static_cast<uint32_t>(carry);
  }
  Wide result;
  uint64_t carry = 0;
  for (size_t i = 0; i < kWords; ++i) {
    carry += uint64_t{product[i + kWords]} * 38 + product[i];
    result[i] = static_cast<uint32_t>(carry);
    carry >>= 32;
  }
  fold(result, carry);
  return result;
}

// The one of the congruent numbers that is below p.
Wide canonical(Wide a) {
  while (!less(a, kPrime)) subtract_from(a, kPrime);  // twice at most: 2^256 < 3 p
  return a;
}

bool equal(const Wide& a, const Wide& b) { return canonical(a) == canonical(b); }

Wide squared(Wide a, int times) {
  for (int i = 0; i < times; ++i) a = a * a;
  return a;
}

// a^(2^252 - 3), which is (p - 5) / 8: by way of a^(2^n - 1), for n that grows along the bits of 250.
Wide power(const Wide& a) {
  Wide ones = a;
  int n = 1;
  for (int shift = 6; shift >= 0; --shift) {
    ones = squared(ones, n) * ones;
    n *= 2;
    if (250 >> shift & 1) {
      ones = ones * ones * a;
      ++n;
    }
  }
  return squared(ones, 2) * a;
}

// a^(p - 2), as p - 2 = 8 (2^252 - 3) + 3.
Wide inverse(const Wide& a) { return squared(power(a), 3) * (a * a * a); }

// ---- the curve -x^2 + y^2 = 1 + d x^2 y^2 ----

// x = X / Z, y = Y / Z, x y = T / Z.
struct CurvePoint {
  Wide X, Y, Z, T;
};

constexpr CurvePoint kBasePoint = {
    {0x8f25d51a, 0xc9562d60, 0x9525a7b2, 0x692cc760, 0xfdd6dc5c, 0xc0a4e231, 0xcd6e53fe, 0x216936d3},
    {0x66666658, 0x66666666, 0x66666666, 0x66666666, 0x66666666, 0x66666666, 0x66666666, 0x66666666},
    kFieldOne,
    {0xa5b7dda3, 0x6dde8ab3, 0x775152f5, 0x20f09f80, 0x64abe37d, 0x66ea4e8e, 0xd78b7665, 0x67875f0f}};

// RFC 8032, 5.1.3. False for what no point is encoded as.
bool decode_point(const PublicKey& bytes, CurvePoint* point) {
  const uint32_t sign = bytes[31] >> 7;
  Wide y = read_wide(bytes.data());
  y[7] &= 0x7fffffff;
  if (!less(y, kPrime)) return false;
  // x^2 = u / v, x = u v^3 (u v^7)^((p - 5) / 8), or that times the root of -1.
  const Wide yy = y * y, u = yy - kFieldOne, v = kCurveD * yy + kFieldOne, v3 = v * v * v;
  Wide x = u * v3 * power(u * v3 * v3 * v);
  if (!equal(v * x * x, u)) x = x * kRootOfMinusOne;
  if (!equal(v * x * x, u)) return false;
  x = canonical(x);
  if (x == kFieldZero && sign) return false;
  if ((x[0] & 1) != sign) x = kFieldZero - x;
  *point = {x, y, kFieldOne, x * y};
  return true;
}

std::array<uint8_t, 32> encode_point(const CurvePoint& p) {
  const Wide scale = inverse(p.Z), x = canonical(p.X * scale), y = canonical(p.Y * scale);
  std::array<uint8_t, 32> bytes;
  for (size_t i = 0; i < 32; ++i) bytes[i] = static_cast<uint8_t>(y[i / 4] >> (8 * (i % 4)));
  bytes[31] = static_cast<uint8_t>(bytes[31] | (x[0] & 1) << 7);
  return bytes;
}

// The formulas of RFC 8032, 5.1.4, which hold for any two points.
CurvePoint operator+(const CurvePoint& p, const CurvePoint& q) {
  const Wide a = (p.Y - p.X) * (q.Y - q.X), b = (p.Y + p.X) * (q.Y + q.X);
  const Wide td = p.T * q.T * kCurveD, zz = p.Z * q.Z;
  const Wide c = td + td, d = zz + zz;
  const Wide e = b - a, f = d - c, g = d + c, h = b + a;
  return {e * f, g * h, f * g, e * h};
}

CurvePoint doubled(const CurvePoint& p) {
  const Wide a = p.X * p.X, b = p.Y * p.Y, zz = p.Z * p.Z, sum = p.X + p.Y;
  const Wide h = a + b, e = h - sum * sum, g = a - b, f = zz + zz + g;
  return {e * f, g * h, f * g, e * h};
}

// m p + n q.
CurvePoint combine(const Wide& m, const CurvePoint& p, const Wide& n, const CurvePoint& q) {
  const CurvePoint choices[] = {p, q, p + q};
  CurvePoint sum = {kFieldZero, kFieldOne, kFieldOne, kFieldZero};
  for (size_t i = 256; i-- > 0;) {
    sum = doubled(sum);
    if (uint32_t which = bit(m, i) + 2 * bit(n, i)) sum = sum + choices[which - 1];
  }
  return sum;
}

}  // namespace

bool ed25519_verify(const PublicKey& key, const uint8_t* message, size_t size, const Signature& signature) {
  const Wide s = read_wide(&signature[32]);
  CurvePoint a;
  if (!less(s, kBaseOrder) || !decode_point(key, &a)) return false;
  std::vector<uint8_t> hashed(signature.begin(), signature.begin() + 32);
  hashed.insert(hashed.end(), key.begin(), key.end());
  hashed.insert(hashed.end(), message, message + size);
  const Wide h = modulo_order(sha512(hashed.data(), hashed.size()));
  // S B = R + h A, as R = S B - h A. No other encoding of R than the canonical one is equal.
  const CurvePoint minus_a = {kFieldZero - a.X, a.Y, a.Z, kFieldZero - a.T};
  const std::array<uint8_t, 32> r = encode_point(combine(s, kBasePoint, h, minus_a));
  return std::memcmp(r.data(), signature.data(), r.size()) == 0;
}

bool ed25519_is_key(const PublicKey& key) {
  CurvePoint a;
  if (!decode_point(key, &a)) return false;
  const CurvePoint eightfold = doubled(doubled(doubled(a)));
  return !equal(eightfold.X, kFieldZero) || !equal(eightfold.Y, eightfold.Z);
}

}  // namespace qg
