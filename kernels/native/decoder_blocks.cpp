#include "decoder_blocks.h"

#include <algorithm>
#include <type_traits>

#include "buffer.h"
#include "rms_norm.h"
#include "simd.h"

namespace specserve {
namespace {

struct Buffers {
  Buffer wide, narrow;
  BufferOf<bfloat16> rounded;
};

Buffers& buffers() {
  thread_local Buffers own;
  return own;
}

// (a, b) <- (a cos - b sin, b cos + a sin) for the pairs (d, d + half).
void rotate_head(float* head, const float* cos, const float* sin, std::int64_t half) {
  for (std::int64_t i = 0; i < half; i += kLanes) {
    const int count = static_cast<int>(std::min<std::int64_t>(kLanes, half - i));
    const Vec a = load_first(head + i, count), b = load_first(head + half + i, count);
    const Vec c = load_first(cos + i, count), s = load_first(sin + i, count);
    store_first(a * c - b * s, head + i, count);
    store_first(b * c + a * s, head + half + i, count);
  }
}

template <class Element>
void write_kv(const float* source, std::int64_t size, Element* target) {
  for (std::int64_t i = 0; i < size; ++i) from_float(source[i], target + i);
}

// A layer's part of the cache.
template <class Element>
struct LayerCache {
  Element *keys, *values;  // [slots, kv_heads, head_dim] each
};

// Heads first..end of a row of qkv: queries and keys are normalised and rotated in place, keys and values written to
// the cache.
template <class Element>
void place_heads(const AttentionLayer& layer, const AttentionBatch& batch, std::int64_t row, std::int64_t first,
                 std::int64_t end, float* qkv, const LayerCache<Element>& cache) {
  const std::int64_t size = layer.head_dim, half = size / 2, keys = layer.heads, values = keys + layer.kv_heads;
  const std::int64_t place = batch.slots[row] * layer.kv_heads * size;
  for (std::int64_t head = first; head < end; ++head) {
    float* own = qkv + row * layer.qkv.outputs + head * size;
    if (head >= values) {
      write_kv(own, size, cache.values + place + (head - values) * size);
      continue;
    }
    const float* norm = head < keys ? layer.query_norm : layer.key_norm;
    if (norm) norm_row(own, norm, layer.norm_eps, size, own);
    rotate_head(own, batch.cos + row * half, batch.sin + row * half, half);
    if (head >= keys) write_kv(own, size, cache.keys + place + (head - keys) * size);
  }
}

// Queries, keys and values of the normalised rows, positioned; keys and values are in the cache afterwards.
template <class Element>
void project(ThreadPool& pool, const AttentionLayer& layer, const AttentionBatch& batch, const float* hidden,
             const LayerCache<Element>& cache, float* qkv) {
  const auto use = [&](std::int64_t row, std::int64_t row_end, std::int64_t output, std::int64_t output_end) {
    for (; row < row_end; ++row)
      place_heads(layer, batch, row, output / layer.head_dim, output_end / layer.head_dim, qkv, cache);
  };
  packed_linear(pool, {hidden, batch.rows, layer.norm, layer.norm_eps}, layer.qkv, nullptr, qkv, {layer.head_dim, use});
}

// What make(place) puts into [rows, inputs] times the weights; where `may_round`, rounded as it is made if the product
// takes it so.
template <class Make>
void multiply_made(ThreadPool& pool, const LinearWeights& weights, std::int64_t rows, Buffer& place, bool may_round,
                   const float* residual, float* out, const Make& make) {
  LinearInput input{nullptr, rows};
  if (may_round && takes_rounded(weights)) {
    bfloat16* rounded = buffers().rounded.get(rows * weights.inputs);
    make(rounded);
    input.rounded = rounded;
  } else {
    float* made = place.get(rows * weights.inputs);
    make(made);
    input.x = made;
  }
  packed_linear(pool, input, weights, residual, out);
}

}  // namespace

void attention_block(ThreadPool& pool, const AttentionLayer& layer, const AttentionBatch& batch, const float* hidden,
                     void* kv, std::int64_t slots, bool kv_is_bfloat16, bool residual, float* out) {
  const HeadCounts counts{layer.heads, layer.kv_heads, layer.head_dim};
  const bool whole_vectors = layer.head_dim % kLanes == 0;
  float* qkv = buffers().wide.get(batch.rows * layer.qkv.outputs);
  const auto run = [&](auto* keys) {
    auto* values = keys + slots * layer.kv_heads * layer.head_dim;
    project(pool, layer, batch, hidden, LayerCache<std::remove_pointer_t<decltype(keys)>>{keys, values}, qkv);
    const auto attend = [&](auto* attended) {
      tree_attention(pool, qkv, layer.qkv.outputs, keys, values, kv_is_bfloat16, batch, counts, layer.scale, attended);
    };
    multiply_made(pool, layer.output, batch.rows, buffers().narrow, whole_vectors, residual ? hidden : nullptr, out, attend);
  };
  if (kv_is_bfloat16)
    run(static_cast<bfloat16*>(kv));
  else
    run(static_cast<float*>(kv));
}

void mlp_block(ThreadPool& pool, const MlpLayer& layer, const float* hidden, std::int64_t rows, bool residual,
               float* out) {
  const auto activate = [&](auto* active) {
    gated_linear(pool, {hidden, rows, layer.norm, layer.norm_eps}, layer.gate_up, active);
  };
  multiply_made(pool, layer.down, rows, buffers().wide, true, residual ? hidden : nullptr, out, activate);
}

}  // namespace specserve
