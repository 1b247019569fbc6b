"""The measuring parts that need no services, on tiny models: Hugging Face's generate, and the steps of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.huggingface import Generator
from benchmarks.step_time import binary_tree, measure
from runtime.transformer import LoadOptions, Transformer
from tests.tiny_models import hugging_face_greedy, write_model, write_relative

PROMPT = "the cat sat on the"
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llm"))


def test_generate_is_timed_and_its_steps_counted(llm: Path) -> None:
    tokenizer = Tokenizer.from_file(str(llm / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    expected = hugging_face_greedy(llm, prompt, NEW_TOKENS)
    answer = Generator(str(llm), None, "float32", "cpu").complete(PROMPT, NEW_TOKENS)
    assert answer.text == tokenizer.decode(prompt + expected).removeprefix(PROMPT)
    assert answer.tokens == answer.llm_steps == answer.events == len(expected)
    assert 0 < answer.first_token_s < answer.total_s


def test_assisted_generate_needs_fewer_steps_for_the_same_text(llm: Path, tmp_path: Path) -> None:
    ssm = write_relative(tmp_path, llm, noise=0.01)
    plain = Generator(str(llm), None, "float32", "cpu").complete(PROMPT, NEW_TOKENS)
    assisted = Generator(str(llm), str(ssm), "float32", "cpu").complete(PROMPT, NEW_TOKENS)
    assert (assisted.text, assisted.tokens) == (plain.text, plain.tokens)
    assert assisted.llm_steps < plain.llm_steps


def test_steps_are_timed_for_every_number_of_nodes(llm: Path) -> None:
    model = Transformer.load(llm, LoadOptions(device="cpu"))
    times = measure("tiny", model, context=20, counts=(1, 5, 70), repeats=3)
    assert list(times.median_ms) == [1, 5, 70]
    assert all(ms > 0 for ms in times.median_ms.values())
    assert (times.device, times.dtype, times.parameters) == ("cpu", "float32", model.config.parameters)


def test_the_measured_tree_is_binary() -> None:
    assert binary_tree(7).children() == [[1, 2], [3, 4], [5, 6], [], [], [], []]
    assert len(binary_tree(1)) == 1
