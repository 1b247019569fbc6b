#include "packed_linear.h"

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "prepared_rows.h"

namespace specserve {
namespace {

constexpr int kVecs = kBlock / kLanes;
// Rows of the largest tiles of one block and of two, whose sums fill the registers beside the weights and a row's value.
// Two blocks use a value that was spread to all lanes twice, and their chains hide each other's latency; where there are
// more rows than fit, it is worth more to read a block less often.
constexpr int kTileRows = kAccumulators / kVecs;
constexpr int kTwoBlockRows = kTileRows / 2;
// Inputs between two visits of the sums to memory, where several tiles share a block: so much of it stays in the L2
// cache while all rows pass over it. A multiple of every number of inputs in a word.
constexpr std::int64_t kDepth = 512;
// Words of a block that are fetched into the L2 cache ahead of their use, and the bytes of a cache line.
constexpr std::int64_t kPrefetch = 1024, kTilePrefetch = 2048;
constexpr std::int64_t kCacheLine = 64;
// Rows that one item of work takes together, and the least multiply-adds that are worth an item.
constexpr std::int64_t kItemRows = 96;
constexpr std::int64_t kItemWork = 16384;
// Items for each thread that suffice, since claiming one waits until what the thread has written is in its cache.
constexpr std::int64_t kMostItems = 8;

constexpr int inputs_in_word(Storage storage) {
  return storage == Storage::kFloat32 ? 1 : storage == Storage::kInt8 ? 4 : 2;
}

std::int64_t words_for(Storage storage, std::int64_t inputs) {
  if (in_pairs(storage)) return row_stride(storage, inputs);
  const int n = inputs_in_word(storage);
  return (inputs + n - 1) / n;
}

std::int64_t blocks_for(bool gated, std::int64_t outputs) {
  const std::int64_t covered = gated ? kLanes : kBlock, wanted = gated ? outputs / 2 : outputs;
  return (wanted + covered - 1) / covered;
}

inline UintVec load_words(const std::uint32_t* source) {
  UintVec words;
  std::memcpy(&words, source, sizeof words);
  return words;
}

// The weight of input `index` of each word.
template <Storage kStorage>
inline Vec unpack(const std::uint32_t* source, int index) {
  UintVec words = load_words(source);
  if constexpr (kStorage == Storage::kInt8) {
    IntVec bytes;
    words <<= 24 - 8 * index;
    std::memcpy(&bytes, &words, sizeof bytes);
    return __builtin_convertvector(bytes >> 24, Vec);
  } else if constexpr (kStorage == Storage::kFloat16) {
    return half_to_float(index == 0 ? words & 0xffffu : words >> 16);
  } else {
    if constexpr (kStorage == Storage::kBFloat16) words = index == 0 ? words << 16 : words & 0xffff0000u;
    Vec result;
    std::memcpy(&result, &words, sizeof result);
    return result;
  }
}

// Operands of a tile: x at its first row and input, packed at its first block and input.
template <Storage kStorage>
struct Tile {
  const Element<kStorage>* x;
  std::int64_t row_stride;
  const std::uint32_t* packed;
  std::int64_t block_stride;
  std::int64_t depth;  // inputs
  // Memory is fetched for what follows, so many words ahead, evenly over all tiles that share a block: by each in every
  // `tiles`-th of its words, the first after `turn`.
  std::int64_t ahead;
  std::int64_t tiles, turn;
};

template <Storage kStorage, int Blocks>
inline void prefetch(const Tile<kStorage>& t, const std::uint32_t* packed) {
  for (int b = 0; b < Blocks; ++b)
    for (std::int64_t byte = 0; byte < kBlock * 4; byte += kCacheLine)
      __builtin_prefetch(reinterpret_cast<const char*>(packed + t.ahead + b * t.block_stride) + byte, 0, 2);
}

// sums[r][v] = fma(w[v][k], x[r][k], sums[r][v]) for the first `used` inputs of a word, the second of two bf16 first.
template <Storage kStorage, int Rows, int Blocks>
inline void multiply_word(const Tile<kStorage>& t, const Element<kStorage>* x, const std::uint32_t* packed, int used,
                          Vec (&sums)[Rows][Blocks * kVecs]) {
  const auto place = [&](int v) { return packed + v / kVecs * t.block_stride + v % kVecs * kLanes; };
  if constexpr (in_pairs(kStorage)) {
    UintVec weights[Blocks * kVecs];
    for (int v = 0; v < Blocks * kVecs; ++v) weights[v] = load_words(place(v));
    for (int r = 0; r < Rows; ++r) {
      const UintVec pair = broadcast(x[r * t.row_stride]);
      for (int v = 0; v < Blocks * kVecs; ++v) sums[r][v] = fma_pairs(weights[v], pair, sums[r][v]);
    }
  } else {
    for (int done = 0; done < used; ++done) {
      const int index = kStorage == Storage::kBFloat16 ? used - 1 - done : done;
      Vec weights[Blocks * kVecs];
      for (int v = 0; v < Blocks * kVecs; ++v) weights[v] = unpack<kStorage>(place(v), index);
      for (int r = 0; r < Rows; ++r) {
        const Vec value = broadcast(x[r * t.row_stride + index]);
        for (int v = 0; v < Blocks * kVecs; ++v) sums[r][v] = fma(weights[v], value, sums[r][v]);
      }
    }
  }
}

// Continues the chains in totals [Rows][Blocks][kBlock] over the tile's inputs, or starts them when `fresh`.
template <Storage kStorage, int Rows, int Blocks>
void run_tile(const Tile<kStorage>& t, bool fresh, float* totals) {
  constexpr int kInputs = inputs_in_word(kStorage);
  const auto place = [&](int r, int v) { return totals + r * Blocks * kBlock + v * kLanes; };
  Vec sums[Rows][Blocks * kVecs];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Blocks * kVecs; ++v) sums[r][v] = fresh ? Vec{} : load(place(r, v));
  const std::int64_t words = in_pairs(kStorage) ? elements_for(kStorage, t.depth) : t.depth / kInputs;
  const Element<kStorage>* x = t.x;
  const std::uint32_t* packed = t.packed;
  std::int64_t wait = t.turn;
  for (std::int64_t word = 0; word < words; ++word, x += elements_for(kStorage, kInputs), packed += kBlock) {
    if (wait-- == 0) {
      prefetch<kStorage, Blocks>(t, packed);
      wait = t.tiles - 1;
    }
    multiply_word<kStorage, Rows, Blocks>(t, x, packed, kInputs, sums);
  }
  if (!in_pairs(kStorage) && t.depth % kInputs)
    multiply_word<kStorage, Rows, Blocks>(t, x, packed, t.depth % kInputs, sums);
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Blocks * kVecs; ++v) store(sums[r][v], place(r, v));
}

