// Vectors of the machine's own width through the compilers' vector extensions: AVX-512, AVX, NEON or SSE. Every function
// does the same operations in the same order for the same elements, whatever surrounds them. The library is compiled
// without contraction, so that a product and a sum are rounded once exactly where fma() says so.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace specserve {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kAccumulators = 24;  // of 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kAccumulators = 12;  // of 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kAccumulators = 24;  // of 32 registers
#else
constexpr int kLanes = 4;
constexpr int kAccumulators = 12;  // of 16 registers
#endif

using Vec = float __attribute__((vector_size(kLanes * 4)));
using IntVec = std::int32_t __attribute__((vector_size(kLanes * 4)));
using UintVec = std::uint32_t __attribute__((vector_size(kLanes * 4)));
using HalfVec = std::uint16_t __attribute__((vector_size(kLanes * 2)));

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void from_float(float value, float* target) { *target = value; }

// Rounds to nearest, ties to even; NaN stays NaN.
inline void from_float(float value, bfloat16* target) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool nan = value != value;
  target->bits = nan ? 0x7fc0 : static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// a * b + c, rounded once where the machine can.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline Vec broadcast(float value) { return value - Vec{}; }

inline UintVec broadcast(std::uint32_t value) { return value - UintVec{}; }

// Each lane rounded to a bf16 number, to nearest, ties to even; a subnormal one becomes zero, NaN stays NaN.
inline Vec round_to_bfloat16(Vec value) {
  UintVec bits;
  std::memcpy(&bits, &value, sizeof bits);
  const UintVec magnitude = bits & 0x7fffffffu, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  bits = magnitude > 0x7f800000u ? UintVec{} + 0x7fc00000u : magnitude < 0x00800000u ? bits & 0x80000000u : rounded;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Whether the machine multiplies two bf16 numbers in each lane as fast as one float.
#if defined(__AVX512BF16__)
constexpr bool kPairsOfBFloat16 = true;

// fma(a[0], b[0], fma(a[1], b[1], c)), where a lane of a and b is a pair of bf16 numbers, the first in its low half.
inline Vec fma_pairs(UintVec a, UintVec b, Vec c) {
  __m512bh first, second;
  std::memcpy(&first, &a, sizeof first);
  std::memcpy(&second, &b, sizeof second);
  return _mm512_dpbf16_ps(c, first, second);
}

// The lanes of `low` and then of `high`, rounded as by round_to_bfloat16, in pairs.
inline UintVec round_to_pairs(Vec low, Vec high) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
  UintVec pairs;
  std::memcpy(&pairs, &rounded, sizeof pairs);
  return pairs;
}

// Each lane rounded as by round_to_bfloat16.
inline void store_rounded(Vec value, bfloat16* target) {
  const __m256bh rounded = _mm512_cvtneps_pbh(value);
  std::memcpy(target, &rounded, sizeof rounded);
}
#else
constexpr bool kPairsOfBFloat16 = false;
inline Vec fma_pairs(UintVec, UintVec, Vec) = delete;

inline void store_rounded(Vec value, bfloat16* target) {
  value = round_to_bfloat16(value);
  UintVec bits;
  std::memcpy(&bits, &value, sizeof bits);
  const HalfVec rounded = __builtin_convertvector(bits >> 16, HalfVec);
  std::memcpy(target, &rounded, sizeof rounded);
}
#endif

inline Vec load(const float* source) {
  Vec result;
  std::memcpy(&result, source, sizeof result);
  return result;
}

