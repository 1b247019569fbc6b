"""What a Generate stream carries: log-probabilities, stop tokens, steps, and the continuation of an earlier attempt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from kernels.backend import choose_backend
from protos import verifier_pb2
from tests.services.harness import Services, Verifier
from tests.tiny_models import CONTEXT, VOCAB, hugging_face_greedy

PROMPT = [5, 17, 60, 3, 44, 8]


@pytest.fixture
def drafted(llm: Path, ssms: list[Path], running: Services) -> Verifier:
    return running.verifier(llm, running.speculator(*ssms))


def exact_logprobs(llm: Path, tokens: list[int]) -> torch.Tensor:
    """log p of every next token, float64 [tokens, vocab]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0].double(), -1)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 5, "seed": 3}])
def test_logprobs_are_the_models_own(sampling: dict[str, float], llm: Path, drafted: Verifier) -> None:
    generated = drafted.generate(PROMPT, 20, sampling=sampling, top_logprobs=3, prompt_logprobs=True)
    assert generated.llm_steps < 20, "several tokens of a step have their own"
    tokens = PROMPT + generated.token_ids
    exact = exact_logprobs(llm, tokens)
    entries = list(generated.outputs[0].prompt_logprobs)
    assert len(entries) == len(PROMPT) - 1
    entries += [entry for output in generated.outputs for entry in output.logprobs]
    assert len(entries) == len(tokens) - 1
    for position, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(exact[position, tokens[position + 1]]), abs=1e-3)
        best = exact[position].topk(3)
        assert list(entry.top_token_ids) == best.indices.tolist()
        assert list(entry.top_logprobs) == pytest.approx(best.values.tolist(), abs=1e-3)


def test_prompt_logprobs_alone_over_several_chunks(llm: Path, running: Services) -> None:
    verifier = running.verifier(llm, prefill_chunk=7, max_step_rows=9)
    prompt = torch.randint(1, VOCAB, (CONTEXT,), generator=torch.Generator().manual_seed(0)).tolist()
    generated = verifier.generate(prompt, 0, prompt_logprobs=True)
    assert generated.token_ids == []
    assert generated.finish_reason == verifier_pb2.FINISH_REASON_LENGTH
    exact = exact_logprobs(llm, prompt)
    found = [entry.logprob for entry in generated.outputs[-1].prompt_logprobs]
    assert found == pytest.approx([float(exact[i, token]) for i, token in enumerate(prompt[1:])], abs=1e-3)


def test_without_top_logprobs_there_are_none(shared_verifier: Verifier) -> None:
    generated = shared_verifier.generate(PROMPT, 3)
    assert not any(output.logprobs or output.prompt_logprobs for output in generated.outputs)


def test_a_stop_token_ends_the_stream_with_itself(llm: Path, drafted: Verifier) -> None:
    expected = hugging_face_greedy(llm, PROMPT, 20)
    stop = expected[11]
    generated = drafted.generate(PROMPT, 20, stop_token_ids=[stop])
    assert generated.token_ids == expected[: expected.index(stop) + 1]
    assert generated.finish_reason == verifier_pb2.FINISH_REASON_STOP


def test_the_limit_cuts_what_a_step_accepted(llm: Path, drafted: Verifier) -> None:
    expected = hugging_face_greedy(llm, PROMPT, 20)
    for limit in range(1, 12):
        generated = drafted.generate(PROMPT, limit)
        assert generated.token_ids == expected[:limit]
        assert generated.finish_reason == verifier_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.0, "seed": 9}, {"temperature": 0.7, "frequency_penalty": 1.0, "repetition_penalty": 1.2}],
)
@pytest.mark.parametrize("cut", [1, 7, 19, 20])
def test_an_attempt_goes_on_behind_an_earlier_one(sampling: dict[str, float], cut: int, drafted: Verifier) -> None:
    whole = drafted.generate(PROMPT, 20, sampling=sampling).token_ids
    rest = drafted.generate(PROMPT, 20, sampling=sampling, generated_token_ids=whole[:cut])
    assert whole[:cut] + rest.token_ids == whole
    assert rest.finish_reason == verifier_pb2.FINISH_REASON_LENGTH


def test_model_info(llm: Path, drafted: Verifier) -> None:
    info = drafted.info()
    assert (info.model, info.vocab_size, info.context_length) == (llm.name, VOCAB, CONTEXT)
    assert list(info.eos_token_ids) == [0]
    assert (info.device, info.dtype) == ("cpu", "float32")
    assert info.kernels == choose_backend(torch.device("cpu")).name
    assert info.parameters == sum(
        p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(llm).parameters()
    )
