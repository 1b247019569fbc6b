#include "packed_linear.h"

#include <algorithm>

namespace specserve {
namespace {

constexpr int kVecsPerBlock = kBlock / kLanes;
// Rows of the largest tile: on AVX-512 two blocks of twelve, elsewhere as many as fit beside one block.
constexpr int kMaxTileRows = kVecsPerBlock == 1 ? 12 : 6;
// Inputs between two visits of the accumulators to memory: a panel of weights of this depth stays in the L2 cache while
// all rows pass over it.
constexpr std::int64_t kDepth = 1024;
// Words of a block that are fetched ahead of their use.
constexpr std::int64_t kPrefetch = 32;
// Rows that one item of work takes together, and the least multiply-adds that are worth an item.
constexpr std::int64_t kItemRows = 96;
constexpr std::int64_t kItemWork = 16384;
constexpr int kItemsPerThread = 4;

// Blocks side by side in a tile of this many rows: as many independent chains as the registers hold, at most four.
constexpr int blocks_in_tile(int rows) {
  const int fit = kAccumulators / (rows * kVecsPerBlock);
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

// One linear layer and its operands; kInputs inputs in a word of packed weights.
template <int kInputs>
struct Problem {
  const float* x;
  std::int64_t inputs, outputs;
  const std::uint32_t* packed;
  const float* bias;
  const float* residual;
  float* out;

  std::int64_t words() const { return (inputs + kInputs - 1) / kInputs; }
};

inline UintVec load_words(const std::uint32_t* source) {
  UintVec result;
  std::memcpy(&result, source, sizeof result);
  return result;
}

// The weight of input `index` of each word.
template <int kInputs>
inline Vec unpack(UintVec words, int index) {
  if (kInputs == 2) words = index == 0 ? words << 16 : words & 0xffff0000u;
  Vec result;
  std::memcpy(&result, &words, sizeof result);
  return result;
}

// accumulators[r][o] = fma(w[o][k], x[r][k], accumulators[r][o]) for `used` inputs of one word.
template <int kInputs, int Rows, int Blocks>
inline void multiply_word(const Problem<kInputs>& p, const float* x, const std::uint32_t* packed, int used,
                          Vec (&accumulators)[Rows][Blocks * kVecsPerBlock]) {
  UintVec words[Blocks * kVecsPerBlock];
  for (int b = 0; b < Blocks; ++b) {
    const std::uint32_t* source = packed + b * p.words() * kBlock;
    __builtin_prefetch(source + kPrefetch * kBlock);
    for (int v = 0; v < kVecsPerBlock; ++v) words[b * kVecsPerBlock + v] = load_words(source + v * kLanes);
  }
  for (int index = 0; index < used; ++index)
    for (int r = 0; r < Rows; ++r) {
      const Vec value = broadcast(x[r * p.inputs + index]);
      for (int v = 0; v < Blocks * kVecsPerBlock; ++v)
        accumulators[r][v] = fma(unpack<kInputs>(words[v], index), value, accumulators[r][v]);
    }
}

// Inputs k..k+depth of `Rows` rows and `Blocks` blocks. Between two calls the accumulators wait in `out`.
template <int kInputs, int Rows, int Blocks>
void tile(const Problem<kInputs>& p, std::int64_t row, std::int64_t block, std::int64_t k, std::int64_t depth) {
  Vec accumulators[Rows][Blocks * kVecsPerBlock] = {};
  const std::int64_t first = block * kBlock;
  const auto visit = [&](const auto& body) {
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Blocks * kVecsPerBlock; ++v) {
        const std::int64_t left = p.outputs - first - v * kLanes;
        if (left <= 0) continue;
        const int count = static_cast<int>(std::min<std::int64_t>(left, kLanes));
        body(accumulators[r][v], (row + r) * p.outputs + first + v * kLanes, first + v * kLanes, count);
      }
  };
  if (k > 0)
    visit([&](Vec& value, std::int64_t place, std::int64_t, int count) { value = load_first(p.out + place, count); });
  const float* x = p.x + row * p.inputs + k;
  const std::uint32_t* packed = p.packed + (block * p.words() + k / kInputs) * kBlock;
  for (std::int64_t word = 0; word < depth / kInputs; ++word, x += kInputs, packed += kBlock)
    multiply_word<kInputs, Rows, Blocks>(p, x, packed, kInputs, accumulators);
  if (depth % kInputs) multiply_word<kInputs, Rows, Blocks>(p, x, packed, depth % kInputs, accumulators);
  const bool last = k + depth == p.inputs;
  visit([&](Vec& value, std::int64_t place, std::int64_t output, int count) {
    if (last && p.bias) value += load_first(p.bias + output, count);
    if (last && p.residual) value += load_first(p.residual + place, count);
    store_first(value, p.out + place, count);
  });
}

// All blocks of an item for `Rows` rows at a time, tiles of fewer rows at the end.
template <int kInputs, int Rows>
struct Tiles {
  static void run(const Problem<kInputs>& p, std::int64_t rows, std::int64_t row, std::int64_t block, int blocks,
                  std::int64_t k, std::int64_t depth) {
    if (rows != Rows) return Tiles<kInputs, Rows - 1>::run(p, rows, row, block, blocks, k, depth);
    constexpr int kBlocks = blocks_in_tile(Rows);
    while (blocks >= kBlocks) {
      tile<kInputs, Rows, kBlocks>(p, row, block, k, depth);
      block += kBlocks;
      blocks -= kBlocks;
    }
    for (; blocks > 0; ++block, --blocks) tile<kInputs, Rows, 1>(p, row, block, k, depth);
  }
};

template <int kInputs>
struct Tiles<kInputs, 0> {
  static void run(const Problem<kInputs>&, std::int64_t, std::int64_t, std::int64_t, int, std::int64_t, std::int64_t) {}
};

// Rows first..first+rows and the given blocks: the panel of up to four blocks is the outer loop, so that it is read from
// memory once.
template <int kInputs>
void multiply_panels(const Problem<kInputs>& p, std::int64_t first, std::int64_t rows, std::int64_t block, int blocks) {
  constexpr int kPanel = 4;
  // as few tiles as possible, of sizes that differ by one at most
  const std::int64_t tiles = (rows + kMaxTileRows - 1) / kMaxTileRows;
  for (int offset = 0; offset < blocks; offset += kPanel) {
    const int panel = std::min(kPanel, blocks - offset);
    for (std::int64_t k = 0; k < p.inputs; k += kDepth) {
      const std::int64_t depth = std::min(kDepth, p.inputs - k);
      for (std::int64_t t = 0; t < tiles; ++t) {
        const std::int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
        Tiles<kInputs, kMaxTileRows>::run(p, end - begin, first + begin, block + offset, panel, k, depth);
      }
    }
  }
}

template <int kInputs>
void multiply_all(ThreadPool& pool, const Problem<kInputs>& p, std::int64_t rows) {
  const std::int64_t blocks = (p.outputs + kBlock - 1) / kBlock;
  const std::int64_t row_items = (rows + kItemRows - 1) / kItemRows;
  // Blocks of an item: enough items for every thread, enough work in each, whole panels where there are many.
  const std::int64_t wanted = std::max<std::int64_t>(1, pool.threads() * kItemsPerThread / row_items);
  std::int64_t item_blocks = std::max<std::int64_t>(1, blocks / wanted);
  item_blocks = std::max(item_blocks, kItemWork / (std::min(rows, kItemRows) * p.inputs * kBlock));
  if (item_blocks > 4) item_blocks = item_blocks / 4 * 4;
  const std::int64_t block_items = (blocks + item_blocks - 1) / item_blocks;
  pool.parallel_for(static_cast<int>(row_items * block_items), [&](int item) {
    const std::int64_t row = item / block_items, first = row * rows / row_items, last = (row + 1) * rows / row_items;
    const std::int64_t block = item % block_items * item_blocks;
    multiply_panels(p, first, last - first, block, static_cast<int>(std::min(item_blocks, blocks - block)));
  });
}

template <class Weight, class Store>
void for_each_weight(const void* weight, std::int64_t inputs, std::int64_t outputs, const Store& store) {
  for (std::int64_t output = 0; output < outputs; ++output)
    for (std::int64_t k = 0; k < inputs; ++k) store(output, k, static_cast<const Weight*>(weight)[output * inputs + k]);
}

}  // namespace

void pack_linear(const void* weight, bool is_bfloat16, std::int64_t inputs, std::int64_t outputs,
                 std::uint32_t* packed) {
  const std::int64_t words = is_bfloat16 ? (inputs + 1) / 2 : inputs;
  const std::int64_t blocks = (outputs + kBlock - 1) / kBlock;
  std::fill_n(packed, blocks * words * kBlock, 0u);
  const auto word = [&](std::int64_t output, std::int64_t index) -> std::uint32_t& {
    return packed[(output / kBlock * words + index) * kBlock + output % kBlock];
  };
  if (is_bfloat16)
    for_each_weight<std::uint16_t>(weight, inputs, outputs, [&](std::int64_t output, std::int64_t k, std::uint32_t bits) {
      word(output, k / 2) |= bits << 16 * (k % 2);
    });
  else
    for_each_weight<std::uint32_t>(weight, inputs, outputs, [&](std::int64_t output, std::int64_t k, std::uint32_t bits) {
      word(output, k) = bits;
    });
}

void packed_linear(ThreadPool& pool, const float* x, std::int64_t rows, const LinearWeights& weights,
                   const float* residual, float* out) {
  if (rows == 0) return;
  const auto run = [&](auto problem) { multiply_all(pool, problem, rows); };
  if (weights.is_bfloat16)
    run(Problem<2>{x, weights.inputs, weights.outputs, weights.packed, weights.bias, residual, out});
  else
    run(Problem<1>{x, weights.inputs, weights.outputs, weights.packed, weights.bias, residual, out});
}

}  // namespace specserve
