// The trees of several drafts made one, by the rules of speculation/merge.py, with the corrections of
// speculation/experience.py.
#pragma once

#include <cstdint>

namespace specserve {

// The structures of this file are mirrored by ctypes: the order and the types of the fields are shared.

// Factors of confidences, by depth, as logarithms; deeper nodes have none. They go to starts[table + 1].
struct ScaleTables {
  const std::int32_t* starts;  // [tables + 1]
  const double* scales;
};

// Trees of several sequences, the nodes of one behind those of the other: token_ids, parents, confidences [nodes].
struct Drafts {
  const std::int32_t* trees;         // [sequences], of each
  const std::int32_t* sizes;         // [trees], nodes
  const std::int32_t* tables;        // [trees], what corrects their confidences
  const std::int32_t* union_tables;  // [sequences], what corrects those of the union again
  const std::int32_t* most_nodes;    // [sequences], that a union keeps, the root not counted
  const std::int32_t* token_ids;
  const std::int32_t* parents;
  const double* confidences;
};

// The union of each sequence, from the place of its first tree's first node on: depth-first, siblings by falling confidence.
// maps: [nodes of all trees], each node's place in its union or -1. A single tree stays in its order, whole, and is
// corrected once.
struct Unions {
  std::int32_t* sizes;    // [sequences]
  std::int32_t* deepest;  // [sequences], level of all trees
  std::int32_t* token_ids;
  std::int32_t* parents;
  double* confidences;
  double* corrected;
  std::int32_t* maps;
};

void merge_trees(const ScaleTables& tables, const Drafts& drafts, std::int64_t sequences, const Unions& unions);

}  // namespace specserve
