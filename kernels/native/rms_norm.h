// The root-mean-square norm: out = x / sqrt(mean(x²) + eps) * weight, row by row.
#pragma once

#include <cstdint>

#include "thread_pool.h"

namespace specserve {

// x, out: [size], they may be the same; weight: [size].
void norm_row(const float* x, const float* weight, float eps, std::int64_t size, float* out);

// x, out: [rows, size], they may be the same.
void rms_norm(ThreadPool& pool, const float* x, const float* weight, float eps, std::int64_t rows, std::int64_t size,
              float* out);

}  // namespace specserve
