#include "draft_loop.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "buffer.h"
#include "simd.h"

namespace specserve {
namespace {

// The rows of one forward pass over one sequence.
struct Rows {
  std::vector<std::int64_t> tokens, positions, slots;
  std::vector<std::int32_t> sequences, prefix_lengths;
  std::vector<std::uint64_t> masks;
  std::int64_t words = 1;

  explicit Rows(std::int64_t words) : words(words) {}

  std::int64_t count() const { return static_cast<std::int64_t>(tokens.size()); }

  void clear() {
    for (auto* list : {&tokens, &positions, &slots}) list->clear();
    for (auto* list : {&sequences, &prefix_lengths}) list->clear();
    masks.clear();
  }

  // A row that writes logical entry `entry`, sees those before `prefix`, and of those behind the bits of `mask`.
  void add(const SequenceCache& cache, std::int64_t token, std::int64_t position, std::int64_t entry,
           std::int64_t prefix, const std::uint64_t* mask) {
    tokens.push_back(token);
    positions.push_back(position);
    slots.push_back(cache.block_table[entry / cache.block_size] * cache.block_size + entry % cache.block_size);
    sequences.push_back(0);
    prefix_lengths.push_back(static_cast<std::int32_t>(prefix));
    for (std::int64_t word = 0; word < words; ++word) masks.push_back(mask ? mask[word] : 0);
  }
};

// Runs the decoder over rows; keeps its buffers from one pass to the next.
class Pass {
 public:
  Pass(ThreadPool& pool, const Decoder& decoder, const SequenceCache& cache)
      : pool_(pool), decoder_(decoder), cache_(cache) {}

  // Logits of the rows from `first` on, [count - first, vocab].
  const float* logits(const Rows& rows, std::int64_t first) {
    const std::int64_t count = rows.count(), size = decoder_.head.inputs;
    float* hidden = hidden_.get(count * size);
    float* logits = logits_.get((count - first) * decoder_.head.outputs);
    const AttentionBatch batch{cache_.block_table,         cache_.max_blocks, cache_.block_size, rows.sequences.data(),
                               rows.prefix_lengths.data(), rows.masks.data(), rows.words,        rows.slots.data(),
                               nullptr,                    nullptr,           count};
    decoder_forward(pool_, decoder_, cache_.kv, rows.tokens.data(), rows.positions.data(), batch, hidden);
    decoder_logits(pool_, decoder_, hidden + first * size, count - first, logits);
    return logits;
  }

 private:
  ThreadPool& pool_;
  const Decoder& decoder_;
  const SequenceCache& cache_;
  Buffer hidden_, logits_;
};

// log(sum(exp(scale * values))), for a scale above 0.
float log_sum_exp(const float* values, std::int64_t size, float scale) {
  Vec highest = broadcast(-std::numeric_limits<float>::infinity());
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec value = load(values + i);
    highest = value > highest ? value : highest;
  }
  float top = max_lane(highest);
  for (std::int64_t j = i; j < size; ++j) top = std::max(top, values[j]);
  Vec total = {};
  for (i = 0; i + kLanes <= size; i += kLanes) total += exp((load(values + i) - top) * scale);
  float rest = sum(total);
  for (; i < size; ++i) rest += std::exp((values[i] - top) * scale);
  return top * scale + std::log(rest);
}

struct Candidate {
  float confidence;
  std::int32_t token;
};

// The `width` largest values, best first; of equal ones the lower index.
void best_of(const float* values, std::int64_t size, std::int64_t width, std::vector<Candidate>& best) {
  best.clear();
  for (std::int64_t i = 0; i < size; ++i) {
    if (static_cast<std::int64_t>(best.size()) == width && !(values[i] > best.back().confidence)) continue;
    if (static_cast<std::int64_t>(best.size()) == width) best.pop_back();
    auto place = best.end();
    while (place != best.begin() && values[i] > (place - 1)->confidence) --place;
    best.insert(place, Candidate{values[i], static_cast<std::int32_t>(i)});
  }
}

// The tree while it grows; the same rules as speculation/expansion.py.
class Growth {
 public:
  Growth(const TreeBounds& bounds, GrownTree& tree, std::int64_t words) : bounds_(bounds), tree_(tree), words_(words) {}

