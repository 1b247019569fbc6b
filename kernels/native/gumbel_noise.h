// The noise of speculation/noise.py: a function of (seed, position, token) alone.
#pragma once

#include <cstdint>

namespace specserve {

// noise[t], for t < size: standard Gumbel noise of token t at a position. The integers behind it are those of
// speculation/noise.py, the logarithms are computed in double precision, and the result is rounded to float.
void gumbel_noise(std::uint64_t seed, std::int64_t position, std::int64_t size, float* noise);

// The first token with the highest (logits[t] - max(logits)) / temperature + noise of t, in double precision: a draw
// from softmax(logits / temperature). temperature: above 0.
std::int64_t gumbel_argmax(const float* logits, std::int64_t size, float temperature, std::uint64_t seed,
                           std::int64_t position);

}  // namespace specserve
