"""The embedded models through verifier and speculators: the text of Hugging Face `generate`, in fewer steps."""

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
def texts() -> list[Text]:
    """Prompts and Hugging Face's greedy continuations of them."""
    tokenizer = Tokenizer.from_file(str(LLM / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in read_prompts(MIXED_PROMPTS)[:PROMPTS]]
    return list(zip(prompts, hugging_face_texts(LLM, prompts, NEW_TOKENS), strict=True))


@pytest.fixture(scope="module")
def ssms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("ssms")
    return [*SSMS, write_relative(folder / "relative", SSMS[0], noise=0.1)]


def assert_lossless(verifier: Verifier, texts: list[Text], at_once: int = 1) -> None:
    stop = list(verifier.info().eos_token_ids)

    def generate(text: Text) -> list[int]:
        return verifier.generate(text[0], NEW_TOKENS, stop_token_ids=stop).token_ids

    with ThreadPoolExecutor(at_once) as pool:
        assert list(pool.map(generate, texts)) == [continuation for _, continuation in texts]


CONFIGURATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "no speculator": (0, {}),
    "one SSM, best-first": (1, {}),
    "the boosted pair, best-first": (2, {}),
    "one SSM, a static tree": (1, {"draft_width": (1, 1, 3, 1, 1)}),
    "one SSM, a chain": (1, {"draft_width": (1, 1, 1, 1)}),
    "three SSMs merged, best-first": (3, {"draft_nodes": 16}),
    "three SSMs merged, static trees": (3, {"draft_nodes": 16, "draft_width": (2, 2, 1)}),
    "prompts longer than a chunk": (1, {"prefill_chunk": 5}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_text_is_hugging_faces(name: str, texts: list[Text], ssms: list[Path]) -> None:
    models, settings = CONFIGURATIONS[name]
    with services() as running:
        speculators = [running.speculator(*ssms[:models])] if models else []
        verifier = running.verifier(LLM, *speculators, **settings)
        assert_lossless(verifier, texts)
        assert (verifier.metric("accepted_tokens_total") > 0) == (models > 0)


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
