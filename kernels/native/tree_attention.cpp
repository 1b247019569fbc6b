#include "tree_attention.h"

#include <algorithm>
#include <vector>

#include "attention_rows.h"
#include "simd.h"
#include "tiled_attention.h"

namespace specserve {
namespace {

// Vectors of a line's weighted sum that stay in registers, and the lines, that is queries of one head, that pass over the
// same values together; lines that pass over the same keys.
constexpr int kSumVecs = kAccumulators >= 24 ? 4 : 2;
constexpr int kMaxLines = kAccumulators / kSumVecs;
constexpr int kScoreLines = 8;
// Rows of a group, which are fewer where some thread would be left without one.
constexpr std::int64_t kGroupRows = 16;
// Weights that a group may have at a time: they stay in the L2 cache.
constexpr std::int64_t kGroupWeights = 65536;
// Multiply-adds that are worth an item of work.
constexpr std::int64_t kItemWork = 16384;
// Entries of the values that are fetched ahead of their use, those that are fetched while the keys pass, because they
// stay in the L2 cache until then, and the bytes of a cache line.
constexpr std::int64_t kPrefetch = 8;
constexpr std::int64_t kEarlyValues = 1024;
constexpr std::int64_t kCacheLine = 64;

// A query of one head, its places for weights and for the sums of weighted values, and the sum of its weights.
struct Line {
  const float* query;
  float* weights;
  float* sums;
  float total;
};

struct Scratch {
  std::vector<std::int64_t> offsets;
  std::vector<std::size_t> row_ends;
  std::vector<float> weights, sums;
  std::vector<Vec> keys;  // [head_dim], of kLanes entries
  std::vector<Line> lines;
};

Scratch& scratch() {
  thread_local Scratch own;
  return own;
}

// Appends the offsets in the cache, in elements, of entries first..last of the row's sequence.
void append_offsets(const AttentionBatch& batch, std::int64_t row, std::int64_t slot_size, std::int64_t first,
                    std::int64_t last, std::vector<std::int64_t>& offsets) {
  while (first < last) {
    const std::int64_t block_end = std::min(last, (first / batch.block_size + 1) * batch.block_size);
    const std::int64_t slot = slot_of(batch, row, first);
    const std::size_t size = offsets.size();
    offsets.resize(size + static_cast<std::size_t>(block_end - first));
    for (std::int64_t i = 0; i < block_end - first; ++i) offsets[size + i] = (slot + i) * slot_size;
    first = block_end;
  }
}

// offsets: the common entries, then, for row after row, what only that row sees, in logical order, up to row_ends[row].
void list_visible(const AttentionBatch& batch, const RowGroup& group, std::int64_t slot_size, Scratch& own) {
  own.offsets.clear();
  own.row_ends.clear();
  append_offsets(batch, group.first, slot_size, 0, group.common, own.offsets);
  for (std::int64_t row = group.first; row < group.first + group.rows; ++row) {
    const std::int64_t prefix = batch.prefix_lengths[row];
    append_offsets(batch, row, slot_size, group.common, prefix, own.offsets);
    for_tree_entries(batch, row, [&](std::int64_t entry) { own.offsets.push_back(slot_of(batch, row, entry) * slot_size); });
    own.row_ends.push_back(own.offsets.size());
  }
}

// Entries of one head lie far apart: the hardware's own prefetching does not see the next one coming.
template <class Element>
void prefetch_entry(const Element* base, const std::int64_t* offsets, std::int64_t i, std::int64_t count,
                    std::int64_t size) {
  const Element* entry = base + offsets[std::min(i + kPrefetch, count - 1)];
  for (std::int64_t d = 0; d < size; d += kCacheLine / static_cast<std::int64_t>(sizeof(Element)))
    __builtin_prefetch(entry + d);
}

// keys[d][lane] = keys[offsets[lane]][d] for the first kLanes of `count` entries. Fetches the keys behind them, and, where
// `values` is not null, their values.
template <class Element>
void gather_keys(const Element* keys, const Element* values, const std::int64_t* offsets, std::int64_t count,
                 std::int64_t head_dim, Vec* gathered) {
  constexpr std::int64_t kLine = kCacheLine / static_cast<std::int64_t>(sizeof(Element));
  for (std::int64_t d = 0; d < head_dim; d += kLanes) {
    const int left = static_cast<int>(std::min<std::int64_t>(kLanes, head_dim - d));
    Vec tile[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      tile[lane] = lane < count ? load_first(keys + offsets[lane] + d, left) : Vec{};
      if (d % kLine != 0) continue;
      if (lane + kLanes < count) __builtin_prefetch(keys + offsets[lane + kLanes] + d);
      if (values && lane < count) __builtin_prefetch(values + offsets[lane] + d, 0, 2);
    }
    transpose(tile);
    std::copy_n(tile, left, gathered + d);
  }
}

// weights[first + lane] = scale * (the chain fma(query[d], key[d], ·) over d = 0, 1, ...), for each of the lines.
template <int Lines>
void score(const Line* lines, const Vec* keys, std::int64_t head_dim, float scale, std::int64_t first) {
  Vec sums[Lines] = {};
  for (std::int64_t d = 0; d < head_dim; ++d)
    for (int line = 0; line < Lines; ++line) sums[line] = fma(keys[d], broadcast(lines[line].query[d]), sums[line]);
  for (int line = 0; line < Lines; ++line) store(sums[line] * scale, lines[line].weights + first);
}

// call(pointer to the first of them, their number as a constant) for `count` lines, at most kMost at a time.
template <int kMost, class Call>
void in_bundles(const Line* lines, std::size_t count, const Call& call) {
  for (; count >= kMost; lines += kMost, count -= kMost) call(lines, std::integral_constant<int, kMost>{});
  if constexpr (kMost > 1) in_bundles<kMost - 1>(lines, count, call);
}

// Scores of some lines for `count` entries, which become number first, first + 1, ... of each.
template <class Element>
void score_entries(const AttentionOperands<Element>& p, std::int64_t kv_head, const std::int64_t* offsets, std::int64_t count,
                   std::int64_t first, const Line* lines, std::size_t line_count, Vec* gathered) {
  const std::int64_t head_dim = p.counts.head_dim, start = kv_head * head_dim;
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Element* early = first + i < kEarlyValues ? p.values + start : nullptr;
    gather_keys(p.keys + start, early, offsets + i, count - i, head_dim, gathered);
    in_bundles<kScoreLines>(lines, line_count, [&](const Line* bundle, auto size) {
      score<size()>(bundle, gathered, head_dim, p.scale, first + i);
    });
  }
}

// weights[i] = e^(weights[i] - max) for i < size; returns their sum. There is room for a last, partly used vector.
float exponentials(float* weights, std::int64_t size) {
  std::fill_n(weights + size, kLanes, weights[0]);
  Vec highest = broadcast(weights[0]);
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const Vec value = load(weights + i);
    highest = value > highest ? value : highest;
  }
  const float max = max_lane(highest);
  return total(size, [weights, max](std::int64_t first, int count, Vec sums) {
    store(exp(load(weights + first) - max), weights + first);
    return sums + load_first(weights + first, count);
  });
}

