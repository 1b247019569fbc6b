#include "tree_merging.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace specserve {
namespace {

// log(p + q - p q) for a = log p and b = log q.
double either(double a, double b) {
  const double high = std::max(a, b), low = std::min(a, b);
  return high + std::log1p(-std::expm1(high) * std::exp(low - high));
}

struct Nodes {
  const std::int32_t *token_ids, *parents;
  const double* confidences;
  std::int32_t count;
};

// corrected[i]: the confidence of node i times the factor of its depth, at most its parent's; the depth of the deepest.
std::int32_t correct(const ScaleTables& tables, std::int32_t table, const Nodes& nodes, std::vector<std::int32_t>& depths,
                     double* corrected) {
  const double* scales = tables.scales + tables.starts[table];
  const std::int32_t known = tables.starts[table + 1] - tables.starts[table];
  depths.assign(1, 0);
  corrected[0] = 0.0;
  for (std::int32_t node = 1; node < nodes.count; ++node) {
    const std::int32_t parent = nodes.parents[node], depth = depths[parent] + 1;
    depths.push_back(depth);
    const double confidence = nodes.confidences[node] + (depth < known ? scales[depth] : 0.0);
    corrected[node] = std::min(confidence, corrected[parent]);
  }
  return *std::max_element(depths.begin(), depths.end());
}

// Trees being merged; lists are indexed by merged node, in the order in which the nodes were first met.
class Union {
 public:
  void begin(std::int32_t root) {
    for (auto* list : {&token_ids_, &parents_, &first_child_, &last_child_, &next_sibling_}) list->clear();
    confidences_.clear();
    append(root, -1, 0.0);
  }

  // map[i]: the merged node of node i.
  void add(const Nodes& tree, const double* confidences, std::int32_t* map) {
    map[0] = 0;
    for (std::int32_t node = 1; node < tree.count; ++node) {
      const std::int32_t above = map[tree.parents[node]];
      std::int32_t merged = first_child_[above];
      while (merged >= 0 && token_ids_[merged] != tree.token_ids[node]) merged = next_sibling_[merged];
      if (merged < 0)
        merged = append(tree.token_ids[node], above, confidences[node]);
      else  // rounding must not make a child surer than its parent
        confidences_[merged] = std::min(either(confidences_[merged], confidences[node]), confidences_[above]);
      map[node] = merged;
    }
  }

  // Writes the root and the `most` most probable other nodes; place[i]: where merged node i went, or -1.
  std::int32_t finish(std::int32_t most, std::int32_t* token_ids, std::int32_t* parents, double* confidences,
                      std::vector<std::int32_t>& place) {
    // Stable: of equally probable nodes the one first met comes first, a parent before its child.
    std::vector<std::int32_t>& kept = order_;
    kept.resize(token_ids_.size());
    std::iota(kept.begin(), kept.end(), 0);
    std::stable_sort(kept.begin(), kept.end(),
                     [this](std::int32_t a, std::int32_t b) { return confidences_[a] > confidences_[b]; });
    kept.resize(std::min(kept.size(), static_cast<std::size_t>(most) + 1));
    first_child_.assign(token_ids_.size(), -1);
    for (auto node = kept.rbegin(); *node != 0; ++node) {
      next_sibling_[*node] = first_child_[parents_[*node]];
      first_child_[parents_[*node]] = *node;
    }
    place.assign(token_ids_.size(), -1);
    std::int32_t count = 0;
    for (std::int32_t node = 0; node >= 0; node = behind(node)) {
      place[node] = count;
      token_ids[count] = token_ids_[node];
      parents[count] = node == 0 ? -1 : place[parents_[node]];
      confidences[count++] = confidences_[node];
    }
    return count;
  }

 private:
  std::int32_t append(std::int32_t token, std::int32_t parent, double confidence) {
    const std::int32_t node = static_cast<std::int32_t>(token_ids_.size());
    token_ids_.push_back(token);
    parents_.push_back(parent);
    confidences_.push_back(confidence);
    for (auto* list : {&first_child_, &last_child_, &next_sibling_}) list->push_back(-1);
    if (parent >= 0) {
      (first_child_[parent] < 0 ? first_child_[parent] : next_sibling_[last_child_[parent]]) = node;
      last_child_[parent] = node;
    }
    return node;
  }

  // The node behind another in depth-first order; -1 behind the last.
  std::int32_t behind(std::int32_t node) const {
    if (first_child_[node] >= 0) return first_child_[node];
    while (node > 0 && next_sibling_[node] < 0) node = parents_[node];
    return node > 0 ? next_sibling_[node] : -1;
  }

  std::vector<std::int32_t> token_ids_, parents_, first_child_, last_child_, next_sibling_, order_;
  std::vector<double> confidences_;
};

}  // namespace

void merge_trees(const ScaleTables& tables, const Drafts& drafts, std::int64_t sequences, const Unions& unions) {
  thread_local Union merged;
  thread_local std::vector<std::int32_t> depths, place;
  thread_local std::vector<double> corrected;
  std::int64_t tree = 0, node = 0;
  for (std::int64_t sequence = 0; sequence < sequences; ++sequence) {
    const std::int64_t first = node;
    const std::int32_t trees = drafts.trees[sequence];
    std::int32_t& deepest = unions.deepest[sequence] = 0;
    merged.begin(drafts.token_ids[first]);
    for (std::int32_t i = 0; i < trees; ++i, ++tree) {
      const Nodes nodes{drafts.token_ids + node, drafts.parents + node, drafts.confidences + node, drafts.sizes[tree]};
      corrected.resize(static_cast<std::size_t>(nodes.count));
      double* own = trees == 1 ? unions.corrected + first : corrected.data();
      deepest = std::max(deepest, correct(tables, drafts.tables[tree], nodes, depths, own));
      if (trees > 1) merged.add(nodes, own, unions.maps + node);
      node += nodes.count;
    }
    if (trees == 1) continue;
    std::int32_t *token_ids = unions.token_ids + first, *parents = unions.parents + first;
    double* confidences = unions.confidences + first;
    const std::int32_t count = unions.sizes[sequence] =
        merged.finish(drafts.most_nodes[sequence], token_ids, parents, confidences, place);
    for (std::int64_t i = first; i < node; ++i) unions.maps[i] = place[unions.maps[i]];
    correct(tables, drafts.union_tables[sequence], {token_ids, parents, confidences, count}, depths, unions.corrected + first);
  }
}

}  // namespace specserve
