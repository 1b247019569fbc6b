#include "decoder.h"

#include <algorithm>

#include "buffer.h"
#include "simd.h"

namespace specserve {
namespace {

struct Buffers {
  Buffer between, cos, sin, hidden, wanted;
};

Buffers& buffers() {
  thread_local Buffers own;
  return own;
}

template <class Element>
void widen(const Element* values, std::int64_t size, float* out) {
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const int count = static_cast<int>(std::min<std::int64_t>(kLanes, size - i));
    store_first(load_first(values + i, count), out + i, count);
  }
}

void embed(const Decoder& decoder, const std::int64_t* token_ids, std::int64_t rows, float* hidden) {
  const std::int64_t size = decoder.head.inputs;
  const auto run = [&](auto* table) {
    for (std::int64_t row = 0; row < rows; ++row) widen(table + token_ids[row] * size, size, hidden + row * size);
  };
  if (decoder.embedding_storage == Storage::kBFloat16) return run(static_cast<const bfloat16*>(decoder.embedding));
  if (decoder.embedding_storage == Storage::kFloat16) return run(static_cast<const float16*>(decoder.embedding));
  run(static_cast<const float*>(decoder.embedding));
}

const float* gather_rows(const float* table, const std::int64_t* rows, std::int64_t count, std::int64_t size,
                         Buffer& buffer) {
  float* gathered = buffer.get(count * size);
  for (std::int64_t i = 0; i < count; ++i) std::copy_n(table + rows[i] * size, size, gathered + i * size);
  return gathered;
}

}  // namespace

void decoder_forward(ThreadPool& pool, const Decoder& decoder, const KvCache& cache, const std::int64_t* token_ids,
                     const std::int64_t* positions, const AttentionBatch& batch, float* hidden) {
  if (batch.rows == 0) return;
  const AttentionLayer& shape = decoder.attention[0];
  const std::int64_t element = cache.is_bfloat16 ? sizeof(bfloat16) : sizeof(float);
  const std::int64_t layer_bytes = 2 * cache.slots * shape.kv_heads * shape.head_dim * element;
  float* between = buffers().between.get(batch.rows * decoder.head.inputs);
  AttentionBatch rotated = batch;
  rotated.cos = gather_rows(decoder.cos, positions, batch.rows, shape.head_dim / 2, buffers().cos);
  rotated.sin = gather_rows(decoder.sin, positions, batch.rows, shape.head_dim / 2, buffers().sin);
  embed(decoder, token_ids, batch.rows, hidden);
  for (std::int64_t layer = 0; layer < decoder.layers; ++layer) {
    attention_block(pool, decoder.attention[layer], rotated, hidden, static_cast<char*>(cache.data) + layer * layer_bytes,
                    cache.slots, cache.is_bfloat16 != 0, true, between);
    mlp_block(pool, decoder.mlp[layer], between, batch.rows, true, hidden);
  }
}

void decoder_logits(ThreadPool& pool, const Decoder& decoder, const float* hidden, std::int64_t rows, float* logits) {
  packed_linear(pool, {hidden, rows, decoder.final_norm, decoder.norm_eps}, decoder.head, nullptr, logits);
}

void decoder_step(ThreadPool& pool, const Decoder& decoder, const KvCache& cache, const std::int64_t* token_ids,
                  const std::int64_t* positions, const AttentionBatch& batch, const std::int64_t* wanted, std::int64_t count,
                  float* logits, std::int64_t* argmax) {
  const std::int64_t size = decoder.head.inputs;
  float* hidden = buffers().hidden.get(batch.rows * size);
  decoder_forward(pool, decoder, cache, token_ids, positions, batch, hidden);
  if (count == 0) return;
  decoder_logits(pool, decoder, gather_rows(hidden, wanted, count, size, buffers().wanted), count, logits);
  const std::int64_t vocab = decoder.head.outputs;
  pool.parallel_for(static_cast<int>(count), [&](int i) { argmax[i] = first_highest(logits + i * vocab, vocab); });
}

}  // namespace specserve