// sums[d] += Σ weights[first + i] values[offsets[i]][d], over i in order, for `Vecs` vectors of d or `left` elements.
template <class Element, int Lines, int Vecs>
void accumulate_part(const Line* lines, const Element* values, const std::int64_t* offsets, std::int64_t count,
                     std::int64_t d, std::int64_t first, int left = kLanes) {
  Vec sums[Lines][Vecs];
  for (int line = 0; line < Lines; ++line)
    for (int v = 0; v < Vecs; ++v) sums[line][v] = load_first(lines[line].sums + d + v * kLanes, left);
  for (std::int64_t i = 0; i < count; ++i) {
    prefetch_entry(values + d, offsets, i, count, Vecs * kLanes);
    Vec parts[Vecs];
    for (int v = 0; v < Vecs; ++v) parts[v] = load_first(values + offsets[i] + d + v * kLanes, left);
    for (int line = 0; line < Lines; ++line) {
      const Vec weight = broadcast(lines[line].weights[first + i]);
      for (int v = 0; v < Vecs; ++v) sums[line][v] = fma(parts[v], weight, sums[line][v]);
    }
  }
  for (int line = 0; line < Lines; ++line)
    for (int v = 0; v < Vecs; ++v) store_first(sums[line][v], lines[line].sums + d + v * kLanes, left);
}

