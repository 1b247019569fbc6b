#include "tree_attention.h"

#include <algorithm>
#include <vector>

#include "simd.h"

namespace specserve {
namespace {

// Lines, that is queries of one head, that pass over the same keys together, and the vectors of a line's weighted sum
// that stay in registers meanwhile.
constexpr int kMaxLines = 4;
constexpr int kSumVecs = kAccumulators / kMaxLines >= 4 ? 4 : 2;
// Rows of a group, and the groups for each thread below which groups become smaller.
constexpr std::int64_t kGroupRows = 16;
constexpr int kGroupsPerThread = 4;
// Multiply-adds that are worth an item of work.
constexpr std::int64_t kItemWork = 16384;
// Entries that are fetched ahead of their use, and the bytes of a cache line.
constexpr std::int64_t kPrefetch = 8;
constexpr std::int64_t kCacheLine = 64;

struct Scratch {
  std::vector<std::int64_t> offsets;
  std::vector<std::size_t> row_ends;
  std::vector<float> weights;
};

Scratch& scratch() {
  thread_local Scratch own;
  return own;
}

template <class Element>
struct Operands {
  const float* query;
  std::int64_t query_stride;
  const Element* keys;
  const Element* values;
  const AttentionBatch& batch;
  const HeadCounts& counts;
  float scale;
  float* out;
};

// Consecutive rows of one sequence. All of them see its first `common` entries.
struct RowGroup {
  std::int64_t first, rows, common;
};

// A query of one head and its places for weights and result.
struct Line {
  const float* query;
  float* weights;
  float* out;
};

std::int64_t slot_of(const AttentionBatch& batch, std::int64_t row, std::int64_t entry) {
  const std::int32_t* table = batch.block_tables + batch.row_sequences[row] * batch.max_blocks;
  return table[entry / batch.block_size] * batch.block_size + entry % batch.block_size;
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
    for (std::int64_t word = 0; word < batch.words; ++word)
      for (std::uint64_t bits = batch.masks[row * batch.words + word]; bits != 0; bits &= bits - 1)
        own.offsets.push_back(slot_of(batch, row, prefix + 64 * word + __builtin_ctzll(bits)) * slot_size);
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

// weights[i] = scale * (query · keys[offsets[i]]) for each line.
template <class Element, int Lines>
void score(const Line* lines, const Element* keys, const std::int64_t* offsets, std::int64_t count,
           std::int64_t head_dim, float scale, std::int64_t first) {
  for (std::int64_t i = 0; i < count; ++i) {
    const Element* key = keys + offsets[i];
    prefetch_entry(keys, offsets, i, count, head_dim);
    Vec totals[Lines] = {};
    std::int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) {
      const Vec part = load(key + d);
      for (int line = 0; line < Lines; ++line) totals[line] = fma(load(lines[line].query + d), part, totals[line]);
    }
    if (d < head_dim) {
      const int left = static_cast<int>(head_dim - d);
      const Vec part = load_first(key + d, left);
      for (int line = 0; line < Lines; ++line)
        totals[line] = fma(load_first(lines[line].query + d, left), part, totals[line]);
    }
    for (int line = 0; line < Lines; ++line) lines[line].weights[first + i] = sum(totals[line]) * scale;
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
  Vec total = {};
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const Vec value = exp(load(weights + i) - max);
    store(value, weights + i);
    total += load_first(weights + i, static_cast<int>(std::min<std::int64_t>(kLanes, size - i)));
  }
  return sum(total);
}

// out[d] += Σ weights[first + i] values[offsets[i]][d], over i in order, for `Vecs` vectors of d or `left` elements.
template <class Element, int Lines, int Vecs>
void accumulate_part(const Line* lines, const Element* values, const std::int64_t* offsets, std::int64_t count,
                     std::int64_t d, std::int64_t first, int left = kLanes) {
  Vec sums[Lines][Vecs];
  for (int line = 0; line < Lines; ++line)
    for (int v = 0; v < Vecs; ++v) sums[line][v] = load_first(lines[line].out + d + v * kLanes, left);
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
    for (int v = 0; v < Vecs; ++v) store_first(sums[line][v], lines[line].out + d + v * kLanes, left);
}

template <class Element, int Lines>
void accumulate(const Line* lines, const Element* values, const std::int64_t* offsets, std::int64_t count,
                std::int64_t head_dim, std::int64_t first) {
  std::int64_t d = 0;
  for (; d + kSumVecs * kLanes <= head_dim; d += kSumVecs * kLanes)
    accumulate_part<Element, Lines, kSumVecs>(lines, values, offsets, count, d, first);
  for (; d < head_dim; d += kLanes)
    accumulate_part<Element, Lines, 1>(lines, values, offsets, count, d, first,
                                       static_cast<int>(std::min<std::int64_t>(kLanes, head_dim - d)));
}

// Lines first_line..first_line+Lines of one group and one key head; line i is query head i % n of row i / n, n to a key.
template <class Element, int Lines>
void attend(const Operands<Element>& p, const RowGroup& group, std::int64_t kv_head, std::int64_t first_line,
            Scratch& own) {
  const std::int64_t head_dim = p.counts.head_dim, heads_in_group = p.counts.heads / p.counts.kv_heads;
  const Element *keys = p.keys + kv_head * head_dim, *values = p.values + kv_head * head_dim;
  const std::size_t room = own.offsets.size() + kLanes;
  own.weights.resize(std::max(own.weights.size(), Lines * room));
  Line lines[Lines];
  std::int64_t tails[Lines], tail_sizes[Lines];
  for (int i = 0; i < Lines; ++i) {
    const std::int64_t index = (first_line + i) / heads_in_group, row = group.first + index;
    const std::int64_t head = kv_head * heads_in_group + (first_line + i) % heads_in_group;
    lines[i] = {p.query + row * p.query_stride + head * head_dim, own.weights.data() + i * room,
                p.out + (row * p.counts.heads + head) * head_dim};
    tails[i] = index == 0 ? group.common : static_cast<std::int64_t>(own.row_ends[index - 1]);
    tail_sizes[i] = static_cast<std::int64_t>(own.row_ends[index]) - tails[i];
    std::fill_n(lines[i].out, head_dim, 0.0f);
  }
  const std::int64_t* offsets = own.offsets.data();
  score<Element, Lines>(lines, keys, offsets, group.common, head_dim, p.scale, 0);
  float totals[Lines];
  for (int i = 0; i < Lines; ++i) {
    score<Element, 1>(lines + i, keys, offsets + tails[i], tail_sizes[i], head_dim, p.scale, group.common);
    const std::int64_t size = group.common + tail_sizes[i];
    totals[i] = size ? exponentials(lines[i].weights, size) : 1.0f;
  }
  accumulate<Element, Lines>(lines, values, offsets, group.common, head_dim, 0);
  for (int i = 0; i < Lines; ++i) {
    accumulate<Element, 1>(lines + i, values, offsets + tails[i], tail_sizes[i], head_dim, group.common);
    for (std::int64_t d = 0; d < head_dim; ++d) lines[i].out[d] /= totals[i];
  }
}

template <class Element>
void attend_group(const Operands<Element>& p, const RowGroup& group, std::int64_t kv_head, Scratch& own) {
  const std::int64_t lines = group.rows * (p.counts.heads / p.counts.kv_heads);
  std::int64_t line = 0;
  for (; line + kMaxLines <= lines; line += kMaxLines) attend<Element, kMaxLines>(p, group, kv_head, line, own);
  for (; line + 2 <= lines; line += 2) attend<Element, 2>(p, group, kv_head, line, own);
  for (; line < lines; ++line) attend<Element, 1>(p, group, kv_head, line, own);
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

template <class Element>
void attend_all(ThreadPool& pool, const Operands<Element>& p) {
  const std::int64_t kv_heads = p.counts.kv_heads, slot_size = kv_heads * p.counts.head_dim;
  const std::int64_t wanted = std::max<std::int64_t>(1, pool.threads() * kGroupsPerThread / kv_heads);
  const auto groups = group_rows(p.batch, std::clamp<std::int64_t>(p.batch.rows / wanted, 1, kGroupRows));
  std::int64_t entries = 0;
  for (const RowGroup& group : groups) entries += (group.common + 1) * group.rows;
  const std::int64_t pairs = static_cast<std::int64_t>(groups.size()) * kv_heads;
  const std::int64_t work = entries * p.counts.heads * p.counts.head_dim * 2 / pairs;
  const std::int64_t chunk = std::clamp<std::int64_t>(kItemWork / std::max<std::int64_t>(work, 1), 1, pairs);
  pool.parallel_for(static_cast<int>((pairs + chunk - 1) / chunk), [&](int item) {
    Scratch& own = scratch();
    std::int64_t listed = -1;
    for (std::int64_t pair = item * chunk; pair < std::min(pairs, (item + 1) * chunk); ++pair) {
      const std::int64_t index = pair / kv_heads;
      if (index != listed) list_visible(p.batch, groups[index], slot_size, own);
      listed = index;
      attend_group(p, groups[index], pair % kv_heads, own);
    }
  });
}

}  // namespace

void tree_attention(ThreadPool& pool, const float* query, std::int64_t query_stride, const void* keys,
                    const void* values, bool kv_is_bfloat16, const AttentionBatch& batch, const HeadCounts& counts,
                    float scale, float* out) {
  if (batch.rows == 0) return;
  const auto run = [&](auto* typed_keys) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(typed_keys)>>;
    attend_all(pool, Operands<Element>{query, query_stride, typed_keys, static_cast<const Element*>(values), batch,
                                       counts, scale, out});
  };
  if (kv_is_bfloat16)
    run(static_cast<const bfloat16*>(keys));
  else
    run(static_cast<const float*>(keys));
}

}  // namespace specserve