  void start(std::int32_t root) {
    tree_.nodes = 0;
    tree_.evaluated_count = 0;
    add(root, -1, 0.0f);
    masks_.assign(static_cast<std::size_t>(words_), 0);
    masks_[0] = 1;
    tree_.evaluated[tree_.evaluated_count++] = 0;
  }

  std::int64_t width(std::int64_t depth) const {
    if (depth >= bounds_.max_depth) return 0;
    return bounds_.widths ? std::min(bounds_.widths[depth], left()) : bounds_.max_nodes;
  }

  // Adds the children of the frontier, of this depth, from its logits; the new frontier is in frontier().
  void extend(const float* logits, std::int64_t vocab, std::int64_t depth) {
    const std::int64_t wanted = std::min(width(depth), vocab), first = tree_.nodes;
    const float scale = 1 / bounds_.temperature;
    candidates_.resize(frontier_.size());
    for (std::size_t row = 0; row < frontier_.size(); ++row) {
      const float* values = logits + static_cast<std::int64_t>(row) * vocab;
      const float above = tree_.confidences[frontier_[row]];
      const float offset = above - log_sum_exp(values, vocab, scale);
      best_of(values, vocab, wanted, candidates_[row]);
      for (Candidate& candidate : candidates_[row])
        candidate.confidence = std::min(candidate.confidence * scale + offset, above);
    }
    const std::vector<std::int64_t> counts = bounds_.widths ? by_rank(depth) : by_confidence(wanted);
    for (std::size_t row = 0; row < frontier_.size(); ++row)
      for (std::int64_t i = 0; i < counts[row]; ++i)
        add(candidates_[row][i].token, frontier_[row], candidates_[row][i].confidence);
    choose_frontier(first, depth + 1);
  }

  const std::vector<std::int32_t>& frontier() const { return frontier_; }

  // Gives the frontier its slots; returns the mask of frontier node `index`, its own bit included.
  const std::uint64_t* claim_slot(std::size_t index) {
    const std::int64_t slot = tree_.evaluated_count;
    tree_.evaluated[tree_.evaluated_count++] = frontier_[index];
    const std::int64_t parent_slot = slot_of(tree_.parents[frontier_[index]]);
    masks_.resize(static_cast<std::size_t>((slot + 1) * words_));
    std::copy_n(masks_.begin() + parent_slot * words_, words_, masks_.begin() + slot * words_);
    masks_[slot * words_ + slot / 64] |= std::uint64_t{1} << slot % 64;
    return masks_.data() + slot * words_;
  }

 private:
  std::int64_t left() const { return bounds_.max_nodes + 1 - tree_.nodes; }

  std::int64_t slot_of(std::int32_t node) const {
    return std::find(tree_.evaluated, tree_.evaluated + tree_.evaluated_count, node) - tree_.evaluated;
  }

  void add(std::int32_t token, std::int32_t parent, float confidence) {
    tree_.token_ids[tree_.nodes] = token;
    tree_.parents[tree_.nodes] = parent;
    tree_.confidences[tree_.nodes] = confidence;
    if (parent < 0) frontier_.assign(1, 0);
    ++tree_.nodes;
  }

  // First children before second ones, while nodes are left.
  std::vector<std::int64_t> by_rank(std::int64_t depth) const {
    std::vector<std::int64_t> counts(frontier_.size(), 0);
    std::int64_t spare = left();
    for (std::int64_t rank = 0; rank < bounds_.widths[depth]; ++rank)
      for (std::size_t row = 0; row < frontier_.size(); ++row)
        if (rank < static_cast<std::int64_t>(candidates_[row].size()) && spare > 0) ++counts[row], --spare;
    return counts;
  }

