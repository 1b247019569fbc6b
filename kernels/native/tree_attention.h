// Attention of query rows over what each sees of a paged cache. kernels/blocks.py describes the operands.
#pragma once

#include <cstdint>

#include "simd.h"
#include "thread_pool.h"

namespace specserve {

// Mirrored by a ctypes structure: the order and the types of the fields are shared.
struct AttentionBatch {
  const std::int32_t* block_tables;  // [sequences, max_blocks]
  std::int64_t max_blocks;
  std::int64_t block_size;
  const std::int32_t* row_sequences;   // [rows]
  const std::int32_t* prefix_lengths;  // [rows]
  const std::uint64_t* masks;          // [rows, words]
  std::int64_t words;
  const std::int64_t* slots;  // [rows]
  const float* cos;           // [rows, head_dim / 2]
  const float* sin;
  std::int64_t rows;
};

struct HeadCounts {
  std::int64_t heads, kv_heads, head_dim;
};

// query: [rows, heads, head_dim], `query_stride` floats from one row to the next; keys, values: [slots, kv_heads,
// head_dim], float or bfloat16; out: [rows, heads, head_dim], rounded for the next layer where it is bf16; then head_dim
// is a multiple of kLanes.
//
// The visible entries of a row are taken in logical order and every reduction runs over that list alone, so that a tree
// node and the same token at the end of a plain sequence get the same bits.
void tree_attention(ThreadPool& pool, const float* query, std::int64_t query_stride, const void* keys,
                    const void* values, bool kv_is_bfloat16, const AttentionBatch& batch, const HeadCounts& counts,
                    float scale, float* out);
void tree_attention(ThreadPool& pool, const float* query, std::int64_t query_stride, const void* keys,
                    const void* values, bool kv_is_bfloat16, const AttentionBatch& batch, const HeadCounts& counts,
                    float scale, bfloat16* out);

}  // namespace specserve
