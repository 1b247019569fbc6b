"""Log-probabilities to report, under the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.verifier.request import TokenLogprob


def gather_logprobs(logits: torch.Tensor, token_ids: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """One entry a row: logits float32 [rows, vocab], token_ids [rows]; `top` most likely tokens, best first."""
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    index = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    own = log_probs.gather(-1, index[:, None]).squeeze(-1).tolist()
    values, ids = log_probs.topk(top, dim=-1)
    return tuple(
        TokenLogprob(logprob, tuple(top_ids), tuple(top_values))
        for logprob, top_ids, top_values in zip(own, ids.tolist(), values.tolist(), strict=True)
    )
