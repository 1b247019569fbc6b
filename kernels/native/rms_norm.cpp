#include "rms_norm.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace specserve {
namespace {

// Elements that are worth an item of work.
constexpr std::int64_t kItemElements = 8192;

}  // namespace

void norm_row(const float* x, const float* weight, float eps, std::int64_t size, float* out) {
  const float squares = total(size, [x](std::int64_t first, int count, Vec sums) {
    const Vec value = load_first(x + first, count);
    return fma(value, value, sums);
  });
  const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const int count = static_cast<int>(std::min<std::int64_t>(kLanes, size - i));
    store_first(load_first(weight + i, count) * (load_first(x + i, count) * inverse), out + i, count);
  }
}

void rms_norm(ThreadPool& pool, const float* x, const float* weight, float eps, std::int64_t rows, std::int64_t size,
              float* out) {
  const std::int64_t chunk = std::max<std::int64_t>(1, kItemElements / size);
  pool.parallel_for(static_cast<int>((rows + chunk - 1) / chunk), [&](int item) {
    for (std::int64_t row = item * chunk; row < std::min(rows, (item + 1) * chunk); ++row)
      norm_row(x + row * size, weight, eps, size, out + row * size);
  });
}

}  // namespace specserve
