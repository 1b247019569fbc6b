#include "tree_growth.h"

#include <algorithm>
#include <numeric>

namespace specserve {

TreeGrowth::TreeGrowth(const TreeBounds& bounds, std::int32_t root, std::int64_t words)
    : bounds_(bounds), words_(words) {
  add(root, -1, 0.0f);
  frontier_.assign(1, 0);
  claim_slots();
  if (width() <= 0) frontier_.clear();
}

void TreeGrowth::extend(const std::vector<Candidate>* children) {
  const std::int32_t first = static_cast<std::int32_t>(nodes());
  const auto counts = bounds_.widths ? share_by_rank(children) : share_by_confidence(children);
  const std::vector<std::int32_t> parents = frontier_;
  for (std::size_t row = 0; row < parents.size(); ++row)
    for (std::int64_t i = 0; i < counts[row]; ++i) add(children[row][i].token, parents[row], children[row][i].confidence);
  ++depth_;
  choose_frontier(first);
}

std::int64_t TreeGrowth::claim_slots() {
  const std::size_t first = evaluated_.size();
  for (const std::int32_t node : frontier_) {
    const std::size_t slot = evaluated_.size(), words = static_cast<std::size_t>(words_);
    masks_.resize((slot + 1) * words, 0);
    if (parents_[node] >= 0) std::copy_n(masks_.begin() + slot_of_[parents_[node]] * words_, words, masks_.end() - words_);
    masks_[slot * words + slot / 64] |= std::uint64_t{1} << slot % 64;
    slot_of_[node] = static_cast<std::int32_t>(slot);
    evaluated_.push_back(node);
  }
  return static_cast<std::int64_t>(first);
}

void TreeGrowth::finish(GrownTree& tree) const {
  // Children stand behind their parents and siblings in order, so that, pushed from the last to the first, each node finds
  // its subtree below it on the stack.
  const std::vector<std::int32_t> nodes = kept();
  std::vector<std::int32_t> place(token_ids_.size(), -1), stack{0};
  tree.nodes = 0;
  while (!stack.empty()) {
    const std::int32_t node = stack.back();
    stack.pop_back();
    place[node] = static_cast<std::int32_t>(tree.nodes);
    tree.token_ids[tree.nodes] = token_ids_[node];
    tree.parents[tree.nodes] = parents_[node] < 0 ? -1 : place[parents_[node]];
    tree.confidences[tree.nodes] = confidences_[node];
    ++tree.nodes;
    for (auto child = nodes.rbegin(); child != nodes.rend() && *child > node; ++child)
      if (parents_[*child] == node) stack.push_back(*child);
  }
  tree.slots = static_cast<std::int64_t>(evaluated_.size());
  for (std::size_t slot = 0; slot < evaluated_.size(); ++slot) {
    tree.slot_tokens[slot] = token_ids_[evaluated_[slot]];
    tree.slot_parents[slot] = slot == 0 ? -1 : slot_of_[parents_[evaluated_[slot]]];
  }
}

std::int64_t TreeGrowth::width_at(std::int64_t depth) const {
  if (depth >= bounds_.max_depth) return 0;
  return bounds_.widths ? std::min(bounds_.widths[depth], left()) : bounds_.max_nodes;
}

void TreeGrowth::add(std::int32_t token, std::int32_t parent, float confidence) {
  token_ids_.push_back(token);
  parents_.push_back(parent);
  confidences_.push_back(confidence);
  slot_of_.push_back(-1);
}

// First children before second ones, while nodes are left.
std::vector<std::int64_t> TreeGrowth::share_by_rank(const std::vector<Candidate>* children) const {
  std::vector<std::int64_t> counts(frontier_.size(), 0);
  std::int64_t spare = left();
  for (std::int64_t rank = 0; rank < bounds_.widths[depth_]; ++rank)
    for (std::size_t row = 0; row < frontier_.size(); ++row)
      if (rank < static_cast<std::int64_t>(children[row].size()) && spare > 0) ++counts[row], --spare;
  return counts;
}

// The most probable of all rows together.
std::vector<std::int64_t> TreeGrowth::share_by_confidence(const std::vector<Candidate>* children) const {
  std::vector<std::int64_t> counts(frontier_.size(), 0);
  for (std::int64_t taken = 0; taken < bounds_.max_nodes; ++taken) {
    std::int64_t best = -1;
    for (std::size_t row = 0; row < frontier_.size(); ++row) {
      if (counts[row] == static_cast<std::int64_t>(children[row].size())) continue;
      if (best < 0 || children[row][counts[row]].confidence > children[best][counts[best]].confidence)
        best = static_cast<std::int64_t>(row);
    }
    if (best < 0) break;
    ++counts[best];
  }
  return counts;
}

// The `count` most probable of some nodes, in rising order; of equally probable ones those added first.
std::vector<std::int32_t> TreeGrowth::best_nodes(std::vector<std::int32_t> nodes, std::int64_t count) const {
  if (static_cast<std::int64_t>(nodes.size()) <= count) return nodes;
  std::nth_element(nodes.begin(), nodes.begin() + count, nodes.end(), [this](std::int32_t a, std::int32_t b) {
    return confidences_[a] > confidences_[b] || (confidences_[a] == confidences_[b] && a < b);
  });
  nodes.resize(static_cast<std::size_t>(count));
  std::sort(nodes.begin(), nodes.end());
  return nodes;
}

// The nodes of the tree as it is now, in rising order. A parent is no less probable than its child and was added before it.
std::vector<std::int32_t> TreeGrowth::kept() const {
  std::vector<std::int32_t> all(token_ids_.size());
  std::iota(all.begin(), all.end(), 0);
  return best_nodes(std::move(all), bounds_.max_nodes + 1);
}

// Which of the nodes from `first` on get children.
void TreeGrowth::choose_frontier(std::int32_t first) {
  frontier_.clear();
  if (width() <= 0) return;
  for (const std::int32_t node : kept())
    if (node >= first && confidences_[node] >= bounds_.floor) frontier_.push_back(node);
  if (bounds_.widths)
    frontier_.resize(std::min(frontier_.size(), static_cast<std::size_t>(left())));
  else
    frontier_ = best_nodes(std::move(frontier_), bounds_.beam);
}

}  // namespace specserve
