"""Text, stop strings and reports of one choice, without services."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.choice import ChoiceText, Delta, PromptText
from services.gateway.generation import FinishReason, Logprob, Step, VerifierFailed
from services.gateway.tokenizer import GatewayTokenizer
from tests.services.gateway.tokenizers_for_tests import CORPUS, byte_fallback, byte_level

LIBRARY = byte_level()
TOKENIZER = GatewayTokenizer(LIBRARY)
PROMPT = LIBRARY.encode("Es war: 日").ids
STOPS = st.lists(st.sampled_from(["a", " to", "日本", "text", "😀🚀", "never there", "\n\nprint"]), max_size=3)


def steps_of(token_ids: list[int], cuts: list[int]) -> list[Step]:
    """The tokens in steps; each token's log-probability is minus its id."""
    borders = sorted({0, len(token_ids), *(min(cut, len(token_ids)) for cut in cuts)})
    steps = []
    for start, end in itertools.pairwise(borders):
        part = tuple(token_ids[start:end])
        finish = FinishReason.LENGTH if end == len(token_ids) else None
        steps.append(Step(part, tuple(Logprob(-float(token)) for token in part), finish_reason=finish))
    return steps


def run(steps: list[Step], stop: list[str], echo: bool = False) -> list[Delta]:
    text = ChoiceText(PromptText(TOKENIZER, PROMPT, whole=True), stop=stop, echo=echo, report=True)
    deltas = []
    for step in steps:
        deltas.append(text.push(step))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


@given(text=st.sampled_from(CORPUS), stop=STOPS, cuts=st.lists(st.integers(0, 80), max_size=10))
def test_every_split_into_steps_gives_the_same(text: str, stop: list[str], cuts: list[int]) -> None:
    token_ids = LIBRARY.encode(text).ids
    [whole] = run(steps_of(token_ids, []), stop)
    deltas = run(steps_of(token_ids, cuts), stop)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == list(whole.token_ids)
    assert [report for delta in deltas for report in delta.reports] == list(whole.reports)
    assert deltas[-1].finish_reason == whole.finish_reason
    assert all(delta.finish_reason is None for delta in deltas[:-1])


@given(text=st.sampled_from(CORPUS), stop=STOPS)
def test_text_and_tokens_end_at_the_stop(text: str, stop: list[str]) -> None:
    token_ids = LIBRARY.encode(text).ids
    [delta] = run(steps_of(token_ids, []), stop)
    found = [text.index(string) + len(string) for string in stop if string in text]
    if found:
        assert delta.finish_reason is FinishReason.STOP
        end = min(found)
        assert any(delta.text + string == text[:end] for string in stop)
        assert len(LIBRARY.decode(list(delta.token_ids[:-1]))) <= end <= len(LIBRARY.decode(list(delta.token_ids)))
    else:
        assert (delta.text, delta.finish_reason, len(delta.token_ids)) == (text, FinishReason.LENGTH, len(token_ids))


@given(text=st.sampled_from(CORPUS), stop=STOPS)
def test_reports_cover_the_shown_text(text: str, stop: list[str]) -> None:
    prompt_length = len(LIBRARY.decode(PROMPT))
    [delta] = run(steps_of(LIBRARY.encode(text).ids, []), stop)
    assert all(report.offset < prompt_length + len(delta.text) for report in delta.reports)
    for report in delta.reports:
        assert report.top == {report.token: report.logprob}
        if not report.token.startswith("bytes:"):
            assert text[report.offset - prompt_length :].startswith(report.token)


def test_a_character_that_begins_in_the_prompt() -> None:
    first, second = LIBRARY.encode("ó").ids
    whole = ChoiceText(PromptText(TOKENIZER, [first], whole=True), echo=True)
    assert whole.push(Step((second,), finish_reason=FinishReason.LENGTH)).text == "ó"
    cut = ChoiceText(PromptText(TOKENIZER, [*LIBRARY.encode("x").ids, first], whole=True), echo=True)
    assert cut.push(Step((), finish_reason=FinishReason.LENGTH)).text == "x\ufffd"


def test_the_prompt_is_reported_as_it_is_written() -> None:
    library = byte_fallback()
    prompt = library.encode("the a").ids
    text = ChoiceText(PromptText(GatewayTokenizer(library), prompt, whole=True), echo=True, report=True)
    logprobs = tuple(Logprob(-1.0, ((prompt[1], -0.5),)) for _ in prompt[1:])
    delta = text.push(Step((), prompt_logprobs=logprobs, finish_reason=FinishReason.LENGTH))
    assert delta.text == "the a"
    assert [(report.token, report.offset) for report in delta.reports] == [("<s>", 0), ("the", 0), (" a", 3)]
    assert [report.logprob for report in delta.reports] == [None, -1.0, -1.0]
    assert delta.reports[1].top == {"the": -1.0}
    assert delta.reports[2].top == {" the": -0.5, " a": -1.0}


def test_reports_that_do_not_fit_the_prompt_are_refused() -> None:
    text = ChoiceText(PromptText(TOKENIZER, PROMPT, whole=True), echo=True, report=True)
    with pytest.raises(VerifierFailed, match="0 log-probabilities for a prompt of"):
        text.push(Step((5,), (Logprob(-1.0),)))
