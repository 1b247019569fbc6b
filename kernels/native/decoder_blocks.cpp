#include "decoder_blocks.h"

#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "simd.h"

namespace specserve {
namespace {

// Elements that are worth an item of work.
constexpr std::int64_t kItemElements = 8192;

// Runs body(row) for every row, several rows in an item.
template <class Body>
void for_each_row(ThreadPool& pool, std::int64_t rows, std::int64_t elements_in_row, const Body& body) {
  const std::int64_t chunk = std::max<std::int64_t>(1, kItemElements / elements_in_row);
  pool.parallel_for(static_cast<int>((rows + chunk - 1) / chunk), [&](int item) {
    for (std::int64_t row = item * chunk; row < std::min(rows, (item + 1) * chunk); ++row) body(row);
  });
}

struct Buffers {
  Buffer normed, wide, narrow;
};

Buffers& buffers() {
  thread_local Buffers own;
  return own;
}

void norm_row(const float* x, const float* weight, float eps, std::int64_t size, float* out) {
  Vec squares = {};
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const Vec value = load_first(x + i, static_cast<int>(std::min<std::int64_t>(kLanes, size - i)));
    squares = fma(value, value, squares);
  }
  const float inverse = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const int count = static_cast<int>(std::min<std::int64_t>(kLanes, size - i));
    store_first(load_first(weight + i, count) * (load_first(x + i, count) * inverse), out + i, count);
  }
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

// Normalises and rotates the query and key heads of a row in place.
void position_heads(const AttentionLayer& layer, const float* cos, const float* sin, float* qkv) {
  for (std::int64_t head = 0; head < layer.heads + layer.kv_heads; ++head) {
    float* values = qkv + head * layer.head_dim;
    const float* norm = head < layer.heads ? layer.query_norm : layer.key_norm;
    if (norm) norm_row(values, norm, layer.norm_eps, layer.head_dim, values);
    rotate_head(values, cos, sin, layer.head_dim / 2);
  }
}

template <class Element>
void write_kv(const float* key, const float* value, std::int64_t size, Element* keys, Element* values) {
  for (std::int64_t i = 0; i < size; ++i) {
    from_float(key[i], keys + i);
    from_float(value[i], values + i);
  }
}

// The first two thirds of a layer's attention: rows of qkv from the normalised input, positioned, the cache written.
template <class Element>
void project(ThreadPool& pool, const AttentionLayer& layer, const AttentionBatch& batch, const float* normed,
             Element* keys, Element* values, float* qkv) {
  packed_linear(pool, normed, batch.rows, layer.qkv, nullptr, qkv);
  const std::int64_t half = layer.head_dim / 2, kv_size = layer.kv_heads * layer.head_dim;
  for_each_row(pool, batch.rows, layer.qkv.outputs, [&](std::int64_t row) {
    float* heads = qkv + row * layer.qkv.outputs;
    position_heads(layer, batch.cos + row * half, batch.sin + row * half, heads);
    const float* key = heads + layer.heads * layer.head_dim;
    const std::int64_t place = batch.slots[row] * kv_size;
    write_kv(key, key + kv_size, kv_size, keys + place, values + place);
  });
}

}  // namespace

void rms_norm(ThreadPool& pool, const float* x, const float* weight, float eps, std::int64_t rows, std::int64_t size,
              float* out) {
  for_each_row(pool, rows, size,
               [&](std::int64_t row) { norm_row(x + row * size, weight, eps, size, out + row * size); });
}

void attention_block(ThreadPool& pool, const AttentionLayer& layer, const AttentionBatch& batch, const float* hidden,
                     void* kv, std::int64_t slots, bool kv_is_bfloat16, bool residual, float* out) {
  const HeadCounts counts{layer.heads, layer.kv_heads, layer.head_dim};
  float* normed = buffers().normed.get(batch.rows * layer.qkv.inputs);
  float* qkv = buffers().wide.get(batch.rows * layer.qkv.outputs);
  float* attended = buffers().narrow.get(batch.rows * layer.output.inputs);
  rms_norm(pool, hidden, layer.norm, layer.norm_eps, batch.rows, layer.qkv.inputs, normed);
  const auto run = [&](auto* keys) {
    auto* values = keys + slots * layer.kv_heads * layer.head_dim;
    project(pool, layer, batch, normed, keys, values, qkv);
    tree_attention(pool, qkv, layer.qkv.outputs, keys, values, kv_is_bfloat16, batch, counts, layer.scale, attended);
  };
  if (kv_is_bfloat16)
    run(static_cast<bfloat16*>(kv));
  else
    run(static_cast<float*>(kv));
  packed_linear(pool, attended, batch.rows, layer.output, residual ? hidden : nullptr, out);
}

void mlp_block(ThreadPool& pool, const MlpLayer& layer, const float* hidden, std::int64_t rows, bool residual,
               float* out) {
  float* normed = buffers().normed.get(rows * layer.gate_up.inputs);
  float* active = buffers().wide.get(rows * layer.down.inputs);
  rms_norm(pool, hidden, layer.norm, layer.norm_eps, rows, layer.gate_up.inputs, normed);
  gated_linear(pool, normed, rows, layer.gate_up, active);
  packed_linear(pool, active, rows, layer.down, residual ? hidden : nullptr, out);
}

}  // namespace specserve