// run_tile for a number of rows that is known only now.
template <Storage kStorage, int Blocks, int Rows>
void run_tile_of(int rows, const Tile<kStorage>& t, bool fresh, float* totals) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return run_tile<kStorage, Rows, Blocks>(t, fresh, totals);
    run_tile_of<kStorage, Blocks, Rows - 1>(rows, t, fresh, totals);
  }
}

struct Product {
  LinearInput input;
  const LinearWeights& weights;
  std::int64_t words, blocks;

  // Tile `turn` of `tiles` over inputs k..k+depth of so many blocks.
  template <Storage kStorage>
  Tile<kStorage> tile(const Element<kStorage>* x, std::int64_t row, std::int64_t block, std::int64_t blocks_together,
                      std::int64_t k, std::int64_t depth, std::int64_t tiles, std::int64_t turn) const {
    const std::int64_t stride = row_stride(kStorage, weights.inputs), block_stride = words * kBlock;
    const std::int64_t begin = k / inputs_in_word(kStorage) * kBlock;
    // one tile reads on and on; several come back to a part of a block that should be there before they begin
    const bool last = k + depth == weights.inputs;
    const std::int64_t next = last ? blocks_together * block_stride - begin : depth / inputs_in_word(kStorage) * kBlock;
    return {x + row * stride + elements_for(kStorage, k), stride, weights.packed + block * block_stride + begin,
            block_stride, depth, tiles == 1 ? kPrefetch : next, tiles, turn};
  }
};

