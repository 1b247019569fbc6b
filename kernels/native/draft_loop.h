// Small models that grow token trees by themselves: all levels of all sequences in one call.
#pragma once

#include <cstdint>

#include "child_choice.h"
#include "decoder.h"
#include "tree_growth.h"

namespace specserve {

// Mirrored by a ctypes structure: the order and the types of the fields are shared.
//
// One sequence in the paged cache, whose first `length` entries are computed, and the tree that is wanted of it. pending:
// the tokens behind those entries; the last of them is the tree's root. The block table is long enough for them and for
// most_slots(bounds) - 1 entries more.
struct DraftSequence {
  const std::int32_t* block_table;
  std::int64_t blocks;
  std::int64_t length;
  const std::int64_t* pending;
  std::int64_t pending_count;
  TreeBounds bounds;
  ChildRule rule;
};

// Computes the pending tokens of `count` sequences and grows their trees; the sequences' frontiers are one pass for each
// level. The tree of a sequence does not depend on the others.
void grow_trees(ThreadPool& pool, const Decoder& decoder, const KvCache& cache, std::int64_t block_size,
                const DraftSequence* sequences, std::int64_t count, GrownTree* trees);

}  // namespace specserve
