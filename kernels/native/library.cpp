// What ctypes sees. Operands are checked in Python; nothing here fails except for lack of memory, which ends the process.

#include <pthread.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "decoder_blocks.h"
#include "draft_loop.h"
#include "gumbel_noise.h"
#include "rms_norm.h"
#include "tree_merging.h"

using namespace specserve;

namespace {

struct State {
  std::mutex mutex;
  std::unique_ptr<ThreadPool> pool = std::make_unique<ThreadPool>(1);
};

State* state = new State;

// A forked child has none of its parent's threads and may have inherited a locked mutex: it starts afresh.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
  const int threads = state->pool->threads();
  state = new State;
  state->pool = std::make_unique<ThreadPool>(threads);
});

// The pool, if no other thread is using it, else a pool of the calling thread alone: the bits are the same.
class Lease {
 public:
  Lease() : lock_(state->mutex, std::try_to_lock) {}
  ThreadPool& pool() { return lock_ ? *state->pool : alone_; }

 private:
  std::unique_lock<std::mutex> lock_;
  ThreadPool alone_{1};
};

}  // namespace

extern "C" {

void specserve_set_threads(std::int32_t threads) {
  const std::lock_guard<std::mutex> lock(state->mutex);
  if (threads != state->pool->threads()) state->pool = std::make_unique<ThreadPool>(threads);
}

std::int32_t specserve_get_threads() {
  const std::lock_guard<std::mutex> lock(state->mutex);
  return state->pool->threads();
}

std::int32_t specserve_multiplies_in_tiles() { return multiplies_in_tiles(); }

std::int64_t specserve_packed_words(std::int32_t storage, std::int32_t gated, std::int64_t inputs,
                                    std::int64_t outputs) {
  return packed_words(static_cast<Storage>(storage), gated != 0, inputs, outputs);
}

void specserve_pack_linear(const void* weight, std::int32_t storage, std::int32_t gated, std::int64_t inputs,
                           std::int64_t outputs, std::uint32_t* packed) {
  pack_linear(weight, static_cast<Storage>(storage), gated != 0, inputs, outputs, packed);
}

void specserve_packed_linear(const LinearWeights* weights, const float* x, std::int64_t rows, float* out) {
  packed_linear(Lease().pool(), {x, rows}, *weights, nullptr, out);
}

void specserve_rms_norm(const float* x, const float* weight, float eps, std::int64_t rows, std::int64_t size,
                        float* out) {
  rms_norm(Lease().pool(), x, weight, eps, rows, size, out);
}

void specserve_tree_attention(const AttentionBatch* batch, const float* query, const void* keys, const void* values,
                              std::int32_t kv_is_bfloat16, std::int64_t heads, std::int64_t kv_heads,
                              std::int64_t head_dim, float scale, float* out) {
  tree_attention(Lease().pool(), query, heads * head_dim, keys, values, kv_is_bfloat16 != 0, *batch,
                 HeadCounts{heads, kv_heads, head_dim}, scale, out);
}

void specserve_attention_block(const AttentionLayer* layer, const AttentionBatch* batch, const float* hidden, void* kv,
                               std::int64_t slots, std::int32_t kv_is_bfloat16, std::int32_t residual, float* out) {
  attention_block(Lease().pool(), *layer, *batch, hidden, kv, slots, kv_is_bfloat16 != 0, residual != 0, out);
}

void specserve_mlp_block(const MlpLayer* layer, const float* hidden, std::int64_t rows, std::int32_t residual,
                         float* out) {
  mlp_block(Lease().pool(), *layer, hidden, rows, residual != 0, out);
}

// Returns the first row whose token or position does not exist, and computes nothing then; -1 when there is none.
std::int64_t specserve_decoder_step(const Decoder* decoder, const KvCache* cache, const std::int64_t* token_ids,
                                    const std::int64_t* positions, const AttentionBatch* batch,
                                    const std::int64_t* wanted, std::int64_t count, float* logits,
                                    std::int64_t* argmax) {
  for (std::int64_t row = 0; row < batch->rows; ++row)
    if (token_ids[row] < 0 || token_ids[row] >= decoder->vocab || positions[row] < 0 ||
        positions[row] >= decoder->context)
      return row;
  decoder_step(Lease().pool(), *decoder, *cache, token_ids, positions, *batch, wanted, count, logits, argmax);
  return -1;
}

void specserve_grow_trees(const Decoder* decoder, const KvCache* cache, std::int64_t block_size,
                          const DraftSequence* sequences, std::int64_t count, GrownTree* trees) {
  grow_trees(Lease().pool(), *decoder, *cache, block_size, sequences, count, trees);
}

void specserve_gumbel_noise(std::uint64_t seed, std::int64_t position, std::int64_t size, float* noise) {
  gumbel_noise(seed, position, size, noise);
}

// tokens[i]: drawn behind row rows[i] of logits [.., vocab]; see gumbel_argmax.
void specserve_draw_tokens(const float* logits, std::int64_t vocab, std::int64_t count, const std::int64_t* rows,
                           const float* temperatures, const std::uint64_t* seeds, const std::int64_t* positions,
                           std::int64_t* tokens) {
  Lease().pool().parallel_for(static_cast<int>(count), [&](int i) {
    tokens[i] = gumbel_argmax(logits + rows[i] * vocab, vocab, temperatures[i], seeds[i], positions[i]);
  });
}

void specserve_merge_trees(const ScaleTables* tables, const Drafts* drafts, std::int64_t sequences, const Unions* unions) {
  merge_trees(*tables, *drafts, sequences, *unions);
}

// cache: [planes, slots, slot_bytes]; sources, targets: [moves].
void specserve_kv_compaction(char* cache, std::int64_t planes, std::int64_t slots, std::int64_t slot_bytes,
                             const std::int64_t* sources, const std::int64_t* targets, std::int64_t moves) {
  std::vector<char> moved(static_cast<std::size_t>(moves * slot_bytes));
  for (std::int64_t plane = 0; plane < planes; ++plane, cache += slots * slot_bytes) {
    for (std::int64_t m = 0; m < moves; ++m)
      std::memcpy(moved.data() + m * slot_bytes, cache + sources[m] * slot_bytes, slot_bytes);
    for (std::int64_t m = 0; m < moves; ++m)
      std::memcpy(cache + targets[m] * slot_bytes, moved.data() + m * slot_bytes, slot_bytes);
  }
}

}  // extern "C"
