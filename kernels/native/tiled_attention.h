// Attention of a few rows over a cache of bf16 by whole matrix tiles.
#pragma once

#include "attention_rows.h"
#include "matrix_tiles.h"

namespace specserve {

// Whether these operands can be taken so.
bool tiles_attend(const AttentionBatch& batch, const HeadCounts& counts);

// Queries of one key head that are taken together, at most: a group has no more than kTiledLines / (heads / kv_heads) rows.
constexpr std::int64_t kTiledLines = kTileSide;

// The weighted sums of values, [lines, head_dim], and the sums of weights, [lines], of a group's queries of one key head, row
// after row; a line that sees nothing has 0 and 1. They are the calling thread's until it calls again.
struct LineSums {
  const float* values;
  const float* weights;
};

// Queries and weights are rounded to bf16. A line's sums are taken over what it sees in logical order, 32 entries at a time,
// whatever the other rows of the group are. The thread's tiles have been shaped for 32 rows.
LineSums attend_in_tiles(const AttentionOperands<bfloat16>& p, const RowGroup& group, std::int64_t kv_head);

}  // namespace specserve
