#include "child_choice.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "buffer.h"
#include "simd.h"

namespace specserve {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Values of which one maximum is kept.
constexpr std::int64_t kChunk = 64;
// Top-p looks among so many most likely tokens first, and sorts the vocabulary only when they do not suffice.
constexpr std::int64_t kNucleusGuess = 256;
// Below this, dividing by the temperature already leaves the most likely tokens alone.
constexpr float kSmallestTemperature = 1e-20f;

struct Scratch {
  Buffer scores;
  std::vector<float> maxima, ordered;
  std::vector<Candidate> likely;
};

Scratch& scratch() {
  thread_local Scratch own;
  return own;
}

// log(sum(exp(factor * values))), for a factor above 0.
float log_sum_exp(const float* values, std::int64_t size, float factor) {
  const float top = highest(values, size);
  const std::int64_t whole = size - size % kSums;
  float powers = total(whole, [&](std::int64_t first, int, Vec sums) {
    return sums + exp((load(values + first) - top) * factor);
  });
  for (std::int64_t i = whole; i < size; ++i) powers += std::exp((values[i] - top) * factor);
  return top * factor + std::log(powers);
}

// The `width` largest values above minus infinity, best first; of equal ones the lower index.
void best_of(const float* values, std::int64_t size, std::int64_t width, std::vector<Candidate>& best) {
  std::vector<float>&maxima = scratch().maxima, &ordered = scratch().ordered;
  best.clear();
  maxima.clear();
  for (std::int64_t i = 0; i < size; i += kChunk) maxima.push_back(highest(values + i, std::min(kChunk, size - i)));
  // Each maximum is a value: the width-th largest of them is not above the width-th largest value.
  float least = std::numeric_limits<float>::lowest();
  if (width <= static_cast<std::int64_t>(maxima.size())) {
    ordered = maxima;
    std::nth_element(ordered.begin(), ordered.begin() + (width - 1), ordered.end(), std::greater<float>());
    least = std::max(least, ordered[width - 1]);
  }
  for (std::int64_t i = 0; i < size; i += kChunk)
    if (maxima[i / kChunk] >= least)
      for (std::int64_t j = i; j < std::min(size, i + kChunk); ++j)
        if (values[j] >= least) best.push_back({values[j], static_cast<std::int32_t>(j)});
  const auto kept = best.begin() + std::min<std::int64_t>(width, static_cast<std::int64_t>(best.size()));
  std::partial_sort(best.begin(), kept, best.end(), [](const Candidate& a, const Candidate& b) {
    return a.confidence > b.confidence || (a.confidence == b.confidence && a.token < b.token);
  });
  best.erase(kept, best.end());
}

// The score of the last of some best tokens; of none, as where every score is NaN, one that leaves nothing out.
float last_score(const std::vector<Candidate>& best) { return best.empty() ? -kInfinity : best.back().confidence; }

void leave_out_below(float least, float* scores, std::int64_t size) {
  for (std::int64_t i = 0; i < size; ++i) scores[i] = scores[i] < least ? -kInfinity : scores[i];
}

// The score of the last token of the smallest set of likely tokens with probability >= top_p.
float nucleus_threshold(const float* scores, std::int64_t size, double top_p) {
  const float log_total = log_sum_exp(scores, size, 1.0f);
  std::vector<Candidate>& likely = scratch().likely;
  for (std::int64_t guess = std::min(kNucleusGuess, size);; guess = size) {
    best_of(scores, size, guess, likely);
    double collected = 0;
    for (const Candidate& candidate : likely)
      if ((collected += std::exp(candidate.confidence - log_total)) >= top_p) return candidate.confidence;
    if (guess == size) return last_score(likely);
  }
}

// The logits themselves where the rule leaves them as they are.
const float* scores_of(const ChildRule& rule, const float* logits, const float* noise, std::int64_t vocab) {
  const bool filtered = rule.top_k > 0 || rule.top_p < 1 || rule.min_p > 0;
  if (rule.temperature == 1 && !filtered && noise == nullptr) return logits;
  float* scores = scratch().scores.get(vocab);
  // The largest score becomes 0 first, so that no temperature overflows.
  const float top = highest(logits, vocab), temperature = std::max(rule.temperature, kSmallestTemperature);
  for (std::int64_t i = 0; i < vocab; ++i) scores[i] = (logits[i] - top) / temperature;
  if (rule.top_k > 0 && rule.top_k < vocab) {
    best_of(scores, vocab, rule.top_k, scratch().likely);
    leave_out_below(last_score(scratch().likely), scores, vocab);
  }
  if (rule.top_p < 1) leave_out_below(nucleus_threshold(scores, vocab, rule.top_p), scores, vocab);
  if (rule.min_p > 0) leave_out_below(std::log(rule.min_p), scores, vocab);
  if (noise != nullptr)
    for (std::int64_t i = 0; i < vocab; ++i) scores[i] += noise[i];
  return scores;
}

}  // namespace

void choose_children(const ChildRule& rule, const float* logits, const float* noise, std::int64_t vocab,
                     std::int64_t width, float above, std::vector<Candidate>& children) {
  const float* scores = scores_of(rule, logits, noise, vocab);
  const float factor = 1 / rule.scale, offset = above - log_sum_exp(scores, vocab, factor);
  best_of(scores, vocab, std::min(width, vocab), children);
  for (Candidate& child : children) child.confidence = std::min(child.confidence * factor + offset, above);
}

}  // namespace specserve
