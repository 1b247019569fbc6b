// Matrix products with weights in an order of their own, packed once.
#pragma once

#include <cstdint>

#include "simd.h"
#include "thread_pool.h"

namespace specserve {

// Outputs in a block. The packed matrix is [ceil(outputs / kBlock)][ceil(inputs / n)][kBlock] words of four bytes, zeros
// where there is no output or input. A word holds n inputs of one output: a float, or two bfloat16 with the even input
// in the low half, so that a shift and a mask widen them.
constexpr int kBlock = 16;

// Mirrored by a ctypes structure: the order and the types of the fields are shared.
struct LinearWeights {
  const std::uint32_t* packed;
  const float* bias;   // [outputs] or null
  std::int64_t inputs;
  std::int64_t outputs;
  std::int32_t is_bfloat16;
};

// weight: [outputs, inputs], float or bfloat16.
void pack_linear(const void* weight, bool is_bfloat16, std::int64_t inputs, std::int64_t outputs,
                 std::uint32_t* packed);

// out [rows, outputs] = x [rows, inputs] weightᵀ + bias + residual (either may be null).
//
// Output (r, o) is the chain fma(x[r][k], w[o][k], ·) over k = 0, 1, ...: a row's bits do not depend on the other rows,
// on the number of threads or on which thread computes it. bfloat16 weights are widened, which is exact.
void packed_linear(ThreadPool& pool, const float* x, std::int64_t rows, const LinearWeights& weights,
                   const float* residual, float* out);

}  // namespace specserve
