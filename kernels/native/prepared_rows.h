// The rows of a product in the form in which its tiles take them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "buffer.h"
#include "matrix_tiles.h"
#include "packed_linear.h"
#include "rms_norm.h"
#include "simd.h"

namespace specserve {

// Inputs, of all rows, up to which each thread prepares them for itself: cheaper than to wait for another's.
constexpr std::int64_t kOwnRows = 8192;

// Whether inputs are multiplied in pairs, a word of weights at a time, instead of one by one.
constexpr bool in_pairs(Storage storage) { return kPairsOfBFloat16 && storage == Storage::kBFloat16; }

// A row as tiles take it: its inputs, or pairs of them, of which the last is filled up with zero.
template <Storage kStorage>
using Element = std::conditional_t<in_pairs(kStorage), std::uint32_t, float>;

constexpr std::int64_t elements_for(Storage storage, std::int64_t inputs) {
  return in_pairs(storage) ? (inputs + 1) / 2 : inputs;
}

// Whether rows are multiplied by whole matrix tiles. The same throughout a process.
inline bool in_tiles(Storage storage) { return kMatrixTiles && in_pairs(storage) && matrix_tiles_allowed(); }

// Elements from one row to the next; those behind its inputs are zero. A library built for tiles has room for whole ones.
constexpr std::int64_t row_stride(Storage storage, std::int64_t inputs) {
  const std::int64_t elements = elements_for(storage, inputs);
  return kMatrixTiles && in_pairs(storage) ? (elements + kTileSide - 1) / kTileSide * kTileSide : elements;
}

inline void round_row(const float* x, std::int64_t size, float* rounded) {
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const int count = static_cast<int>(std::min<std::int64_t>(kLanes, size - i));
    store_first(round_to_bfloat16(load_first(x + i, count)), rounded + i, count);
  }
}

#if defined(__AVX512BF16__)
inline void round_row(const float* x, std::int64_t size, std::uint32_t* pairs) {
  for (std::int64_t i = 0; i < size; i += 2 * kLanes, pairs += kLanes) {
    const int low = static_cast<int>(std::min<std::int64_t>(kLanes, size - i));
    const int high = static_cast<int>(std::clamp<std::int64_t>(size - i - kLanes, 0, kLanes));
    const UintVec rounded = round_to_pairs(load_first(x + i, low), load_first(x + i + low, high));
    std::memcpy(pairs, &rounded, static_cast<std::size_t>(low + high + 1) / 2 * sizeof *pairs);
  }
}
#endif

// A row after its norm, if it has one, rounded if the weights are bf16, in the form that tiles take.
template <Storage kStorage>
void prepare_row(const LinearInput& input, std::int64_t row, std::int64_t size, Element<kStorage>* prepared) {
  const float* x = input.x + row * size;
  if constexpr (kStorage == Storage::kBFloat16) {
    thread_local Buffer scratch;
    if (input.norm) {
      float* normed = scratch.get(size);
      norm_row(x, input.norm, input.norm_eps, size, normed);
      x = normed;
    }
    round_row(x, size, prepared);
    std::fill(prepared + elements_for(kStorage, size), prepared + row_stride(kStorage, size), Element<kStorage>{});
  } else {
    norm_row(x, input.norm, input.norm_eps, size, prepared);
  }
}

// The rows of a product as tiles take them: as they are, or prepared by each thread that asks in memory of its own, or,
// where they are many, by all threads together before any asks.
template <Storage kStorage>
class PreparedRows {
 public:
  PreparedRows(ThreadPool& pool, const LinearInput& input, std::int64_t size) : input_(input), size_(size) {
    const std::int64_t stride = row_stride(kStorage, size);
    if (!needed() || input.rows * size <= kOwnRows) return;
    thread_local BufferOf<Element<kStorage>> shared;
    Element<kStorage>* rows = shared.get(input_.rows * stride);
    const std::int64_t chunk = std::max<std::int64_t>(1, kOwnRows / size);
    pool.parallel_for(static_cast<int>((input.rows + chunk - 1) / chunk), [&](int item) {
      for (std::int64_t row = item * chunk; row < std::min(input.rows, (item + 1) * chunk); ++row)
        prepare_row<kStorage>(input, row, size, rows + row * stride);
    });
    shared_ = rows;
  }

  const Element<kStorage>* get() const {
    if (shared_) return shared_;
    if constexpr (in_pairs(kStorage))
      if (input_.rounded) return reinterpret_cast<const std::uint32_t*>(input_.rounded);
    if constexpr (kStorage != Storage::kBFloat16)
      if (!input_.norm) return input_.x;
    const std::int64_t stride = row_stride(kStorage, size_);
    thread_local BufferOf<Element<kStorage>> own;
    Element<kStorage>* rows = own.get(input_.rows * stride);
    fetch();
    for (std::int64_t row = 0; row < input_.rows; ++row)
      prepare_row<kStorage>(input_, row, size_, rows + row * stride);
    return rows;
  }

 private:
  // All lines are asked for at once: another core has written part of them.
  void fetch() const {
    constexpr std::int64_t kLine = 64 / sizeof(float);
    for (std::int64_t i = 0; i < input_.rows * size_; i += kLine) __builtin_prefetch(input_.x + i, 0, 2);
  }
  bool needed() const { return !input_.rounded && (kStorage == Storage::kBFloat16 || input_.norm); }

  const LinearInput& input_;
  const std::int64_t size_;
  const Element<kStorage>* shared_ = nullptr;
};

}  // namespace specserve
