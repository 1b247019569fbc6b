// A whole decoder of the Llama family, one call for all its layers.
#pragma once

#include <cstdint>

#include "decoder_blocks.h"

namespace specserve {

// The structures of this file are mirrored by ctypes: the order and the types of the fields are shared.
struct Decoder {
  const AttentionLayer* attention;  // [layers]
  const MlpLayer* mlp;              // [layers]
  std::int64_t layers;
  LinearWeights head;
  const float* final_norm;  // [hidden]
  float norm_eps;
  Storage embedding_storage;
  const void* embedding;  // [vocab, hidden]
  const float* cos;       // [context, head_dim / 2]
  const float* sin;
  std::int64_t vocab;
  std::int64_t context;
};

struct KvCache {
  void* data;  // [layers, 2, slots, kv_heads, head_dim]
  std::int64_t slots;
  std::int32_t is_bfloat16;
};

// hidden [batch.rows, hidden]: the last layer's output for the rows' tokens, whose keys and values are written into the
// cache. token_ids, positions: [rows], of the model. The batch's cos and sin are not read: they follow from the positions.
void decoder_forward(ThreadPool& pool, const Decoder& decoder, const KvCache& cache, const std::int64_t* token_ids,
                     const std::int64_t* positions, const AttentionBatch& batch, float* hidden);

// logits [rows, vocab] of hidden [rows, hidden].
void decoder_logits(ThreadPool& pool, const Decoder& decoder, const float* hidden, std::int64_t rows, float* logits);

// Both: logits [count, vocab] of the batch's rows wanted[0], ..., wanted[count - 1], and of each the first highest token.
void decoder_step(ThreadPool& pool, const Decoder& decoder, const KvCache& cache, const std::int64_t* token_ids,
                  const std::int64_t* positions, const AttentionBatch& batch, const std::int64_t* wanted, std::int64_t count,
                  float* logits, std::int64_t* argmax);

}  // namespace specserve
