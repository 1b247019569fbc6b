// The two halves of a decoder layer of the Llama family, each one call.
#pragma once

#include <cstdint>

#include "packed_linear.h"
#include "tree_attention.h"

namespace specserve {

// Mirrored by ctypes structures: the order and the types of the fields are shared.
struct AttentionLayer {
  LinearWeights qkv;
  LinearWeights output;
  const float* norm;        // [hidden]
  const float* query_norm;  // [head_dim] or null
  const float* key_norm;    // [head_dim] or null
  std::int64_t heads;
  std::int64_t kv_heads;
  std::int64_t head_dim;
  float norm_eps;
  float scale;
};

struct MlpLayer {
  LinearWeights gate_up;  // gated
  LinearWeights down;
  const float* norm;  // [hidden]
  float norm_eps;
};

// kv: [2, slots, kv_heads, head_dim]; hidden, out: [rows, hidden].
void attention_block(ThreadPool& pool, const AttentionLayer& layer, const AttentionBatch& batch, const float* hidden,
                     void* kv, std::int64_t slots, bool kv_is_bfloat16, bool residual, float* out);

void mlp_block(ThreadPool& pool, const MlpLayer& layer, const float* hidden, std::int64_t rows, bool residual,
               float* out);

}  // namespace specserve
