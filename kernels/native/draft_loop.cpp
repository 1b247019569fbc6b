#include "draft_loop.h"

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "gumbel_noise.h"

namespace specserve {
namespace {

// The rows of one forward pass, those of a sequence one behind the other.
struct Rows {
  std::vector<std::int64_t> tokens, positions, slots;
  std::vector<std::int32_t> sequences, prefix_lengths;
  std::vector<std::uint64_t> masks;

  std::int64_t count() const { return static_cast<std::int64_t>(tokens.size()); }

  void clear() {
    for (auto* list : {&tokens, &positions, &slots}) list->clear();
    for (auto* list : {&sequences, &prefix_lengths}) list->clear();
    masks.clear();
  }
};

// The trees of a call, level by level.
class DraftLoop {
 public:
  DraftLoop(ThreadPool& pool, const Decoder& decoder, const KvCache& cache, std::int64_t block_size,
            const DraftSequence* sequences, std::int64_t count)
      : pool_(pool), decoder_(decoder), cache_(cache), block_size_(block_size), sequences_(sequences), count_(count) {
    for (std::int64_t i = 0; i < count; ++i) {
      max_blocks_ = std::max(max_blocks_, sequences[i].blocks);
      words_ = std::max(words_, (most_slots(sequences[i].bounds) + 63) / 64);
    }
    tables_.assign(static_cast<std::size_t>(count * max_blocks_), 0);
    growths_.reserve(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) {
      std::copy_n(sequences[i].block_table, sequences[i].blocks, tables_.begin() + i * max_blocks_);
      const std::int64_t root = sequences[i].pending[sequences[i].pending_count - 1];
      growths_.emplace_back(sequences[i].bounds, static_cast<std::int32_t>(root), words_);
    }
  }

  void run() {
    compute_pending();
    for (std::int64_t depth = 0; !nodes_.empty(); ++depth) {
      choose(depth);
      extend();
      compute_frontiers(depth + 1);
    }
  }

  void finish(GrownTree* trees) const {
    for (std::int64_t i = 0; i < count_; ++i) growths_[i].finish(trees[i]);
  }

 private:
  // A node whose children are wanted.
  struct Node {
    std::int64_t sequence;
    std::int32_t node;
  };

  std::int64_t root_entry(std::int64_t sequence) const {
    return sequences_[sequence].length + sequences_[sequence].pending_count - 1;
  }

  // A row that writes logical entry `entry`, sees those before `prefix`, and of those behind the bits of `mask`.
  void add_row(std::int64_t sequence, std::int64_t token, std::int64_t position, std::int64_t entry, std::int64_t prefix,
               const std::uint64_t* mask) {
    const std::int32_t* table = tables_.data() + sequence * max_blocks_;
    rows_.tokens.push_back(token);
    rows_.positions.push_back(position);
    rows_.slots.push_back(table[entry / block_size_] * block_size_ + entry % block_size_);
    rows_.sequences.push_back(static_cast<std::int32_t>(sequence));
    rows_.prefix_lengths.push_back(static_cast<std::int32_t>(prefix));
    for (std::int64_t word = 0; word < words_; ++word) rows_.masks.push_back(mask ? mask[word] : 0);
  }

  float* forward() {
    const AttentionBatch batch{tables_.data(),     max_blocks_, block_size_,        rows_.sequences.data(), rows_.prefix_lengths.data(),
                               rows_.masks.data(), words_,      rows_.slots.data(), nullptr,                nullptr,
                               rows_.count()};
    float* hidden = hidden_.get(rows_.count() * decoder_.head.inputs);
    decoder_forward(pool_, decoder_, cache_, rows_.tokens.data(), rows_.positions.data(), batch, hidden);
    return hidden;
  }

  void compute_logits(const float* hidden) {
    const std::int64_t rows = static_cast<std::int64_t>(nodes_.size());
    decoder_logits(pool_, decoder_, hidden, rows, logits_.get(rows * decoder_.head.outputs));
  }

