"""What the LLM says to a set of prompts, kept on disk: the text that small models learn from.

Runs the LLM with the project's own runtime. A shard of continuations is one file; a repeated call makes those that are
missing, the same ones whenever and wherever it is repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save

from runtime.batch import Segment
from runtime.kv_cache import BLOCK_SIZE, CachedSequence, KVCache
from runtime.transformer import Transformer
from training.files import write_bytes

SHARD = 256
CONCURRENT = 64
TOP = 16  # most likely tokens whose log-probabilities are kept at each position

Integers = npt.NDArray[np.int32]
Halves = npt.NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class Continuation:
    """A prompt and what the LLM wrote behind it.

    tokens: int32 [prompt + new]. prompt_length: how many of them are the prompt's.
    top_ids, top_log_probs: int32 and float16 [new, TOP], the LLM's most likely tokens at each new position, best first.
    """

    tokens: Integers
    prompt_length: int
    top_ids: Integers
    top_log_probs: Halves

    @property
    def new(self) -> int:
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class Job:
    """One continuation to make. samples: drawn at temperature 1; otherwise each token is the most likely one."""

    prompt: tuple[int, ...]
    samples: bool


@dataclass
class _Running:
    job: Job
    cache: CachedSequence
    tokens: list[int]
    tops: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.safetensors"


def make_shard(
    llm: Transformer, jobs: Sequence[Job], new_tokens: int, seed: int, on_token: Callable[[int], None]
) -> list[Continuation]:
    """The continuations of `jobs`, up to `new_tokens` tokens or an end-of-text token each.

    seed: of the draws; the same jobs and seed give the same continuations. on_token: told how many tokens were added.
    """
    generator = torch.Generator(llm.device).manual_seed(seed)
    longest = max(len(job.prompt) for job in jobs) + new_tokens
    blocks = min(CONCURRENT, len(jobs)) * -(-longest // BLOCK_SIZE)
    cache = KVCache(llm.config, blocks, llm.device, llm.kv_dtype)
    waiting = deque(enumerate(jobs))
    running: dict[int, _Running] = {}
    made: dict[int, Continuation] = {}
    while waiting or running:
        while waiting and len(running) < CONCURRENT:
            index, job = waiting.popleft()
            running[index] = _Running(job, CachedSequence(), list(job.prompt))
            cache.reserve(running[index].cache, len(job.prompt) + new_tokens)
        _step(llm, cache, list(running.values()), generator)
        on_token(len(running))
        for index, sequence in list(running.items()):
            if len(sequence.tops) == new_tokens or sequence.tokens[-1] in llm.config.eos_token_ids:
                cache.release(sequence.cache)
                made[index] = _finished(running.pop(index))
    return [made[index] for index in range(len(jobs))]


@torch.inference_mode()
def _step(llm: Transformer, cache: KVCache, running: list[_Running], generator: torch.Generator) -> None:
    """Compute what is not in the cache yet and add a token to every sequence."""
    segments = [Segment.chain(s.cache, s.tokens[s.cache.length :], s.cache.length) for s in running]
    ends = [rows - 1 for rows in accumulate(len(segment.token_ids) for segment in segments)]
    log_probs = llm.step(segments, ends, cache).log_softmax(-1)
    top_log_probs, top_ids = log_probs.topk(min(TOP, log_probs.shape[1]))
    chosen = top_ids[:, 0].clone()
    sampling = torch.tensor([s.job.samples for s in running], device=llm.device)
    if sampling.any():
        drawn = torch.multinomial(log_probs[sampling].exp(), 1, generator=generator)
        chosen[sampling] = drawn[:, 0]
    top_ids, top_log_probs = top_ids.cpu(), top_log_probs.cpu()
    for row, (sequence, token) in enumerate(zip(running, chosen.tolist(), strict=True)):
        sequence.cache.length = len(sequence.tokens)
        sequence.tokens.append(token)
        sequence.tops.append((top_ids[row], top_log_probs[row]))


def _finished(sequence: _Running) -> Continuation:
    ids, log_probs = (torch.stack(values).numpy() for values in zip(*sequence.tops, strict=True))
    tokens = np.array(sequence.tokens, dtype=np.int32)
    return Continuation(tokens, len(sequence.job.prompt), ids.astype(np.int32), log_probs.astype(np.float16))


def write_shard(path: Path, continuations: Sequence[Continuation]) -> None:
    """
    Raises:
        CannotWrite: no space is left, or the folder cannot be written to.
    """
    lengths = [(len(continuation.tokens), continuation.prompt_length) for continuation in continuations]
    arrays = {
        "lengths": np.array(lengths, dtype=np.int32),
        "tokens": np.concatenate([continuation.tokens for continuation in continuations]),
        "top_ids": np.concatenate([continuation.top_ids for continuation in continuations]),
        "top_log_probs": np.concatenate([continuation.top_log_probs for continuation in continuations]),
    }
    write_bytes(path, save(arrays))


def read_shard(path: Path) -> Iterator[Continuation]:
    arrays = load_file(path)
    first_token = first_new = 0
    for total, prompt in arrays["lengths"].tolist():
        tokens, new = slice(first_token, first_token + total), slice(first_new, first_new + total - prompt)
        yield Continuation(arrays["tokens"][tokens], prompt, arrays["top_ids"][new], arrays["top_log_probs"][new])
        first_token, first_new = tokens.stop, new.stop