template <class Element>
void accumulate(const Line* lines, std::size_t line_count, const Element* values, const std::int64_t* offsets,
                std::int64_t count, std::int64_t head_dim, std::int64_t first) {
  in_bundles<kMaxLines>(lines, line_count, [&](const Line* bundle, auto size) {
    std::int64_t d = 0;
    for (; d + kSumVecs * kLanes <= head_dim; d += kSumVecs * kLanes)
      accumulate_part<Element, size(), kSumVecs>(bundle, values, offsets, count, d, first);
    for (; d < head_dim; d += kLanes)
      accumulate_part<Element, size(), 1>(bundle, values, offsets, count, d, first,
                                          static_cast<int>(std::min<std::int64_t>(kLanes, head_dim - d)));
  });
}

// The group's queries of one key head, row after row.
template <class Element>
void list_lines(const AttentionOperands<Element>& p, const RowGroup& group, std::int64_t kv_head, Scratch& own) {
  const std::int64_t head_dim = p.counts.head_dim, in_row = p.counts.heads / p.counts.kv_heads;
  // a last vector of scores may be partly used
  const std::size_t room = own.offsets.size() + kLanes, count = static_cast<std::size_t>(group.rows * in_row);
  own.weights.resize(std::max(own.weights.size(), count * room));
  own.keys.resize(static_cast<std::size_t>(head_dim));
  own.sums.assign(count * static_cast<std::size_t>(head_dim), 0.0f);
  own.lines.resize(count);
  for (std::int64_t i = 0; i < group.rows * in_row; ++i) {
    const std::int64_t row = group.first + i / in_row, head = kv_head * in_row + i % in_row;
    own.lines[i] = {p.query + row * p.query_stride + head * head_dim, own.weights.data() + i * room,
                    own.sums.data() + i * head_dim, 1.0f};
  }
}

// The mean of the values by the weights.
void store_result(const float* sums, float total, std::int64_t head_dim, float* out) {
  for (std::int64_t d = 0; d < head_dim; ++d) out[d] = sums[d] / total;
}

void store_result(const float* sums, float total, std::int64_t head_dim, bfloat16* out) {
  for (std::int64_t d = 0; d < head_dim; d += kLanes) store_rounded(load(sums + d) / total, out + d);
}

template <class Element, class Out>
void attend_group(const AttentionOperands<Element>& p, const RowGroup& group, std::int64_t kv_head, Scratch& own, Out* out) {
  const std::int64_t head_dim = p.counts.head_dim, in_row = p.counts.heads / p.counts.kv_heads;
  const Element* values = p.values + kv_head * head_dim;
  const std::int64_t* offsets = own.offsets.data();
  list_lines(p, group, kv_head, own);
  const auto end_of = [&](std::int64_t row) { return static_cast<std::int64_t>(own.row_ends[row]); };
  const auto tail_of = [&](std::int64_t row) { return row == 0 ? group.common : end_of(row - 1); };
  score_entries(p, kv_head, offsets, group.common, 0, own.lines.data(), own.lines.size(), own.keys.data());
  for (std::int64_t row = 0; row < group.rows; ++row) {
    Line* lines = own.lines.data() + row * in_row;
    const std::int64_t tail = tail_of(row), size = end_of(row) - tail;
    score_entries(p, kv_head, offsets + tail, size, group.common, lines, in_row, own.keys.data());
    if (group.common + size > 0)
      for (std::int64_t i = 0; i < in_row; ++i) lines[i].total = exponentials(lines[i].weights, group.common + size);
  }
  accumulate(own.lines.data(), own.lines.size(), values, offsets, group.common, head_dim, 0);
  for (std::int64_t row = 0; row < group.rows; ++row) {
    const Line* lines = own.lines.data() + row * in_row;
    accumulate(lines, in_row, values, offsets + tail_of(row), end_of(row) - tail_of(row), head_dim, group.common);
    Out* result = out + ((group.first + row) * p.counts.heads + kv_head * in_row) * head_dim;
    for (std::int64_t i = 0; i < in_row; ++i, result += head_dim)
      store_result(lines[i].sums, lines[i].total, head_dim, result);
  }
}

template <class Out>
void attend_group_in_tiles(const AttentionOperands<bfloat16>& p, const RowGroup& group, std::int64_t kv_head, Out* out) {
  const std::int64_t head_dim = p.counts.head_dim, in_row = p.counts.heads / p.counts.kv_heads;
  const LineSums sums = attend_in_tiles(p, group, kv_head);
  for (std::int64_t line = 0; line < group.rows * in_row; ++line) {
    const std::int64_t row = group.first + line / in_row, head = kv_head * in_row + line % in_row;
    store_result(sums.values + line * head_dim, sums.weights[line], head_dim, out + (row * p.counts.heads + head) * head_dim);
  }
}

