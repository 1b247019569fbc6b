"""The LLM's continuations are its own text with its own probabilities, and come back from the disk as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from runtime.transformer import LoadOptions, Transformer
from tests.tiny_models import hugging_face_texts, write_model
from training.continuations import CONCURRENT, TOP, Continuation, Job, make_shard, read_shard, write_shard

NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llm"), scale=2.0)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Transformer:
    return Transformer.load(folder, LoadOptions(device="cpu"))


def jobs(count: int, samples: bool) -> list[Job]:
    rng = np.random.default_rng(3)
    return [Job(tuple(rng.integers(1, 300, int(rng.integers(1, 20))).tolist()), samples) for _ in range(count)]


def make(llm: Transformer, wanted: list[Job], seed: int = 0) -> list[Continuation]:
    return make_shard(llm, wanted, NEW, seed, lambda count: None)


def test_greedy_continuations_are_those_of_hugging_face(llm: Transformer, folder: Path) -> None:
    wanted = jobs(CONCURRENT + 9, samples=False)  # more than run at once
    told: list[int] = []
    made = make_shard(llm, wanted, NEW, 0, told.append)
    assert sum(told) == sum(continuation.new for continuation in made)
    texts = [continuation.tokens[continuation.prompt_length :].tolist() for continuation in made[:6]]
    assert texts == hugging_face_texts(folder, [list(job.prompt) for job in wanted[:6]], NEW)
    for job, continuation in zip(wanted, made, strict=True):
        assert tuple(continuation.tokens[: continuation.prompt_length]) == job.prompt
        assert continuation.top_ids[:, 0].tolist() == continuation.tokens[continuation.prompt_length :].tolist()


def test_the_probabilities_are_the_models(llm: Transformer, folder: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for continuation in make(llm, jobs(3, samples=True)):
        tokens = torch.from_numpy(continuation.tokens.astype(np.int64))[None]
        with torch.inference_mode():
            expected = model(input_ids=tokens[:, :-1]).logits[0, continuation.prompt_length - 1 :].log_softmax(-1)
        values, ids = expected.topk(TOP)
        torch.testing.assert_close(torch.from_numpy(continuation.top_log_probs).float(), values, atol=5e-3, rtol=1e-3)
        assert (torch.from_numpy(continuation.top_ids) == ids).float().mean() > 0.95, "near ties may change places"


def test_draws_are_random_and_repeatable(llm: Transformer) -> None:
    wanted = [Job((5, 6, 7), samples=True)] * 20
    first, again, other = make(llm, wanted), make(llm, wanted), make(llm, wanted, seed=1)
    texts = [[tuple(continuation.tokens) for continuation in made] for made in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 10
    chosen = np.concatenate([c.top_ids[:, 0] == c.tokens[c.prompt_length :] for c in first])
    assert 0 < chosen.mean() < 1, "most likely tokens and others"


def test_a_continuation_ends_with_the_text(tmp_path: Path) -> None:
    llm = Transformer.load(write_model(tmp_path, eos_token_id=list(range(160))), LoadOptions(device="cpu"))
    made = make(llm, jobs(20, samples=True))
    assert {continuation.new for continuation in made} > {1, 2}
    for continuation in made:
        ends = continuation.tokens[continuation.prompt_length :] < 160
        assert not ends[:-1].any()
        assert ends[-1] or continuation.new == NEW


def test_shards_come_back_as_they_were(llm: Transformer, tmp_path: Path) -> None:
    made = make(llm, jobs(5, samples=True))
    write_shard(tmp_path / "new" / "shard", made)
    back = list(read_shard(tmp_path / "new" / "shard"))
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["shard"], "no half-written file is left"
    assert len(back) == len(made)
    for one, other in zip(made, back, strict=True):
        assert one.prompt_length == other.prompt_length
        for name in ("tokens", "top_ids", "top_log_probs"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