// One block, or two, times rows first..first+rows; finish(row, block, sums [kBlock]) takes each result.
template <Storage kStorage, class Finish>
void multiply_blocks(const Product& p, const Element<kStorage>* x, std::int64_t first, std::int64_t rows,
                     std::int64_t block, std::int64_t blocks, const Finish& finish) {
  alignas(64) float totals[2 * kItemRows * kBlock];
  const std::int64_t inputs = p.weights.inputs;
  // as few tiles as possible, of sizes that differ by one at most
  const std::int64_t tiles = (rows + kTileRows - 1) / kTileRows, step = tiles == 1 ? inputs : kDepth;
  for (std::int64_t k = 0; k < inputs; k += step)
    for (std::int64_t t = 0; t < tiles; ++t) {
      const std::int64_t begin = rows * t / tiles, count = rows * (t + 1) / tiles - begin;
      const std::int64_t depth = std::min(step, inputs - k);
      const Tile<kStorage> tile = p.tile<kStorage>(x, first + begin, block, blocks, k, depth, tiles, t);
      float* sums = totals + begin * blocks * kBlock;
      if (blocks == 2)
        run_tile_of<kStorage, 2, kTwoBlockRows>(static_cast<int>(count), tile, k == 0, sums);
      else
        run_tile_of<kStorage, 1, kTileRows>(static_cast<int>(count), tile, k == 0, sums);
    }
  for (std::int64_t b = 0; b < blocks; ++b)
    for (std::int64_t row = 0; row < rows; ++row) finish(first + row, block + b, totals + (row * blocks + b) * kBlock);
}

#if SPECSERVE_MATRIX_TILES
// One block times rows first..first+rows, as multiply_blocks. The tiles are shaped for `pass` rows, no more than these.
template <class Finish>
void multiply_block_in_tiles(const Product& p, const std::uint32_t* x, std::int64_t first, std::int64_t rows,
                             std::int64_t pass, std::int64_t block, const Finish& finish) {
  static_assert(kBlock == 2 * kTileSide);
  alignas(64) float totals[kItemRows * kBlock];
  const std::uint32_t* packed = p.weights.packed + block * p.words * kBlock;
  for (std::int64_t done = 0; done < rows; done += pass) {
    const std::int64_t begin = std::min(done, rows - pass);  // the last pass computes some rows once more
    const std::uint32_t* tile = x + (first + begin) * p.words;
    const std::int64_t ahead = begin == 0 ? kTilePrefetch : 0;
    if (pass > kTileSide)
      multiply_matrix_tiles<true>(tile, p.words, packed, ahead, totals + begin * kBlock);
    else
      multiply_matrix_tiles<false>(tile, p.words, packed, ahead, totals + begin * kBlock);
  }
  for (std::int64_t row = 0; row < rows; ++row) finish(first + row, block, totals + row * kBlock);
}
#endif

// How a product is cut into items: so many blocks of so many rows.
struct Cut {
  std::int64_t row_items, block_items, item_blocks;
  std::int64_t together;  // blocks that pass over the rows side by side
  std::int64_t tile_rows;  // that matrix tiles take at a time, no more than any item has

