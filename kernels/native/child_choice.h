// Which tokens become the children of a node, and how sure the draft is of them: the rules of speculation/children.py and,
// of speculation/logits.py, those that need no context.
#pragma once

#include <cstdint>
#include <vector>

namespace specserve {

// Mirrored by a ctypes structure: the order and the types of the fields are shared.
//
// A token's score is logit / temperature, minus infinity where top_k, top_p or min_p (0, 1 and 0: off) leave it out, plus
// the noise of its position when `noisy`. Children are the tokens of the highest scores; the confidence of a child is
// log softmax(scores / scale).
struct ChildRule {
  float temperature;
  float scale;
  std::int64_t top_k;
  double top_p;
  float min_p;
  std::int32_t noisy;
  std::uint64_t seed;
};

struct Candidate {
  float confidence;
  std::int32_t token;
};

// The `width` best children of a node, best first, fewer when fewer tokens are possible; of equal ones the lower token.
// logits: [vocab]. noise: [vocab], null for a rule without. above: the node's own confidence, which theirs include and
// never exceed.
void choose_children(const ChildRule& rule, const float* logits, const float* noise, std::int64_t vocab,
                     std::int64_t width, float above, std::vector<Candidate>& children);

}  // namespace specserve
