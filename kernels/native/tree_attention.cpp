#include "tree_attention.h"

#include <algorithm>
#include <vector>

#include "simd.h"

namespace specserve {
namespace {

// Multiply-adds that are worth an item of work.
constexpr std::int64_t kItemWork = 16384;
constexpr int kItemsPerThread = 8;
// Vectors of a head that the weighted sum keeps in registers.
constexpr int kSumVecs = 4;

struct Scratch {
  std::vector<std::int64_t> offsets;
  std::vector<float> weights;
};

Scratch& scratch() {
  thread_local Scratch own;
  return own;
}

// The block that holds a logical entry of the row's sequence.
std::int64_t block_of(const AttentionBatch& batch, std::int64_t row, std::int64_t entry) {
  return batch.block_tables[batch.row_sequences[row] * batch.max_blocks + entry / batch.block_size];
}

// Offsets in the cache, in elements, of the entries that a row sees, in logical order.
void visible_offsets(const AttentionBatch& batch, std::int64_t row, std::int64_t slot_size,
                     std::vector<std::int64_t>& offsets) {
  const std::int64_t prefix = batch.prefix_lengths[row];
  offsets.resize(static_cast<std::size_t>(prefix));
  for (std::int64_t first = 0; first < prefix; first += batch.block_size) {
    const std::int64_t slot = block_of(batch, row, first) * batch.block_size;
    const std::int64_t last = std::min(prefix, first + batch.block_size);
    for (std::int64_t entry = first; entry < last; ++entry) offsets[entry] = (slot + entry - first) * slot_size;
  }
  for (std::int64_t word = 0; word < batch.words; ++word)
    for (std::uint64_t bits = batch.masks[row * batch.words + word]; bits != 0; bits &= bits - 1) {
      const std::int64_t entry = prefix + 64 * word + __builtin_ctzll(bits);
      const std::int64_t slot = block_of(batch, row, entry) * batch.block_size + entry % batch.block_size;
      offsets.push_back(slot * slot_size);
    }
}

template <class Element>
float dot(const float* query, const Element* key, std::int64_t size) {
  Vec total = {};
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) total += load(query + i) * load(key + i);
  if (i < size) {
    const int left = static_cast<int>(size - i);
    total += load_first(query + i, left) * load_first(key + i, left);
  }
  return sum(total);
}

// weights[i] = e^(weights[i] - max) for i < size; returns their sum. There is room for a last, partly used vector.
float exponentials(float* weights, std::int64_t size) {
  std::fill_n(weights + size, kLanes, weights[0]);
  Vec highest = broadcast(weights[0]);
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const Vec value = load(weights + i);
    highest = value > highest ? value : highest;
  }
  const float max = max_lane(highest);
  Vec total = {};
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const Vec value = exp(load(weights + i) - max);
    store(value, weights + i);
    total += load_first(weights + i, static_cast<int>(std::min<std::int64_t>(kLanes, size - i)));
  }
  return sum(total);
}

// out[d] = Σ weights[i] values[i][d] / total, over i in order, for `Vecs` vectors of d or the `left` elements of one.
template <class Element, int Vecs>
void weighted_sum(const Element* values, const std::vector<std::int64_t>& offsets, const float* weights, float total,
                  float* out, int left = kLanes) {
  Vec sums[Vecs] = {};
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    const Element* value = values + offsets[i];
    for (int v = 0; v < Vecs; ++v) sums[v] += load_first(value + v * kLanes, left) * weights[i];
  }
  for (int v = 0; v < Vecs; ++v) store_first(sums[v] / total, out + v * kLanes, left);
}

template <class Element>
void attend(const float* query, const Element* keys, const Element* values, std::int64_t head_dim, float scale,
            Scratch& own, float* out) {
  const std::int64_t size = static_cast<std::int64_t>(own.offsets.size());
  own.weights.resize(static_cast<std::size_t>(size + kLanes));
  for (std::int64_t i = 0; i < size; ++i) own.weights[i] = dot(query, keys + own.offsets[i], head_dim) * scale;
  const float total = exponentials(own.weights.data(), size);
  std::int64_t d = 0;
  for (; d + kSumVecs * kLanes <= head_dim; d += kSumVecs * kLanes)
    weighted_sum<Element, kSumVecs>(values + d, own.offsets, own.weights.data(), total, out + d);
  for (; d < head_dim; d += kLanes)
    weighted_sum<Element, 1>(values + d, own.offsets, own.weights.data(), total, out + d,
                             static_cast<int>(std::min<std::int64_t>(kLanes, head_dim - d)));
}

// Pairs (row, kv head) that make an item worth its while, or that give every thread several items.
std::int64_t pairs_in_item(const AttentionBatch& batch, const HeadCounts& counts, int threads) {
  std::int64_t entries = 0;
  for (std::int64_t row = 0; row < batch.rows; ++row) entries += batch.prefix_lengths[row] + 1;
  const std::int64_t pairs = batch.rows * counts.kv_heads;
  const std::int64_t work = entries * counts.heads * counts.head_dim * 2;
  const std::int64_t items = std::clamp<std::int64_t>(work / kItemWork, 1, threads * kItemsPerThread);
  return (pairs + items - 1) / items;
}

template <class Element>
void attend_all(ThreadPool& pool, const float* query, std::int64_t query_stride, const Element* keys,
                const Element* values, const AttentionBatch& batch, const HeadCounts& counts, float scale, float* out) {
  const std::int64_t pairs = batch.rows * counts.kv_heads, group = counts.heads / counts.kv_heads;
  const std::int64_t chunk = pairs_in_item(batch, counts, pool.threads());
  pool.parallel_for(static_cast<int>((pairs + chunk - 1) / chunk), [&](int item) {
    Scratch& own = scratch();
    std::int64_t listed = -1;
    for (std::int64_t pair = item * chunk; pair < std::min(pairs, (item + 1) * chunk); ++pair) {
      const std::int64_t row = pair / counts.kv_heads, kv_head = pair % counts.kv_heads;
      if (row != listed) visible_offsets(batch, row, counts.kv_heads * counts.head_dim, own.offsets);
      listed = row;
      for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        float* target = out + (row * counts.heads + head) * counts.head_dim;
        const std::int64_t kv = kv_head * counts.head_dim;
        if (own.offsets.empty())
          std::fill_n(target, counts.head_dim, 0.0f);
        else
          attend(query + row * query_stride + head * counts.head_dim, keys + kv, values + kv, counts.head_dim, scale,
                 own, target);
      }
    }
  });
}

}  // namespace

void tree_attention(ThreadPool& pool, const float* query, std::int64_t query_stride, const void* keys,
                    const void* values, bool kv_is_bfloat16, const AttentionBatch& batch, const HeadCounts& counts,
                    float scale, float* out) {
  if (batch.rows == 0) return;
  const auto run = [&](auto* typed_keys) {
    attend_all(pool, query, query_stride, typed_keys, static_cast<decltype(typed_keys)>(values), batch, counts, scale,
               out);
  };
  if (kv_is_bfloat16)
    run(static_cast<const bfloat16*>(keys));
  else
    run(static_cast<const float*>(keys));
}

}  // namespace specserve
