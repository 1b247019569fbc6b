"""The embedded models through verifier and speculators: the text of plain decoding, in fewer steps; that of Hugging
Face `generate` where both multiply in fp32.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from benchmarks.configurations import MIXED_PROMPTS
from services.common.prompt_files import read_prompts
from services.launcher.settings import EMBEDDED_LLM, EMBEDDED_SSMS
from tests.services.harness import Verifier, services
from tests.tiny_models import hugging_face_texts, write_relative

LLM = Path(EMBEDDED_LLM)
SSMS = [Path(ssm) for ssm in EMBEDDED_SSMS]
NEW_TOKENS = 64
PROMPTS = 16

Text = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(LLM / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in read_prompts(MIXED_PROMPTS)[:PROMPTS]]


@pytest.fixture(scope="module")
def texts(prompts: list[list[int]]) -> list[Text]:
    """Prompts and their continuations by plain decoding, one after the other."""
    with services() as running:
        verifier = running.verifier(LLM)
        return [(prompt, generate(verifier, prompt)) for prompt in prompts]


@pytest.fixture(scope="module")
def ssms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("ssms")
    return [*SSMS, write_relative(folder / "relative", SSMS[0], noise=0.1)]


def generate(verifier: Verifier, prompt: list[int]) -> list[int]:
    stop = list(verifier.info().eos_token_ids)
    return verifier.generate(prompt, NEW_TOKENS, stop_token_ids=stop).token_ids


def assert_lossless(verifier: Verifier, texts: list[Text], at_once: int = 1) -> None:
    with ThreadPoolExecutor(at_once) as pool:
        given = list(pool.map(lambda text: generate(verifier, text[0]), texts))
    assert given == [continuation for _, continuation in texts]


CONFIGURATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "one SSM, best-first": (1, {}),
    "the boosted pair, best-first": (2, {}),
    "one SSM, a static tree": (1, {"draft_width": (1, 1, 3, 1, 1)}),
    "one SSM, a chain": (1, {"draft_width": (1, 1, 1, 1)}),
    "three SSMs merged, best-first": (3, {"draft_nodes": 16}),
    "three SSMs merged, static trees": (3, {"draft_nodes": 16, "draft_width": (2, 2, 1)}),
    "prompts longer than a chunk": (1, {"prefill_chunk": 5}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_text_is_that_of_plain_decoding(name: str, texts: list[Text], ssms: list[Path]) -> None:
    models, settings = CONFIGURATIONS[name]
    with services() as running:
        verifier = running.verifier(LLM, running.speculator(*ssms[:models]), **settings)
        assert_lossless(verifier, texts)
        assert verifier.metric("accepted_tokens_total") > 0


@pytest.mark.parametrize("models", [0, 2])
def test_in_float32_the_text_is_hugging_faces(models: int, prompts: list[list[int]]) -> None:
    texts = list(zip(prompts, hugging_face_texts(LLM, prompts, NEW_TOKENS), strict=True))
    with services() as running:
        speculators = [running.speculator(*SSMS[:models])] if models else []
        assert_lossless(running.verifier(LLM, *speculators, dtype="float32"), texts)


def test_sixteen_requests_at_once(texts: list[Text]) -> None:
    with services() as running:
        assert_lossless(running.verifier(LLM, running.speculator(*SSMS)), texts, at_once=PROMPTS)


def test_trees_need_at_most_half_the_steps_of_plain_decoding(texts: list[Text]) -> None:
    with services() as running:
        verifier = running.verifier(LLM, running.speculator(*SSMS))
        assert_lossless(verifier, texts)
        tokens, steps = verifier.metric("output_tokens_total"), verifier.metric("sequence_steps_total")
        assert steps <= tokens / 2


def test_the_models_fit_their_size(texts: list[Text]) -> None:
    stored = sum(file.stat().st_size for folder in (LLM, *SSMS) for file in folder.rglob("*") if file.is_file())
    assert stored <= 60 * 2**20
    assert all((folder / "README.md").exists() for folder in (LLM, *SSMS)), "each model has its card"
