"""From a model's logits to the distribution that the next token is drawn from: the one pipeline of all services.

Knows nothing of trees: a node is its logits and the tokens between the committed sequence and the next token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from speculation.sampling import SamplingParams

# Below this, dividing by the temperature already leaves the most likely tokens alone in float32.
SMALLEST_TEMPERATURE = 1e-20
# Top-p looks among this many most likely tokens first and sorts the vocabulary only when they do not suffice.
_NUCLEUS_GUESS = 256


class LogitsPipeline:
    """Logits processing of one sequence, in the order of the fields of SamplingParams.

    A token tied with the last one that top-k or top-p keeps is kept too, so that the result does not depend on the
    order in which equal logits are sorted.

    Raises:
        ValueError: a token of logit_bias or of the prompt is outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, token_ids in (("logit_bias", params.logit_bias), ("the prompt", prompt_token_ids)):
            if strangers := [t for t in token_ids if not 0 <= t < vocab_size]:
                raise ValueError(f"{name} has token {strangers[0]}; the vocabulary has tokens 0..{vocab_size - 1}")
        self.params = params
        self._device = torch.device(device)
        self._bias: torch.Tensor | None = None
        if params.logit_bias:
            self._bias = torch.zeros(vocab_size, device=self._device)
            self._bias[self._ids(list(params.logit_bias))] = torch.tensor(
                list(params.logit_bias.values()), device=self._device
            )
        # Occurrences in the output; tokens of prompt or output.
        self._counts = torch.zeros(vocab_size if params.needs_context else 0, device=self._device)
        self._seen = torch.zeros_like(self._counts, dtype=torch.bool)
        if params.needs_context:
            self._seen[self._ids(prompt_token_ids)] = True

    @property
    def plain_argmax(self) -> bool:
        """Whether the next token is the argmax of the raw logits."""
        return self.params.greedy and self._bias is None and not self.params.needs_context

    @property
    def plain_temperature(self) -> float | None:
        """T, above 0, if the next token is a draw from softmax(raw logits / T), else None."""
        params = self.params
        filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        if params.greedy or filtered or self._bias is not None or params.needs_context:
            return None
        return max(params.temperature, SMALLEST_TEMPERATURE)

    def advance(self, token_ids: Sequence[int]) -> None:
        """Commit tokens of the output."""
        if self.params.needs_context:
            ids = self._ids(token_ids)
            self._seen[ids] = True
            self._counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))

    def process(self, logits: torch.Tensor, path: Sequence[int] = ()) -> torch.Tensor:
        """Log-probabilities of the token behind committed sequence + path.

        logits: float [vocab]. path: the tokens between the committed sequence and the wanted token.

        Returns float32 [vocab], normalised, -inf where filtered; for greedy parameters unnormalised scores whose
        argmax is the token (the given logits themselves when nothing is active).
        """
        return self.process_many(logits[None], [path])[0]

    def process_many(self, logits: torch.Tensor, paths: Sequence[Sequence[int]] | None = None) -> torch.Tensor:
        """`process` for several nodes: logits float [n, vocab], one path each; float32 [n, vocab].

        paths may be left out when no parameter needs context. A row does not depend on the other rows.
        """
        scores = self._penalised(logits, paths)
        return scores if self.params.greedy else self._distribution(scores)

    def draft_log_probs(self, logits: torch.Tensor, paths: Sequence[Sequence[int]] | None = None) -> torch.Tensor:
        """What tree expansion takes: as `process_many`, but for greedy parameters normalised at temperature 1 too."""
        scores = self.process_many(logits, paths)
        return scores.log_softmax(-1) if self.params.greedy else scores

    def _penalised(self, logits: torch.Tensor, paths: Sequence[Sequence[int]] | None) -> torch.Tensor:
        scores = logits.float()
        if self._bias is not None:
            scores = scores + self._bias
        if not self.params.needs_context:
            return scores
        if paths is None or len(paths) != len(scores):
            raise ValueError(
                f"{'no' if paths is None else len(paths)} paths for {len(scores)} nodes; penalties need one for each"
            )
        seen, counts = self._contexts(paths)
        if (penalty := self.params.repetition_penalty) != 1:
            # CTRL, section 4.1, with the sign rule that the field adopted: always less likely, also below zero
            scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        if self.params.frequency_penalty:
            scores = scores - self.params.frequency_penalty * counts
        if self.params.presence_penalty:
            scores = scores - self.params.presence_penalty * (counts > 0)
        return scores

    def _contexts(self, paths: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Seen tokens (bool) and output counts (float32), [n or 1, vocab], with each node's own path included."""
        seen, counts = self._seen[None], self._counts[None]
        if not any(paths):
            return seen, counts
        rows = self._ids([row for row, path in enumerate(paths) for _ in path])
        ids = self._ids([token_id for path in paths for token_id in path])
        seen, counts = seen.repeat(len(paths), 1), counts.repeat(len(paths), 1)
        seen[rows, ids] = True
        counts.index_put_((rows, ids), torch.ones_like(ids, dtype=torch.float32), accumulate=True)
        return seen, counts

    def _distribution(self, scores: torch.Tensor) -> torch.Tensor:
        params = self.params
        if params.temperature != 1:
            # The largest score becomes 0 first, so that no temperature overflows to inf - inf.
            scores = (scores - scores.amax(-1, keepdim=True)) / max(params.temperature, SMALLEST_TEMPERATURE)
        if 0 < params.top_k < scores.shape[-1]:
            smallest = scores.topk(params.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < smallest, -torch.inf)
        if params.top_p < 1:
            scores = scores.masked_fill(scores < _nucleus_threshold(scores, params.top_p), -torch.inf)
        if params.min_p > 0:
            # p_i < min_p * p_max  <=>  score_i < score_max + log(min_p); normalisation cancels
            floor = scores.amax(-1, keepdim=True) + math.log(params.min_p)
            scores = scores.masked_fill(scores < floor, -torch.inf)
        return scores.log_softmax(-1)

    def _ids(self, token_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self._device)


def _nucleus_threshold(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Score of the last token of the smallest set with probability >= top_p; float32 [n, 1] for scores [n, vocab]."""
    log_total = scores.logsumexp(-1, keepdim=True)
    vocab_size = scores.shape[-1]
    # Whether the guess suffices would have to be read back from another device; there, sorting is the smaller evil.
    guess = min(_NUCLEUS_GUESS, vocab_size) if scores.device.type == "cpu" else vocab_size
    descending = scores.topk(guess).values
    cumulative = (descending - log_total).exp().double().cumsum(-1)
    if guess < vocab_size and bool((cumulative[:, -1] < top_p).any()):
        descending = scores.sort(-1, descending=True).values
        cumulative = (descending - log_total).exp().double().cumsum(-1)
    # The set is the tokens before which less than top_p has been collected.
    last = (cumulative < top_p).sum(-1, keepdim=True).clamp_(max=descending.shape[-1] - 1)
    return descending.gather(-1, last)
