// A token tree while it grows: the rules of speculation/expansion.py for trees without sampled children.
#pragma once

#include <cstdint>
#include <vector>

#include "child_choice.h"

namespace specserve {

// The structures of this file are mirrored by ctypes: the order and the types of the fields are shared.

// Best-first: at each depth the `beam` most probable of the nodes that belong to the best max_nodes are evaluated, if their
// log-probability is not below `floor`. With widths: a node of depth i has widths[i] children. The root is no node here.
struct TreeBounds {
  std::int64_t max_nodes;
  std::int64_t max_depth;
  std::int64_t beam;
  float floor;
  const std::int64_t* widths;  // [max_depth] or null
};

// nodes: of the tree, depth-first, the root first, whose parent is -1; confidences are log-probabilities of paths. Room for
// 1 + max_nodes. slots: entry j behind the sequence's committed ones holds the key and value of token slot_tokens[j] below
// slot slot_parents[j]; the root's slot is 0. Room for most_slots().
struct GrownTree {
  std::int32_t* token_ids;
  std::int32_t* parents;
  float* confidences;
  std::int32_t* slot_tokens;
  std::int32_t* slot_parents;
  std::int64_t nodes;
  std::int64_t slots;
};

inline std::int64_t most_slots(const TreeBounds& bounds) {
  return bounds.widths ? bounds.max_nodes + 1 : 1 + bounds.beam * bounds.max_depth;
}

class TreeGrowth {
 public:
  // words: 64-bit words of a mask over the slots.
  TreeGrowth(const TreeBounds& bounds, std::int32_t root, std::int64_t words);

  // The nodes whose children are wanted now, all of one depth; empty when the tree is done.
  const std::vector<std::int32_t>& frontier() const { return frontier_; }
  std::int32_t token(std::int32_t node) const { return token_ids_[node]; }
  float confidence(std::int32_t node) const { return confidences_[node]; }

  // Most children of a node of the frontier.
  std::int64_t width() const { return width_at(depth_); }

  // Adds children of the frontier: children[i] are the candidates of its i-th node, best first.
  void extend(const std::vector<Candidate>* children);

  // Gives the frontier's nodes the next slots; returns the first of them.
  std::int64_t claim_slots();
  const std::uint64_t* slot_mask(std::int64_t slot) const { return masks_.data() + slot * words_; }

  void finish(GrownTree& tree) const;

 private:
  std::int64_t nodes() const { return static_cast<std::int64_t>(token_ids_.size()); }
  std::int64_t left() const { return bounds_.max_nodes + 1 - nodes(); }
  std::int64_t width_at(std::int64_t depth) const;
  void add(std::int32_t token, std::int32_t parent, float confidence);
  std::vector<std::int64_t> share_by_rank(const std::vector<Candidate>* children) const;
  std::vector<std::int64_t> share_by_confidence(const std::vector<Candidate>* children) const;
  std::vector<std::int32_t> best_nodes(std::vector<std::int32_t> nodes, std::int64_t count) const;
  std::vector<std::int32_t> kept() const;
  void choose_frontier(std::int32_t first);

  const TreeBounds bounds_;
  const std::int64_t words_;
  std::int64_t depth_ = 0;  // of the frontier
  std::vector<std::int32_t> token_ids_, parents_, frontier_;
  std::vector<float> confidences_;
  std::vector<std::int32_t> slot_of_;    // by node, -1 without
  std::vector<std::int32_t> evaluated_;  // node by slot
  std::vector<std::uint64_t> masks_;     // by slot
};

}  // namespace specserve