// Cuts the rows into groups of at most `most` rows of one sequence.
std::vector<RowGroup> group_rows(const AttentionBatch& batch, std::int64_t most) {
  std::vector<RowGroup> groups;
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    const std::int64_t prefix = batch.prefix_lengths[row];
    const bool joins = row > 0 && groups.back().rows < most && batch.row_sequences[row] == batch.row_sequences[row - 1];
    if (!joins) groups.push_back({row, 0, prefix});
    ++groups.back().rows;
    groups.back().common = std::min(groups.back().common, prefix);
  }
  return groups;
}

template <class Element, class Out>
void attend_all(ThreadPool& pool, const AttentionOperands<Element>& p, Out* out) {
  const std::int64_t kv_heads = p.counts.kv_heads, slot_size = kv_heads * p.counts.head_dim;
  const std::int64_t in_row = p.counts.heads / kv_heads;
  const bool in_tiles = std::is_same_v<Element, bfloat16> && tiles_attend(p.batch, p.counts);
  const std::int64_t wanted = std::max<std::int64_t>(1, pool.threads() / kv_heads);
  const std::int64_t longest = *std::max_element(p.batch.prefix_lengths, p.batch.prefix_lengths + p.batch.rows);
  const std::int64_t fitting = kGroupWeights / std::max<std::int64_t>(1, longest * in_row);
  const std::int64_t most = std::min(in_tiles ? kTiledLines / in_row : std::min(kGroupRows, fitting), p.batch.rows / wanted);
  const auto groups = group_rows(p.batch, std::max<std::int64_t>(1, most));
  std::int64_t entries = 0;
  for (const RowGroup& group : groups) entries += (group.common + 1) * group.rows;
  const std::int64_t pairs = static_cast<std::int64_t>(groups.size()) * kv_heads;
  const std::int64_t work = entries * p.counts.heads * p.counts.head_dim * 2 / pairs;
  const std::int64_t chunk = std::clamp<std::int64_t>(kItemWork / std::max<std::int64_t>(work, 1), 1, pairs);
  const auto prepare = [in_tiles](int) {
    if (in_tiles) shape_matrix_tiles(2 * kTileSide);
    return 0;
  };
  pool.parallel_for(static_cast<int>((pairs + chunk - 1) / chunk), prepare, [&](int, int item) {
    Scratch& own = scratch();
    std::int64_t listed = -1;
    for (std::int64_t pair = item * chunk; pair < std::min(pairs, (item + 1) * chunk); ++pair) {
      const std::int64_t index = pair / kv_heads, kv_head = pair % kv_heads;
      if constexpr (std::is_same_v<Element, bfloat16>)
        if (in_tiles) {
          attend_group_in_tiles(p, groups[index], kv_head, out);
          continue;
        }
      if (index != listed) list_visible(p.batch, groups[index], slot_size, own);
      listed = index;
      attend_group(p, groups[index], kv_head, own, out);
    }
  });
}

template <class Out>
void attend(ThreadPool& pool, const float* query, std::int64_t query_stride, const void* keys, const void* values,
            bool kv_is_bfloat16, const AttentionBatch& batch, const HeadCounts& counts, float scale, Out* out) {
  if (batch.rows == 0) return;
  const auto run = [&](auto* typed_keys) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(typed_keys)>>;
    attend_all(pool, AttentionOperands<Element>{query, query_stride, typed_keys, static_cast<const Element*>(values), batch,
                                                counts, scale}, out);
  };
  if (kv_is_bfloat16)
    run(static_cast<const bfloat16*>(keys));
  else
    run(static_cast<const float*>(keys));
}

}  // namespace

void tree_attention(ThreadPool& pool, const float* query, std::int64_t query_stride, const void* keys,
                    const void* values, bool kv_is_bfloat16, const AttentionBatch& batch, const HeadCounts& counts,
                    float scale, float* out) {
  attend(pool, query, query_stride, keys, values, kv_is_bfloat16, batch, counts, scale, out);
}

void tree_attention(ThreadPool& pool, const float* query, std::int64_t query_stride, const void* keys,
                    const void* values, bool kv_is_bfloat16, const AttentionBatch& batch, const HeadCounts& counts,
                    float scale, bfloat16* out) {
  attend(pool, query, query_stride, keys, values, kv_is_bfloat16, batch, counts, scale, out);
}

}  // namespace specserve
