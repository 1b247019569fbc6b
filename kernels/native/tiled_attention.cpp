#include "tiled_attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "simd.h"
#include "tiled_lines.h"

namespace specserve {

#if SPECSERVE_MATRIX_TILES
namespace {

// Elements of a head whose sums stay in tiles.
constexpr std::int64_t kSection = 4 * kTileSide;
constexpr std::int64_t kRowBytes = 4 * kTileSide;

struct alignas(64) TileRow {
  std::uint32_t words[kTileSide];
};

struct Scratch {
  BufferOf<TileRow> queries;  // [head_dim / 2], of pairs of elements by line
  // [entries] scores, then weights, by line; of 32 entries that all lines see, [lines] of pairs of entries, then nothing.
  BufferOf<TileRow> weights;
  Buffer sums;  // [lines, head_dim]
  std::vector<std::uint16_t> seen;  // by which lines, each entry behind the common ones
  alignas(64) float totals[kTileSide];
};

Scratch& scratch() {
  thread_local Scratch own;
  return own;
}

// GCC's loads of tiles declare that they read nothing: what was written is in memory before them.
inline void written() { asm volatile("" : : : "memory"); }

inline __m512i as_words(Vec value) { return _mm512_castps_si512(value); }
inline __m512 as_floats(__m512i value) { return _mm512_castsi512_ps(value); }

inline Vec load_row(const TileRow& row) { return as_floats(_mm512_load_si512(row.words)); }
inline void store_row(Vec value, TileRow& row) { _mm512_store_si512(row.words, as_words(value)); }

void store_transposed(Vec (&tile)[kLanes], TileRow* rows) {
  transpose(tile);
  for (int i = 0; i < kLanes; ++i) store_row(tile[i], rows[i]);
}

// rows[d / 2] = pairs (query[d], query[d + 1]) by line, zero where there is none.
void prepare_queries(const Lines& lines, TileRow* rows) {
  const std::int64_t count = lines.group.rows * lines.in_row;
  for (std::int64_t d = 0; d < lines.head_dim; d += kPairs) {
    Vec tile[kLanes] = {};
    for (std::int64_t line = 0; line < count; ++line) {
      const std::int64_t row = lines.group.first + line / lines.in_row;
      const std::int64_t head = lines.kv_head * lines.in_row + line % lines.in_row;
      const float* query = lines.p.query + row * lines.p.query_stride + head * lines.head_dim + d;
      const UintVec pairs = round_to_pairs(load(query), load(query + kLanes));
      std::memcpy(&tile[line], &pairs, sizeof pairs);
    }
    store_transposed(tile, rows + d / 2);
  }
}

// weights[entry] = query · key by line, for whole tiles of entries.
void score(const Lines& lines, const TileRow* queries, TileRow* weights) {
  const std::int64_t stride = lines.stride * static_cast<std::int64_t>(sizeof(bfloat16));
  written();
  for (std::int64_t entry = 0; entry < lines.entries; entry += 2 * kTileSide) {
    const bool both = entry + kTileSide < lines.entries;
    const bfloat16* first = lines.p.keys + lines.place(entry);
    const bfloat16* second = both ? lines.p.keys + lines.place(entry + kTileSide) : first;
    _tile_zero(0);
    _tile_zero(1);
    for (std::int64_t d = 0; d < lines.head_dim; d += kPairs) {
      _tile_loadd(5, queries + d / 2, kRowBytes);
      _tile_loadd(4, first + d, stride);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, second + d, stride);
      _tile_dpbf16ps(1, 6, 5);
    }
    _tile_stored(0, weights + entry, kRowBytes);
    if (both) _tile_stored(1, weights + entry + kTileSide, kRowBytes);
  }
}

// 2^x for x <= 0, to the precision that a bf16 number has and some more: x = n + r with |r| <= 1/2, a polynomial for 2^r.
inline Vec power_of_two(Vec x) {
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r = x - n;
  Vec p = fma(r, broadcast(9.61812910e-3f), broadcast(5.55041087e-2f));
  p = fma(p, r, broadcast(2.40226507e-1f));
  p = fma(p, r, broadcast(6.93147181e-1f));
  p = fma(p, r, broadcast(1.0f));
  return _mm512_scalef_ps(p, n);
}

// The two numbers, rounded, as pairs by line.
inline __m512i pairs_of(Vec first, Vec second) {
  const auto halves = [](Vec value) {
    const __m256bh rounded = _mm512_cvtneps_pbh(value);
    __m256i bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return _mm512_cvtepu16_epi32(bits);
  };
  return _mm512_or_si512(halves(first), _mm512_slli_epi32(halves(second), 16));
}
inline Vec first_of(__m512i pairs) { return as_floats(_mm512_slli_epi32(pairs, 16)); }
inline Vec second_of(__m512i pairs) {
  return as_floats(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// The highest score that each line sees; minus infinity where it sees nothing.
Vec highest_scores(const Lines& lines, const std::vector<std::uint16_t>& seen, const TileRow* scores) {
  constexpr std::int64_t kChains = 4;
  const std::int64_t common = lines.group.common;
  Vec highest[kChains];
  for (Vec& chain : highest) chain = _mm512_set1_ps(-__builtin_inff());
  for (std::int64_t entry = 0; entry < common; ++entry)
    highest[entry % kChains] = _mm512_max_ps(highest[entry % kChains], load_row(scores[entry]));
  for (std::int64_t entry = common; entry < lines.entries; ++entry)
    highest[0] = _mm512_mask_max_ps(highest[0], seen[entry - common], highest[0], load_row(scores[entry]));
  return _mm512_max_ps(_mm512_max_ps(highest[0], highest[1]), _mm512_max_ps(highest[2], highest[3]));
}

// From scores to weights e^(scale (score - highest)), rounded, and 0 where a line does not see the entry. Returns their sums.
Vec weigh(const Lines& lines, const std::vector<std::uint16_t>& seen, TileRow* weights) {
  const Vec highest = highest_scores(lines, seen, weights);
  const Vec scale = broadcast(lines.p.scale * 1.44269504088896341f);
  // a line that sees nothing has no highest score, and its weights are not kept
  const Vec lowest = _mm512_set1_ps(-__builtin_inff());
  const Vec offset = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(highest, lowest, _CMP_EQ_OQ), highest * scale, Vec{});
  const auto weight = [&](std::int64_t entry) { return power_of_two(fma(load_row(weights[entry]), scale, -offset)); };
  Vec sums{};
  for (std::int64_t entry = 0; entry < lines.whole; entry += kPairs) {
    Vec tile[kLanes];
    for (std::int64_t i = 0; i < kTileSide; ++i) {
      const __m512i pairs = pairs_of(weight(entry + 2 * i), weight(entry + 2 * i + 1));
      sums = sums + first_of(pairs);
      sums = sums + second_of(pairs);
      tile[i] = as_floats(pairs);
    }
    store_transposed(tile, weights + entry);
  }
  for (std::int64_t entry = lines.whole; entry < lines.entries; ++entry) {
    const std::int64_t behind = entry - lines.group.common;
    const __mmask16 kept = behind < 0 ? 0xffff : seen[behind];
    const Vec rounded = first_of(pairs_of(_mm512_maskz_mov_ps(kept, weight(entry)), Vec{}));
    sums = sums + rounded;
    store_row(rounded, weights[entry]);
  }
  return sums;
}

// Elements of the values of 32 entries in pairs of entries: rows[16 c + i] has pairs (entry 2i, entry 2i + 1) of elements
// 16 c, 16 c + 1, ... of a section.
template <int Tiles>
void pair_values(const bfloat16* const* entries, TileRow* rows) {
  alignas(64) static constexpr std::uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int i = 0; i < kTileSide; ++i)
    for (int c = 0; c < Tiles; c += 2) {
      const __m512i a = _mm512_loadu_si512(entries[2 * i] + c * kTileSide);
      const __m512i b = _mm512_loadu_si512(entries[2 * i + 1] + c * kTileSide);
      _mm512_store_si512(rows[kTileSide * c + i].words, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(rows[kTileSide * (c + 1) + i].words, _mm512_permutex2var_epi16(a, high, b));
    }
}

// Tiles 0, 1, ... += weights times values of 32 entries.
template <int Tiles>
void add_products(const TileRow* weights, const TileRow* values) {
  written();
  _tile_loadd(4, weights, kRowBytes);
  _tile_loadd(5, values, kRowBytes);
  _tile_dpbf16ps(0, 4, 5);
  _tile_loadd(6, values + kTileSide, kRowBytes);
  _tile_dpbf16ps(1, 4, 6);
  if constexpr (Tiles == 4) {
    _tile_loadd(5, values + 2 * kTileSide, kRowBytes);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, values + 3 * kTileSide, kRowBytes);
    _tile_dpbf16ps(3, 4, 6);
  }
}

template <int Tiles>
void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Tiles == 4) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