  // item_blocks is a multiple of `multiple`. One block at a time where pairs would leave a thread without an item.
  Cut(const Product& p, std::int64_t multiple, std::int64_t threads) {
    const std::int64_t rows = p.input.rows;
    row_items = (rows + kItemRows - 1) / kItemRows;
    const std::int64_t item_rows = (rows + row_items - 1) / row_items;
    const std::int64_t passes = (item_rows + 2 * kTileSide - 1) / (2 * kTileSide);
    tile_rows = (item_rows + passes - 1) / passes;
    const bool enough = row_items * p.blocks >= 2 * threads;
    together = enough && rows <= kTwoBlockRows ? 2 : 1;
    const std::int64_t unit = std::lcm(together, multiple);
    const std::int64_t unit_work = std::min(rows, kItemRows) * p.weights.inputs * kBlock * unit;
    item_blocks = unit * std::max<std::int64_t>({1, kItemWork / unit_work, p.blocks / (kMostItems * threads * unit)});
    block_items = (p.blocks + item_blocks - 1) / item_blocks;
  }
};

// finish(row, block, sums [kBlock]) takes each result, next(first row, end of rows, first block, end of blocks) all those of
// an item, which has a multiple of `multiple` blocks.
template <Storage kStorage, class Finish, class Next>
void multiply_all(ThreadPool& pool, const Product& p, std::int64_t multiple, const Finish& finish, const Next& next) {
  const Cut cut(p, multiple, pool.threads());
  const PreparedRows<kStorage> rows(pool, p.input, p.weights.inputs);
  const auto prepare = [&](int) {
    if (in_tiles(kStorage)) shape_matrix_tiles(cut.tile_rows);
    return rows.get();
  };
  pool.parallel_for(static_cast<int>(cut.row_items * cut.block_items), prepare, [&](const auto* x, int item) {
    const std::int64_t part = item / cut.block_items, first = part * p.input.rows / cut.row_items;
    const std::int64_t end = (part + 1) * p.input.rows / cut.row_items;
    const std::int64_t block = item % cut.block_items * cut.item_blocks;
    const std::int64_t block_end = std::min(block + cut.item_blocks, p.blocks);
#if SPECSERVE_MATRIX_TILES
    if constexpr (in_pairs(kStorage))
      if (in_tiles(kStorage)) {
        for (std::int64_t b = block; b < block_end; ++b)
          multiply_block_in_tiles(p, x, first, end - first, cut.tile_rows, b, finish);
        return next(first, end, block, block_end);
      }
#endif
    for (std::int64_t b = block; b < block_end; b += cut.together)
      multiply_blocks<kStorage>(p, x, first, end - first, b, std::min(cut.together, block_end - b), finish);
    next(first, end, block, block_end);
  });
}

template <class Finish, class Next>
void multiply(ThreadPool& pool, const LinearInput& input, const LinearWeights& weights, bool gated, std::int64_t multiple,
              const Finish& finish, const Next& next) {
  if (input.rows == 0) return;
  const Product p{input, weights, words_for(weights.storage, weights.inputs), blocks_for(gated, weights.outputs)};
  switch (weights.storage) {
    case Storage::kFloat32:
      return multiply_all<Storage::kFloat32>(pool, p, multiple, finish, next);
    case Storage::kBFloat16:
      return multiply_all<Storage::kBFloat16>(pool, p, multiple, finish, next);
    case Storage::kFloat16:
      return multiply_all<Storage::kFloat16>(pool, p, multiple, finish, next);
    case Storage::kInt8:
      return multiply_all<Storage::kInt8>(pool, p, multiple, finish, next);
  }
}

// Output that lane `lane` of a block holds; `outputs` or more where it holds none.
std::int64_t output_at(bool gated, std::int64_t outputs, std::int64_t block, std::int64_t lane) {
  if (!gated) return block * kBlock + lane;
  const std::int64_t unit = block * kLanes + lane % kLanes;
  if (unit >= outputs / 2) return outputs;
  return lane < kLanes ? unit : outputs / 2 + unit;
}

template <class Weight>
void pack(const Weight* weight, Storage storage, bool gated, std::int64_t inputs, std::int64_t outputs,
          std::uint32_t* packed) {
  const int n = inputs_in_word(storage);
  const std::int64_t words = words_for(storage, inputs), blocks = blocks_for(gated, outputs);
  for (std::int64_t block = 0; block < blocks; ++block)
    for (std::int64_t lane = 0; lane < kBlock; ++lane) {
      const std::int64_t output = output_at(gated, outputs, block, lane);
      if (output >= outputs) continue;
      for (std::int64_t k = 0; k < inputs; ++k)
        packed[(block * words + k / n) * kBlock + lane] |= static_cast<std::uint32_t>(weight[output * inputs + k])
                                                           << 8 * sizeof(Weight) * (k % n);
    }
}

}  // namespace

