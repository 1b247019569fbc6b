#include "gumbel_noise.h"

#include <algorithm>
#include <limits>

#include "simd.h"

namespace specserve {
namespace {

constexpr int kDoubles = kLanes / 2;

using Words = std::uint64_t __attribute__((vector_size(kDoubles * 8)));
using Doubles = double __attribute__((vector_size(kDoubles * 8)));
using Floats = float __attribute__((vector_size(kDoubles * 4)));

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
constexpr std::uint64_t kGamma = 0x9E3779B97F4A7C15;
constexpr std::uint64_t kGumbelDomain = 0x67756D62;

template <class Word>
Word mix(Word word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  return word ^ (word >> 31);
}

Doubles as_doubles(Words words) {
  Doubles values;
  std::memcpy(&values, &words, sizeof values);
  return values;
}

// The double with exponent 52 whose mantissa is `integers`, which are below 2^52: 2^52 + integers.
Doubles above_two_52(Words integers) { return as_doubles(integers | 0x4330000000000000u); }

// The natural logarithm of positive normal numbers, within one unit in the last place: fdlibm's e_log.c.
// x = 2^k (1 + f) with sqrt(1/2) < 1 + f < sqrt(2); with s = f / (2 + f):
//   log x = k ln2 + f - f^2/2 + s (f^2/2 + R(s^2))
Doubles log(Doubles x) {
  constexpr std::uint64_t kSqrtHalf = 0x3fe6a09e00000000;
  Words bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0x3ff0000000000000u - kSqrtHalf;
  const Doubles k = above_two_52(bits >> 52) - (0x1p52 + 1023);
  const Doubles f = as_doubles((bits & 0x000fffffffffffffu) + kSqrtHalf) - 1.0;
  const Doubles s = f / (f + 2.0), z = s * s, w = z * z, half_square = f * f * 0.5;
  const Doubles even = w * (w * (w * 1.531383769920937332e-01 + 2.222219843214978396e-01) + 3.999999999940941908e-01);
  const Doubles odd = z * (w * (w * (w * 1.479819860511658591e-01 + 1.818357216161805012e-01) + 2.857142874366239149e-01) +
                           6.666666666666735130e-01);
  return s * (half_square + (odd + even)) + k * 1.90821492927058770002e-10 - half_square + f +
         k * 6.93147180369123816490e-01;
}

// Calls use(first token, noise of kDoubles tokens from it on) for all tokens; the last ones may lie behind `size`.
template <class Use>
void for_each_noise(std::uint64_t seed, std::int64_t position, std::int64_t size, const Use& use) {
  const std::uint64_t key = mix(mix(mix(seed) ^ kGumbelDomain) + static_cast<std::uint64_t>(position) * kGamma);
  Words counters;
  for (int lane = 0; lane < kDoubles; ++lane) counters[lane] = key + static_cast<std::uint64_t>(lane + 1) * kGamma;
  for (std::int64_t token = 0; token < size; token += kDoubles, counters += kDoubles * kGamma) {
    // u = (top 52 bits + 1/2) / 2^52; g = -log(-log u)
    const Doubles u = (above_two_52(mix(counters) >> 12) - 0x1p52 + 0.5) * 0x1p-52;
    use(token, -log(-log(u)));
  }
}

}  // namespace

void gumbel_noise(std::uint64_t seed, std::int64_t position, std::int64_t size, float* noise) {
  for_each_noise(seed, position, size, [&](std::int64_t token, Doubles values) {
    const Floats rounded = __builtin_convertvector(values, Floats);
    std::memcpy(noise + token, &rounded, static_cast<std::size_t>(std::min<std::int64_t>(kDoubles, size - token)) * 4);
  });
}

std::int64_t gumbel_argmax(const float* logits, std::int64_t size, float temperature, std::uint64_t seed,
                           std::int64_t position) {
  const float top = highest(logits, size);
  Doubles best;
  Words winners = {}, tokens;
  for (int lane = 0; lane < kDoubles; ++lane) best[lane] = -std::numeric_limits<double>::infinity(), tokens[lane] = lane;
  for_each_noise(seed, position, size, [&](std::int64_t token, Doubles noise) {
    Floats scores = Floats{} - std::numeric_limits<float>::infinity();
    std::memcpy(&scores, logits + token, static_cast<std::size_t>(std::min<std::int64_t>(kDoubles, size - token)) * 4);
    const Doubles perturbed = __builtin_convertvector((scores - top) / temperature, Doubles) + noise;
    winners = perturbed > best ? tokens : winners;
    best = perturbed > best ? perturbed : best;
    tokens += static_cast<std::uint64_t>(kDoubles);
  });
  int winner = 0;
  for (int lane = 1; lane < kDoubles; ++lane)
    if (best[lane] > best[winner] || (best[lane] == best[winner] && winners[lane] < winners[winner])) winner = lane;
  return static_cast<std::int64_t>(winners[winner]);
}

}  // namespace specserve
