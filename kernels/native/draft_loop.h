// A small model that grows a token tree by itself: all levels in one call.
#pragma once

#include <cstdint>

#include "decoder.h"

namespace specserve {

// The structures of this file are mirrored by ctypes: the order and the types of the fields are shared.

// One sequence in the paged cache, whose first `length` entries are computed.
struct SequenceCache {
  KvCache kv;
  const std::int32_t* block_table;
  std::int64_t max_blocks;
  std::int64_t block_size;
  std::int64_t length;
};

// The shape of the tree. Best-first: at each depth the `beam` most probable of the nodes that belong to the best
// max_nodes are evaluated. With widths: a node of depth i has widths[i] children. No node of a log-probability below
// `floor` is evaluated. The root does not count as a node. The probability of a child is softmax(logits / temperature).
struct TreeBounds {
  std::int64_t max_nodes;
  std::int64_t max_depth;
  std::int64_t beam;
  float floor;
  float temperature;
  const std::int64_t* widths;  // [max_depth] or null
};

// All candidates in the order in which they were added, the root first; room for 1 + max_nodes * max_depth of each.
struct GrownTree {
  std::int32_t* token_ids;
  std::int32_t* parents;
  float* confidences;        // log-probability of the path
  std::int32_t* evaluated;   // slot j behind the sequence's committed entries holds evaluated[j]; the root is slot 0
  std::int64_t nodes;
  std::int64_t evaluated_count;
};

// Computes the sequence's last `pending` tokens, the last of which is the root, then grows the tree below it.
void grow_tree(ThreadPool& pool, const Decoder& decoder, const SequenceCache& cache, const std::int64_t* pending_tokens,
               std::int64_t pending, const TreeBounds& bounds, GrownTree& tree);

}  // namespace specserve