bool multiplies_in_tiles() { return in_tiles(Storage::kBFloat16); }

bool takes_rounded(const LinearWeights& weights) {
  return in_pairs(weights.storage) && weights.inputs % (2 * kTileSide) == 0;  // nothing to fill up behind a row
}

std::int64_t packed_words(Storage storage, bool gated, std::int64_t inputs, std::int64_t outputs) {
  return blocks_for(gated, outputs) * words_for(storage, inputs) * kBlock;
}

void pack_linear(const void* weight, Storage storage, bool gated, std::int64_t inputs, std::int64_t outputs,
                 std::uint32_t* packed) {
  std::fill_n(packed, packed_words(storage, gated, inputs, outputs), 0u);
  const auto run = [&](auto* bits) { pack(bits, storage, gated, inputs, outputs, packed); };
  switch (inputs_in_word(storage)) {
    case 1:
      return run(static_cast<const std::uint32_t*>(weight));
    case 2:
      return run(static_cast<const std::uint16_t*>(weight));
    default:
      return run(static_cast<const std::uint8_t*>(weight));
  }
}

void packed_linear(ThreadPool& pool, const LinearInput& input, const LinearWeights& weights, const float* residual,
                   float* out, const OutputUse& next) {
  const auto finish = [&](std::int64_t row, std::int64_t block, const float* sums) {
    for (std::int64_t lane = 0; lane < kBlock; lane += kLanes) {
      const std::int64_t output = block * kBlock + lane, place = row * weights.outputs + output;
      const int count = static_cast<int>(std::min<std::int64_t>(kLanes, weights.outputs - output));
      if (count <= 0) return;
      Vec value = load(sums + lane);
      if (weights.scales) value *= load_first(weights.scales + output, count);
      if (weights.bias) value += load_first(weights.bias + output, count);
      if (residual) value += load_first(residual + place, count);
      store_first(value, out + place, count);
    }
  };
  const auto use = [&](std::int64_t row, std::int64_t row_end, std::int64_t block, std::int64_t block_end) {
    if (next.use) next.use(row, row_end, block * kBlock, std::min(block_end * kBlock, weights.outputs));
  };
  multiply(pool, input, weights, false, std::lcm(next.multiple, std::int64_t{kBlock}) / kBlock, finish, use);
}

namespace {

void store_activation(Vec value, float* target, int count) { store_first(value, target, count); }
void store_activation(Vec value, bfloat16* target, int) { store_rounded(value, target); }

template <class Out>
void multiply_gated(ThreadPool& pool, const LinearInput& input, const LinearWeights& weights, Out* out) {
  const std::int64_t units = weights.outputs / 2;
  const auto finish = [&](std::int64_t row, std::int64_t block, const float* sums) {
    const std::int64_t unit = block * kLanes;
    const int count = static_cast<int>(std::min<std::int64_t>(kLanes, units - unit));
    Vec gate = load(sums), up = load(sums + kLanes);
    if (weights.scales) {
      gate *= load_first(weights.scales + unit, count);
      up *= load_first(weights.scales + units + unit, count);
    }
    store_activation(gate / (1.0f + exp(-gate)) * up, out + row * units + unit, count);
  };
  multiply(pool, input, weights, true, 1, finish, [](auto...) {});
}

}  // namespace

void gated_linear(ThreadPool& pool, const LinearInput& input, const LinearWeights& weights, float* out) {
  multiply_gated(pool, input, weights, out);
}

void gated_linear(ThreadPool& pool, const LinearInput& input, const LinearWeights& weights, bfloat16* out) {
  multiply_gated(pool, input, weights, out);
}

}  // namespace specserve