  void compute_pending() {
    for (std::int64_t i = 0; i < count_; ++i)
      for (std::int64_t j = 0, entry = sequences_[i].length; j < sequences_[i].pending_count; ++j, ++entry)
        add_row(i, sequences_[i].pending[j], entry, entry, entry + 1, nullptr);
    float* hidden = forward();
    const std::int64_t size = decoder_.head.inputs;
    for (std::int64_t i = 0, end = 0; i < count_; ++i) {
      end += sequences_[i].pending_count;
      if (growths_[i].frontier().empty()) continue;
      // Nodes are no more than rows, so that nothing is overwritten that is still to be moved.
      std::copy_n(hidden + (end - 1) * size, size, hidden + static_cast<std::int64_t>(nodes_.size()) * size);
      nodes_.push_back({i, 0});
    }
    if (!nodes_.empty()) compute_logits(hidden);
  }

  void compute_frontiers(std::int64_t depth) {
    rows_.clear();
    nodes_.clear();
    for (std::int64_t i = 0; i < count_; ++i) {
      TreeGrowth& growth = growths_[i];
      const std::int64_t root = root_entry(i);
      std::int64_t slot = growth.claim_slots();
      for (const std::int32_t node : growth.frontier()) {
        add_row(i, growth.token(node), root + depth, root + slot, root, growth.slot_mask(slot));
        nodes_.push_back({i, node});
        ++slot;
      }
    }
    if (!nodes_.empty()) compute_logits(forward());
  }

  // Candidates for the children of every node. The nodes of a sequence share the noise of their children's position.
  void choose(std::int64_t depth) {
    const std::int64_t vocab = decoder_.head.outputs;
    noise_of_.assign(static_cast<std::size_t>(count_), -1);
    noisy_.clear();
    for (const Node& node : nodes_)
      if (sequences_[node.sequence].rule.noisy && noise_of_[node.sequence] < 0) {
        noise_of_[node.sequence] = static_cast<std::int64_t>(noisy_.size());
        noisy_.push_back(node.sequence);
      }
    float* noise = noise_.get(static_cast<std::int64_t>(noisy_.size()) * vocab);
    pool_.parallel_for(static_cast<int>(noisy_.size()), [&](int i) {
      const DraftSequence& sequence = sequences_[noisy_[i]];
      gumbel_noise(sequence.rule.seed, root_entry(noisy_[i]) + 1 + depth, vocab, noise + i * vocab);
    });
    children_.resize(nodes_.size());
    const float* logits = logits_.get(0);
    pool_.parallel_for(static_cast<int>(nodes_.size()), [&](int i) {
      const Node& node = nodes_[i];
      const TreeGrowth& growth = growths_[node.sequence];
      const std::int64_t own = noise_of_[node.sequence];
      choose_children(sequences_[node.sequence].rule, logits + i * vocab, own < 0 ? nullptr : noise + own * vocab, vocab,
                      growth.width(), growth.confidence(node.node), children_[i]);
    });
  }

  void extend() {
    for (std::size_t first = 0; first < nodes_.size();) {
      TreeGrowth& growth = growths_[nodes_[first].sequence];
      const std::size_t rows = growth.frontier().size();
      growth.extend(children_.data() + first);
      first += rows;
    }
  }

  ThreadPool& pool_;
  const Decoder& decoder_;
  const KvCache& cache_;
  const std::int64_t block_size_;
  const DraftSequence* const sequences_;
  const std::int64_t count_;
  std::int64_t max_blocks_ = 0, words_ = 1;
  std::vector<std::int32_t> tables_;  // [count, max_blocks]
  std::vector<TreeGrowth> growths_;
  Rows rows_;
  std::vector<Node> nodes_;  // whose logits are computed, those of a sequence one behind the other
  std::vector<std::vector<Candidate>> children_;
  std::vector<std::int64_t> noise_of_, noisy_;  // row of the noise by sequence, and the other way round
  Buffer hidden_, logits_, noise_;
};

}  // namespace

void grow_trees(ThreadPool& pool, const Decoder& decoder, const KvCache& cache, std::int64_t block_size,
                const DraftSequence* sequences, std::int64_t count, GrownTree* trees) {
  DraftLoop loop(pool, decoder, cache, block_size, sequences, count);
  loop.run();
  pool.rest();  // the large model has the machine next
  loop.finish(trees);
}

}  // namespace specserve
