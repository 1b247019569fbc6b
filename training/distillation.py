"""Teaching a small model the LLM's next-token distributions on the LLM's own continuations (Hinton et al., 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from training.boosting import Flags
from training.continuations import Continuation

SORTED_BATCHES = 16  # so many batches are sorted by length together, so that little of a batch is padding


class Student(nn.Module):
    """A small model whose head is computed only where a target waits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """token_ids: int64 [rows, length]. wanted: bool [rows, length]. Returns logits [wanted positions, vocab]."""
        hidden = self.model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal language model has an output head"
        logits: torch.Tensor = head(hidden[wanted])
        return logits


@dataclass(frozen=True)
class Batch:
    """token_ids: int64 [rows, length], padded behind. wanted: bool [rows, length], whether a position's next token is
    learnt. top_ids, top_log_probs: int64 and float32 [wanted positions, TOP], the LLM's, row by row."""

    token_ids: torch.Tensor
    wanted: torch.Tensor
    top_ids: torch.Tensor
    top_log_probs: torch.Tensor

    @classmethod
    def of(cls, continuations: Sequence[Continuation], flags: Sequence[Flags], device: torch.device) -> Batch:
        """flags: the positions to learn of each continuation, bool [new]."""
        length = max(len(continuation.tokens) for continuation in continuations)
        token_ids = np.zeros((len(continuations), length), dtype=np.int64)
        wanted = np.zeros_like(token_ids, dtype=np.bool_)
        for row, (continuation, own) in enumerate(zip(continuations, flags, strict=True)):
            token_ids[row, : len(continuation.tokens)] = continuation.tokens
            first = continuation.prompt_length - 1  # this position predicts the first new token
            wanted[row, first : first + continuation.new] = own
        ids = np.concatenate([c.top_ids[own] for c, own in zip(continuations, flags, strict=True)])
        log_probs = np.concatenate([c.top_log_probs[own] for c, own in zip(continuations, flags, strict=True)])
        return cls(
            torch.from_numpy(token_ids).to(device),
            torch.from_numpy(wanted).to(device),
            torch.from_numpy(ids.astype(np.int64)).to(device),
            torch.from_numpy(log_probs.astype(np.float32)).to(device),
        )


def distillation_loss(logits: torch.Tensor, top_ids: torch.Tensor, top_log_probs: torch.Tensor) -> torch.Tensor:
    """Sum over positions of KL(p || q), where the tokens outside the LLM's top count as one token.

    logits: the student's [positions, vocab]. top_ids, top_log_probs: the LLM's [positions, top].
    """
    logits = logits.float()
    log_q = logits.gather(-1, top_ids) - logits.logsumexp(-1, keepdim=True)
    p = top_log_probs.exp()
    # rest = 1 - sum of the top; both are kept inside (0, 1), so that their logarithms exist
    p_rest = (1 - p.sum(-1)).clamp(1e-6, 1)
    log_q_rest = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-6))
    divergence = (p * (top_log_probs - log_q)).sum(-1) + p_rest * (p_rest.log() - log_q_rest)
    return divergence.sum()


class BatchOrder:
    """Which continuations each step learns from: every epoch all of them once, in an order fixed by the seed."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        """lengths: tokens of each continuation; only batches of like length are formed."""
        self._lengths = np.array(lengths)
        self._batch = min(batch, len(lengths))
        self._seed = seed
        self._epoch = -1
        self._batches: list[list[int]] = []

    @property
    def per_epoch(self) -> int:
        return len(self._lengths) // self._batch

    def of_step(self, step: int) -> list[int]:
        """Indices of the step's continuations; a function of the step alone."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._lengths))
        stretch = SORTED_BATCHES * self._batch
        parts = [order[start : start + stretch] for start in range(0, len(order), stretch)]
        ordered = np.concatenate([part[np.argsort(self._lengths[part], kind="stable")] for part in parts])
        batches = ordered[: self.per_epoch * self._batch].reshape(self.per_epoch, self._batch)
        return [batch.tolist() for batch in rng.permutation(batches)]


@torch.inference_mode()
def first_choice_hits(model: PreTrainedModel, continuations: Sequence[Continuation], batch: int) -> list[Flags]:
    """Where the model's first choice is the LLM's, bool [new] for each continuation."""
    model.eval()
    student = Student(model)
    hits: list[Flags] = [np.zeros(0, dtype=np.bool_)] * len(continuations)
    order = sorted(range(len(continuations)), key=lambda index: len(continuations[index].tokens))
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        chosen = [continuations[index] for index in indices]
        everything = [np.ones(continuation.new, dtype=np.bool_) for continuation in chosen]
        part = Batch.of(chosen, everything, model.device)
        right = student(part.token_ids, part.wanted).argmax(-1) == part.top_ids[:, 0]
        bounds = np.cumsum([continuation.new for continuation in chosen])[:-1]
        for index, own in zip(indices, np.split(right.cpu().numpy(), bounds), strict=True):
            hits[index] = own
    model.train()
    return hits