  // The `wanted` most probable of all rows together.
  std::vector<std::int64_t> by_confidence(std::int64_t wanted) const {
    std::vector<std::int64_t> counts(frontier_.size(), 0);
    for (std::int64_t taken = 0; taken < wanted; ++taken) {
      std::int64_t best = -1;
      for (std::size_t row = 0; row < frontier_.size(); ++row) {
        if (counts[row] == static_cast<std::int64_t>(candidates_[row].size())) continue;
        if (best < 0 || confidence_at(row, counts) > confidence_at(best, counts)) best = static_cast<std::int64_t>(row);
      }
      if (best < 0) break;
      ++counts[best];
    }
    return counts;
  }

  float confidence_at(std::size_t row, const std::vector<std::int64_t>& counts) const {
    return candidates_[row][counts[row]].confidence;
  }

  // Which of the nodes from `first` on get children.
  void choose_frontier(std::int64_t first, std::int64_t depth) {
    frontier_.clear();
    if (width(depth) <= 0) return;
    const float least = bounds_.widths ? -std::numeric_limits<float>::infinity() : least_kept();
    for (std::int64_t node = first; node < tree_.nodes; ++node)
      if (tree_.confidences[node] >= std::max(bounds_.floor, least)) frontier_.push_back(static_cast<std::int32_t>(node));
    const std::size_t limit = static_cast<std::size_t>(bounds_.widths ? left() : bounds_.beam);
    if (frontier_.size() <= limit) return;
    if (!bounds_.widths)
      std::stable_sort(frontier_.begin(), frontier_.end(), [&](std::int32_t a, std::int32_t b) {
        return tree_.confidences[a] > tree_.confidences[b];
      });
    frontier_.resize(limit);
    std::sort(frontier_.begin(), frontier_.end());
  }

  // The confidence that a node needs to be among the best max_nodes and the root.
  float least_kept() {
    if (tree_.nodes <= bounds_.max_nodes + 1) return -std::numeric_limits<float>::infinity();
    ordered_.assign(tree_.confidences, tree_.confidences + tree_.nodes);
    std::nth_element(ordered_.begin(), ordered_.begin() + bounds_.max_nodes, ordered_.end(), std::greater<float>());
    return ordered_[bounds_.max_nodes];
  }

  const TreeBounds& bounds_;
  GrownTree& tree_;
  const std::int64_t words_;
  std::vector<std::int32_t> frontier_;
  std::vector<std::uint64_t> masks_;  // by slot
  std::vector<std::vector<Candidate>> candidates_;
  std::vector<float> ordered_;
};

}  // namespace

void grow_tree(ThreadPool& pool, const Decoder& decoder, const SequenceCache& cache, const std::int64_t* pending_tokens,
               std::int64_t pending, const TreeBounds& bounds, GrownTree& tree) {
  const std::int64_t slots = bounds.widths ? bounds.max_nodes + 1 : 1 + bounds.beam * bounds.max_depth;
  Pass pass(pool, decoder, cache);
  Rows rows((slots + 63) / 64);
  for (std::int64_t i = 0; i < pending; ++i)
    rows.add(cache, pending_tokens[i], cache.length + i, cache.length + i, cache.length + i + 1, nullptr);
  const float* logits = pass.logits(rows, pending - 1);
  const std::int64_t root = cache.length + pending - 1;
  Growth growth(bounds, tree, rows.words);
  growth.start(static_cast<std::int32_t>(pending_tokens[pending - 1]));
  for (std::int64_t depth = 0;; ++depth) {
    growth.extend(logits, decoder.head.outputs, depth);
    if (growth.frontier().empty()) return;
    rows.clear();
    for (std::size_t i = 0; i < growth.frontier().size(); ++i) {
      const std::int64_t entry = root + tree.evaluated_count;
      const std::uint64_t* mask = growth.claim_slot(i);
      rows.add(cache, tree.token_ids[growth.frontier()[i]], root + depth + 1, entry, root, mask);
    }
    logits = pass.logits(rows, 0);
  }
}

}  // namespace specserve
