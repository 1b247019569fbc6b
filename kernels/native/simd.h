// Vectors of the machine's own width through the compilers' vector extensions: AVX-512, AVX, NEON or SSE without
// intrinsics. Every function does the same operations in the same order for the same elements, whatever surrounds them.
#pragma once

#include <cstdint>
#include <cstring>

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

inline Vec broadcast(float value) { return value - Vec{}; }

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

// Sum of the lanes: halves onto halves, so that the order is one of a balanced tree.
inline float sum(Vec value) {
  float lanes[kLanes];
  store(value, lanes);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

inline float max_lane(Vec value) {
  float highest = value[0];
  for (int lane = 1; lane < kLanes; ++lane) highest = value[lane] > highest ? value[lane] : highest;
  return highest;
}

// e^x: x = n ln2 + r with |r| <= ln2 / 2, a polynomial for e^r, and n added to the exponent. Relative error below 2e-7;
// arguments outside [-87, 88] count as the bound, NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec low = broadcast(-87.0f), high = broadcast(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

}  // namespace specserve
