// Matrix products with weights in an order of their own, packed once.
#pragma once

#include <cstdint>
#include <functional>

#include "simd.h"
#include "thread_pool.h"

namespace specserve {

// How weights lie in memory; the numbers are shared with Python. Every type widens to float exactly.
enum class Storage : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

// Outputs in a block: two vectors, so that a tile of many rows fills the registers and a block is one stream of memory.
constexpr int kBlock = 2 * kLanes;

// The packed matrix is [ceil(outputs / kBlock)][ceil(inputs / n)][kBlock] words of four bytes, zeros where there is no
// output or input; a library that is built for tiles pads the words of bf16 weights to whole ones. A word holds n inputs of
// one output, the first in its lowest bits: n is 1, 2, 2 or 4 by storage.
// A gated matrix of 2 m outputs is packed as ceil(m / kLanes) blocks of kLanes gates and their kLanes partners.
//
// Mirrored by a ctypes structure: the order and the types of the fields are shared.
struct LinearWeights {
  const std::uint32_t* packed;
  const float* scales;  // [outputs], factors of int8 weights; else null
  const float* bias;    // [outputs] or null
  std::int64_t inputs;
  std::int64_t outputs;
  Storage storage;
};

// Whether bf16 weights are multiplied by whole tiles. The same throughout a process.
bool multiplies_in_tiles();

std::int64_t packed_words(Storage storage, bool gated, std::int64_t inputs, std::int64_t outputs);

// weight: [outputs, inputs], of the type that `storage` names.
void pack_linear(const void* weight, Storage storage, bool gated, std::int64_t inputs, std::int64_t outputs,
                 std::uint32_t* packed);

// The rows that a linear layer takes.
struct LinearInput {
  const float* x;  // [rows, inputs]
  std::int64_t rows;
  const float* norm = nullptr;  // [inputs], the weight of an RMS norm that the rows pass first, or null
  float norm_eps = 0.0f;
  const bfloat16* rounded = nullptr;  // the rows instead of x, rounded already, where `takes_rounded`
};

// Whether rows may come rounded, by whoever made them: each thread of the product needs all rows, so that it is spared
// half of what it reads and the rounding.
bool takes_rounded(const LinearWeights& weights);

// What follows a linear layer, output by output: use(first row, end of rows, first output, end of outputs) is called for
// outputs that have just been computed, by the thread that computed them. `first output` is a multiple of `multiple`, and
// so is the end unless it is the end of all.
struct OutputUse {
  std::int64_t multiple = 1;
  std::function<void(std::int64_t, std::int64_t, std::int64_t, std::int64_t)> use;
};

// out [rows, outputs] = (x [rows, inputs] weightᵀ) scales + bias + residual (each of the three may be null).
//
// Output (r, o) is the chain fma(x[r][k], w[o][k], ·) over k = 0, 1, 2, ...; with bf16 weights x is first rounded to bf16,
// and the order is k = 1, 0, 3, 2, ..., that of the instructions which multiply such numbers, or, where these are
// multiplied by tiles, that of `multiply_matrix_tiles`. A row's bits do not depend on the other rows, on the number of
// threads, on which thread computes it, on which instructions the machine has but for tiles, or, bf16 aside, on the
// storage of a weight that both can represent.
void packed_linear(ThreadPool& pool, const LinearInput& input, const LinearWeights& weights, const float* residual,
                   float* out, const OutputUse& next = {});

// out [rows, m] = silu(gate) up, with gate and up the two halves of x weightᵀ, weights packed as a gated matrix of
// outputs = 2 m, without bias, and silu(z) = z / (1 + e^-z). Rounded for the next layer where out is bf16.
void gated_linear(ThreadPool& pool, const LinearInput& input, const LinearWeights& weights, float* out);
void gated_linear(ThreadPool& pool, const LinearInput& input, const LinearWeights& weights, bfloat16* out);

}  // namespace specserve