// sums: [16 lines], `bytes` from one to the next.
template <int Tiles>
void load_sums(const void* sums, std::int64_t bytes) {
  const char* first = static_cast<const char*>(sums);
  written();
  _tile_loadd(0, first, bytes);
  _tile_loadd(1, first + kRowBytes, bytes);
  if constexpr (Tiles == 4) {
    _tile_loadd(2, first + 2 * kRowBytes, bytes);
    _tile_loadd(3, first + 3 * kRowBytes, bytes);
  }
}

template <int Tiles>
void store_sums(void* sums, std::int64_t bytes) {
  char* first = static_cast<char*>(sums);
  _tile_stored(0, first, bytes);
  _tile_stored(1, first + kRowBytes, bytes);
  if constexpr (Tiles == 4) {
    _tile_stored(2, first + 2 * kRowBytes, bytes);
    _tile_stored(3, first + 3 * kRowBytes, bytes);
  }
}

// The sums of a section of the elements, tiles 0 to 3 or 0 and 1: of what all lines see, then of the rest.
template <int Tiles>
class Section {
 public:
  // out: the section's part of [16 lines, head_dim].
  Section(const Lines& lines, std::int64_t d, const TileRow* weights, float* out)
      : lines_(lines), values_(lines.p.values + d), weights_(weights), out_(out + d) {}

