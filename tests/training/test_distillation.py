"""The loss is a divergence, a batch asks at the right positions, and every epoch sees every continuation once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import write_model
from training.continuations import Continuation
from training.distillation import Batch, BatchOrder, Student, distillation_loss, first_choice_hits


def continuation(prompt: list[int], new: list[int], top: int = 3) -> Continuation:
    rng = np.random.default_rng(len(prompt))
    ids = rng.integers(0, 300, (len(new), top))
    ids[:, 0] = new
    log_probs = np.log(np.full((len(new), top), 0.2))
    tokens = np.array(prompt + new, dtype=np.int32)
    return Continuation(tokens, len(prompt), ids.astype(np.int32), log_probs.astype(np.float16))


def test_with_all_tokens_it_is_the_divergence() -> None:
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = float((p * (p / q).log()).sum())
    top = teacher.log_softmax(-1).topk(5)
    assert distillation_loss(student, top.indices, top.values) == pytest.approx(expected, abs=1e-3)
    assert distillation_loss(teacher, top.indices, top.values) == pytest.approx(0, abs=1e-4)


def test_tokens_outside_the_top_count_as_one() -> None:
    student, teacher = torch.randn(4, 50), torch.randn(4, 50)
    top = teacher.log_softmax(-1).topk(7)
    p, q = top.values.exp(), student.softmax(-1).gather(-1, top.indices)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    assert distillation_loss(student, top.indices, top.values) == pytest.approx(
        float((p * (p / q).log()).sum()), rel=1e-4
    )


def test_it_teaches_the_distribution() -> None:
    teacher = torch.randn(1, 40)
    top = teacher.log_softmax(-1).topk(8)
    logits = torch.zeros(1, 40, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        distillation_loss(logits, top.indices, top.values).backward()
        optimizer.step()
    learnt = logits.detach().log_softmax(-1).gather(-1, top.indices)
    torch.testing.assert_close(learnt, top.values, atol=0.02, rtol=0)


def test_a_batch_asks_before_each_flagged_token(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path), dtype=torch.float32)
    texts = [continuation([1, 2, 3], [10, 11, 12, 13]), continuation([4], [20, 21])]
    flags = [np.array([True, False, True, False]), np.array([False, True])]
    batch = Batch.of(texts, flags, torch.device("cpu"))
    assert batch.token_ids.tolist() == [[1, 2, 3, 10, 11, 12, 13], [4, 20, 21, 0, 0, 0, 0]]
    assert batch.wanted.nonzero().tolist() == [[0, 2], [0, 4], [1, 1]]  # before 10, 12 and 21
    assert batch.top_ids[:, 0].tolist() == [10, 12, 21]
    logits = Student(model)(batch.token_ids, batch.wanted)
    alone = [
        model(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1],
        model(input_ids=torch.tensor([[4, 20]])).logits[0, -1],
    ]
    torch.testing.assert_close(logits[0], alone[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[2], alone[1], atol=1e-4, rtol=1e-4)


def test_hits_are_where_the_first_choices_agree(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path), dtype=torch.float32)
    first = int(model(input_ids=torch.tensor([[7, 8]])).logits[0, -1].argmax())
    second = int(model(input_ids=torch.tensor([[7, 8, first]])).logits[0, -1].argmax())
    texts = [continuation([7, 8], [first, (second + 1) % 320]), continuation([9] * 30, [5])]
    hits = first_choice_hits(model, texts, batch=1)
    assert hits[0].tolist() == [True, False]
    assert len(hits[1]) == 1


def test_every_epoch_sees_every_continuation_once() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 103).tolist()
    order = BatchOrder(lengths, 10, seed=4)
    assert order.per_epoch == 10
    epochs = [[order.of_step(epoch * 10 + step) for step in range(10)] for epoch in range(2)]
    for epoch in epochs:
        seen = [index for batch in epoch for index in batch]
        assert len(set(seen)) == len(seen) == 100
    assert epochs[0] != epochs[1]
    assert BatchOrder(lengths, 10, seed=4).of_step(13) == epochs[1][3], "a function of the step alone"
    spread = np.mean([max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in epochs[0]])
    assert spread < 60, "like lengths stand together"
    assert BatchOrder([3, 4], 10, seed=0).of_step(5) in ([0, 1], [1, 0])
