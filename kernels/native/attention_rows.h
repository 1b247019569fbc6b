// What the implementations of tree attention share.
#pragma once

#include <cstdint>

#include "tree_attention.h"

namespace specserve {

template <class Element>
struct AttentionOperands {
  const float* query;
  std::int64_t query_stride;
  const Element* keys;
  const Element* values;
  const AttentionBatch& batch;
  const HeadCounts& counts;
  float scale;
};

// Consecutive rows of one sequence. All of them see its first `common` entries.
struct RowGroup {
  std::int64_t first, rows, common;
};

inline std::int64_t slot_of(const AttentionBatch& batch, std::int64_t row, std::int64_t entry) {
  const std::int32_t* table = batch.block_tables + batch.row_sequences[row] * batch.max_blocks;
  return table[entry / batch.block_size] * batch.block_size + entry % batch.block_size;
}

// use(entry) for the entries behind the row's prefix that it sees, in logical order.
template <class Use>
void for_tree_entries(const AttentionBatch& batch, std::int64_t row, const Use& use) {
  for (std::int64_t word = 0; word < batch.words; ++word)
    for (std::uint64_t bits = batch.masks[row * batch.words + word]; bits != 0; bits &= bits - 1)
      use(batch.prefix_lengths[row] + 64 * word + __builtin_ctzll(bits));
}

}  // namespace specserve
