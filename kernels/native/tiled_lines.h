// Which entries of the cache the lines of attention by tiles see, and in which tiles of entries.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention_rows.h"
#include "matrix_tiles.h"

namespace specserve {

// Pairs of bf16 that one instruction sums over, in numbers: the entries of a tile of values.
constexpr std::int64_t kPairs = 2 * kTileSide;

// The queries of one key head of a group, row after row.
struct Lines {
  const AttentionOperands<bfloat16>& p;
  const RowGroup& group;
  const std::int64_t kv_head;
  const std::int64_t in_row = p.counts.heads / p.counts.kv_heads;  // lines of a row
  const std::int64_t head_dim = p.counts.head_dim;
  const std::int64_t stride = p.counts.kv_heads * head_dim;  // elements from one slot to the next
  const std::int64_t whole = group.common / kPairs * kPairs;  // entries of the 32s that all lines see
  std::int64_t entries = group.common;                        // up to the last that any sees

  std::int64_t place(std::int64_t entry) const {
    return slot_of(p.batch, group.first, entry) * stride + kv_head * head_dim;
  }
  std::uint32_t lines_of(std::int64_t row) const { return ((1u << in_row) - 1) << (row * in_row); }
};

// Which lines see each entry behind the common ones.
inline void list_seen(Lines& lines, std::vector<std::uint16_t>& seen) {
  const AttentionBatch& batch = lines.p.batch;
  const std::int64_t common = lines.group.common;
  seen.clear();
  for (std::int64_t row = 0; row < lines.group.rows; ++row) {
    const auto see = [&](std::int64_t entry) {
      if (static_cast<std::int64_t>(seen.size()) <= entry - common) seen.resize(entry - common + 1, 0);
      seen[entry - common] |= static_cast<std::uint16_t>(lines.lines_of(row));
    };
    const std::int64_t prefix = batch.prefix_lengths[lines.group.first + row];
    for (std::int64_t entry = common; entry < prefix; ++entry) see(entry);
    for_tree_entries(batch, lines.group.first + row, see);
  }
  lines.entries = common + static_cast<std::int64_t>(seen.size());
}

// What some rows see behind the 32s that all lines see, in tiles of 32 entries. The sums over the entries at even and at odd
// places are chains of their own, and an entry of weight 0 changes no sum (values are finite): rows share a tile where each
// entry is as far behind the first, even or odd, for all that see it.
class Rest {
 public:
  // Takes as many rows from the first that is left on as can share tiles; returns the row behind them.
  std::int64_t take(const Lines& lines, std::int64_t row) {
    tiles_.clear();
    place_.assign(static_cast<std::size_t>(lines.entries - lines.whole), -1);
    do list(lines, row);
    while (join() && ++row < lines.group.rows);
    return row;
  }

  std::int64_t tiles() const { return static_cast<std::int64_t>(tiles_.size()); }

  // The entries of a tile, by place; -1 at places that are left empty.
  void entries(std::int64_t tile, const Lines& lines, std::int64_t (&listed)[kPairs]) const {
    std::fill_n(listed, kPairs, -1);
    std::int64_t next[2] = {0, 1};
    for (std::size_t i = 0; i < place_.size(); ++i)
      if (place_[i] >= 0 && place_[i] / kPairs == tile) {
        std::int64_t& at = next[place_[i] % 2];
        listed[at] = lines.whole + static_cast<std::int64_t>(i);
        at += 2;
      }
  }

 private:
  struct Counts {
    std::int64_t of[2];  // entries at even and at odd places
  };

  void list(const Lines& lines, std::int64_t row) {
    const std::int64_t index = lines.group.first + row;
    row_.clear();
    for (std::int64_t entry = lines.whole; entry < lines.p.batch.prefix_lengths[index]; ++entry)
      row_.push_back(entry - lines.whole);
    for_tree_entries(lines.p.batch, index, [&](std::int64_t entry) { row_.push_back(entry - lines.whole); });
  }

  // Adds the listed row, unless it has an entry elsewhere than a row before it or a tile would be too small.
  bool join() {
    joined_ = tiles_;
    joined_.resize(std::max(tiles_.size(), (row_.size() + kPairs - 1) / kPairs), Counts{});
    for (std::size_t i = 0; i < row_.size(); ++i) {
      const std::int64_t known = place_[row_[i]], tile = static_cast<std::int64_t>(i) / kPairs;
      if (known >= 0 ? known / kPairs != tile || known % 2 != static_cast<std::int64_t>(i % 2)
                     : ++joined_[tile].of[i % 2] > kTileSide)
        return false;
    }
    for (std::size_t i = 0; i < row_.size(); ++i) place_[row_[i]] = static_cast<std::int64_t>(i);
    tiles_.swap(joined_);
    return true;
  }

  std::vector<std::int64_t> row_;    // what the row sees, behind `whole`
  std::vector<std::int64_t> place_;  // of each entry behind `whole`; -1 where no row sees it
  std::vector<Counts> tiles_, joined_;
};

}  // namespace specserve