inline Vec load(const bfloat16* source) {
  HalfVec halves;
  std::memcpy(&halves, source, sizeof halves);
  const UintVec bits = __builtin_convertvector(halves, UintVec) << 16;
  Vec result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// IEEE half-precision bits, in the low half of each lane, to float: exact, subnormal numbers included.
inline Vec half_to_float(UintVec halves) {
#if defined(__AVX512F__)
  __m512i bits;
  std::memcpy(&bits, &halves, sizeof bits);
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
#else
  const UintVec sign = (halves & 0x8000u) << 16, rest = (halves & 0x7fffu) << 13;
  Vec value;
  std::memcpy(&value, &rest, sizeof value);
  value *= 5.192296858534828e33f;  // 2^112, between the biases of the exponents
  UintVec bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= sign | (rest >= 0x0f800000u ? UintVec{} + 0x7f800000u : UintVec{});  // infinity and NaN
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

inline float to_float(float16 value) { return half_to_float(UintVec{} + value.bits)[0]; }

inline Vec load(const float16* source) {
  HalfVec halves;
  std::memcpy(&halves, source, sizeof halves);
  return half_to_float(__builtin_convertvector(halves, UintVec));
}

// The first `count` elements, zeros behind them.
template <class T>
inline Vec load_first(const T* source, int count) {
  if (count == kLanes) return load(source);
  float lanes[kLanes] = {};
  for (int lane = 0; lane < count; ++lane) lanes[lane] = to_float(source[lane]);
  return load(lanes);
}

inline void store(Vec value, float* target) { std::memcpy(target, &value, sizeof value); }

inline void store_first(Vec value, float* target, int count) {
  if (count == kLanes) return store(value, target);
  std::memcpy(target, &value, static_cast<std::size_t>(count) * sizeof(float));
}

// The lanes with these numbers, of which those of b follow those of a. GCC has clang's name for it from version 12 on.
template <int... kNumbers>
inline Vec shuffle(Vec a, Vec b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kNumbers...);
#else
  return __builtin_shuffle(a, b, IntVec{kNumbers...});
#endif
}

// Pairs up the lower, or the upper, halves of two vectors: a0 b0 a1 b1 ...
#if defined(__AVX512F__)
inline Vec interleave_low(Vec a, Vec b) {
  return shuffle<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(a, b);
}
inline Vec interleave_high(Vec a, Vec b) {
  return shuffle<8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(a, b);
}
#elif defined(__AVX__)
inline Vec interleave_low(Vec a, Vec b) { return shuffle<0, 8, 1, 9, 2, 10, 3, 11>(a, b); }
inline Vec interleave_high(Vec a, Vec b) { return shuffle<4, 12, 5, 13, 6, 14, 7, 15>(a, b); }
#else
inline Vec interleave_low(Vec a, Vec b) { return shuffle<0, 4, 1, 5>(a, b); }
inline Vec interleave_high(Vec a, Vec b) { return shuffle<2, 6, 3, 7>(a, b); }
#endif

// tile[i][j] <- tile[j][i]. The index of an element has the bits (row, column); each round rotates them by one.
inline void transpose(Vec (&tile)[kLanes]) {
  for (int bits = kLanes; bits > 1; bits /= 2) {
    Vec turned[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      turned[2 * i] = interleave_low(tile[i], tile[i + kLanes / 2]);
      turned[2 * i + 1] = interleave_high(tile[i], tile[i + kLanes / 2]);
    }
    std::memcpy(tile, turned, sizeof turned);
  }
}

// Sum of the lanes: halves onto halves, so that the order is one of a balanced tree.
using Vec2 = float __attribute__((vector_size(8)));
using Vec4 = float __attribute__((vector_size(16)));
using Vec8 = float __attribute__((vector_size(32)));
using Vec16 = float __attribute__((vector_size(64)));

template <class Half, class Whole>
inline Half fold(const Whole& value) {
  Half halves[2];
  std::memcpy(halves, &value, sizeof value);
  return halves[0] + halves[1];
}

inline float sum(const Vec2& value) { return value[0] + value[1]; }
inline float sum(const Vec4& value) { return sum(fold<Vec2>(value)); }
inline float sum(const Vec8& value) { return sum(fold<Vec4>(value)); }
inline float sum(const Vec16& value) { return sum(fold<Vec8>(value)); }

// Sums that are kept side by side, on every machine: a total's bits do not depend on the width of the vectors.
constexpr int kSums = 16;

// The total over `size` elements, number i of which belongs to sum i % kSums. add(first, count, sums) returns the sums of
// kLanes neighbours with elements first..first+count added.
template <class Add>
inline float total(std::int64_t size, const Add& add) {
  constexpr int kVecs = kSums / kLanes;
  Vec sums[kVecs] = {};
  for (std::int64_t i = 0; i < size; i += kSums)
    for (int v = 0; v < kVecs; ++v) {
      const std::int64_t first = i + v * kLanes;
      if (first < size) sums[v] = add(first, static_cast<int>(std::min<std::int64_t>(kLanes, size - first)), sums[v]);
    }
  Vec16 all;
  static_assert(sizeof all == sizeof sums);
  std::memcpy(&all, sums, sizeof all);
  return sum(all);
}

inline float max_lane(Vec value) {
  float highest = value[0];
  for (int lane = 1; lane < kLanes; ++lane) highest = value[lane] > highest ? value[lane] : highest;
  return highest;
}

// The highest of `size` values, at least one.
inline float highest(const float* values, std::int64_t size) {
  Vec top = broadcast(values[0]);
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec value = load(values + i);
    top = value > top ? value : top;
  }
  float result = max_lane(top);
  for (; i < size; ++i) result = values[i] > result ? values[i] : result;
  return result;
}

// The first place of the highest of `size` values, at least one.
inline std::int64_t first_highest(const float* values, std::int64_t size) {
  const float top = highest(values, size);
  const std::int64_t found = std::find(values, values + size, top) - values;
  return found < size ? found : 0;  // NaN is equal to nothing
}

// e^x: x = n ln2 + r with |r| <= ln2 / 2, a polynomial for e^r, and n added to the exponent. Relative error below 2e-7;
// arguments outside [-87, 88] count as the bound, NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec low = broadcast(-87.0f), high = broadcast(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = fma(x, broadcast(1.44269504088896341f), magic) - magic;
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = fma(r, broadcast(1.9875691500e-4f), broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

}  // namespace specserve