  void run(Rest& rest) {
    add_whole();
    for (std::int64_t row = 0, end = 0; row < lines_.group.rows; row = end) {
      end = rest.take(lines_, row);
      if (row > 0)
        load_sums<Tiles>(shared_, kRowBytes * Tiles);
      else if (end < lines_.group.rows)
        store_sums<Tiles>(shared_, kRowBytes * Tiles);
      for (std::int64_t tile = 0; tile < rest.tiles(); ++tile) add_rest(rest, tile);
      keep(row, end);
    }
  }

 private:
  void add_whole() {
    zero_sums<Tiles>();
    pair_whole(0);
    for (std::int64_t entry = 0; entry < lines_.whole; entry += kPairs) {
      pair_whole(entry + kPairs);  // while the tiles of this one load and multiply
      add_products<Tiles>(weights_ + entry, pairs_[entry / kPairs % 2]);
    }
  }

  void pair_whole(std::int64_t first) {
    if (first >= lines_.whole) return;
    const bfloat16* entries[kPairs];
    for (std::int64_t half = 0; half < kPairs; half += kTileSide)
      for (std::int64_t i = 0; i < kTileSide; ++i)
        entries[half + i] = values_ + lines_.place(first + half) + i * lines_.stride;
    pair_values<Tiles>(entries, pairs_[first / kPairs % 2]);
  }

  void add_rest(const Rest& rest, std::int64_t tile) {
    static constexpr bfloat16 kNothing[kSection] = {};
    std::int64_t listed[kPairs];
    rest.entries(tile, lines_, listed);
    const bfloat16* entries[kPairs];
    for (std::int64_t i = 0; i < kPairs; ++i) entries[i] = listed[i] < 0 ? kNothing : values_ + lines_.place(listed[i]);
    pair_values<Tiles>(entries, pairs_[0]);
    const auto weight = [&](std::int64_t i) { return listed[i] < 0 ? Vec{} : load_row(weights_[listed[i]]); };
    Vec tile_rows[kLanes];
    for (std::int64_t i = 0; i < kTileSide; ++i)
      tile_rows[i] = as_floats(pairs_of(weight(2 * i), weight(2 * i + 1)));
    store_transposed(tile_rows, rest_weights_);
    add_products<Tiles>(rest_weights_, pairs_[0]);
  }

  // The sums of the lines of rows first..end. Those of later rows are not there yet, and written again.
  void keep(std::int64_t first, std::int64_t end) {
    const std::int64_t bytes = lines_.head_dim * static_cast<std::int64_t>(sizeof(float));
    if (first == 0) return store_sums<Tiles>(out_, bytes);
    store_sums<Tiles>(own_, kRowBytes * Tiles);
    for (std::int64_t line = first * lines_.in_row; line < end * lines_.in_row; ++line)
      std::memcpy(out_ + line * lines_.head_dim, own_ + line * Tiles, Tiles * kRowBytes);
  }

  const Lines& lines_;
  const bfloat16* const values_;
  const TileRow* const weights_;
  float* const out_;
  TileRow shared_[kTileSide * Tiles], own_[kTileSide * Tiles], rest_weights_[kTileSide], pairs_[2][kTileSide * Tiles];
};

}  // namespace

bool tiles_attend(const AttentionBatch& batch, const HeadCounts& counts) {
  return matrix_tiles_allowed() && counts.head_dim % kPairs == 0 && batch.block_size % kTileSide == 0 &&
         counts.heads / counts.kv_heads <= kTiledLines;
}

LineSums attend_in_tiles(const AttentionOperands<bfloat16>& p, const RowGroup& group, std::int64_t kv_head) {
  Scratch& own = scratch();
  Lines lines{p, group, kv_head};
  list_seen(lines, own.seen);
  TileRow* queries = own.queries.get(lines.head_dim / 2);
  TileRow* weights = own.weights.get((lines.entries + kTileSide - 1) / kTileSide * kTileSide);
  float* sums = own.sums.get(kTiledLines * lines.head_dim);
  prepare_queries(lines, queries);
  score(lines, queries, weights);
  const Vec totals = weigh(lines, own.seen, weights);
  store(_mm512_mask_blend_ps(_mm512_cmp_ps_mask(totals, Vec{}, _CMP_EQ_OQ), totals, broadcast(1.0f)), own.totals);
  thread_local Rest rest;
  for (std::int64_t d = 0; d < lines.head_dim;) {
    const bool four = lines.head_dim - d >= kSection;
    if (four)
      Section<4>(lines, d, weights, sums).run(rest);
    else
      Section<2>(lines, d, weights, sums).run(rest);
    d += four ? kSection : kSection / 2;
  }
  return {sums, own.totals};
}
#else
bool tiles_attend(const AttentionBatch&, const HeadCounts&) { return false; }
LineSums attend_in_tiles(const AttentionOperands<bfloat16>&, const RowGroup&, std::int64_t) { return {}; }
#endif

}  // namespace specserve
