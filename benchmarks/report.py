"""The result page: tables, how they were measured, on which machine, by which command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.configurations import BEST_FIRST, PLAIN
from benchmarks.samples import StepTimes
from benchmarks.summary import LatencyRow, Quartiles, Row


@dataclass(frozen=True)
class Conditions:
    """date: ISO. machine: facts by name."""

    command: str
    date: str
    device: str
    machine: Mapping[str, str]
    prompts: int
    rounds: int
    new_tokens: int


def serving_page(
    rows: Sequence[Row],
    latency: Sequence[LatencyRow],
    steps: Sequence[StepTimes],
    conditions: Conditions,
    chart: str,
) -> str:
    """The whole page in Markdown. steps: the LLM's first. chart: file name of the picture beside the page."""
    sections = [
        f"# Serving speed, {conditions.device}",
        _intro(steps, conditions),
        _speed_table(rows),
        f"![Milliseconds per token and tokens per LLM step]({chart})",
        _findings(rows),
        _speed_method(conditions),
        "## Time of a step by its number of tree nodes",
        _step_table(steps),
        "## What the gateway adds",
        _latency_table(latency),
        "## Machine",
        "\n".join(f"- {name}: {fact}" for name, fact in conditions.machine.items()),
    ]
    return "\n\n".join(sections) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """The first columns are text, the others are numbers."""
    align = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *rows))


def shown_command(module: str, arguments: Sequence[str]) -> str:
    """The command as a page shows it: folders outside of the project by their last name alone."""
    shown = []
    for argument in arguments:
        flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        shown.append(flag + equals + (Path(value).name if value.startswith("/") else value))
    return shlex.join(["python", "-m", module, *shown])


def _intro(steps: Sequence[StepTimes], conditions: Conditions) -> str:
    models = [
        f"{'LLM' if index == 0 else 'SSM'} {step.model}: {step.parameters / 1e6:.1f}M parameters, stored as "
        f"{step.dtype}, {step.kernels} kernels on {step.device}"
        for index, step in enumerate(steps)
    ]
    return f"Made on {conditions.date} by `{conditions.command}`. {'; '.join(models)}."


def _speed_table(rows: Sequence[Row]) -> str:
    header = [
        "one stream, greedy",
        "tokens per LLM step",
        "ms per token",
        "× ours plain",
        "× HF `generate`",
        "first token, ms",
        "same output as HF",
        "as ours plain",
    ]
    cells = [
        [
            row.configuration.title,
            f"{row.tokens_per_step:.2f}",
            _with_quartiles(row.ms_per_token),
            f"{row.over_plain.median:.2f}",
            f"{row.over_hf.median:.2f}",
            f"{row.first_token_ms:.1f}",
            f"{row.same_as_hf} of {row.prompts}",
            f"{row.same_as_plain} of {row.prompts}",
        ]
        for row in rows
    ]
    return markdown_table(header, cells)


def _findings(rows: Sequence[Row]) -> str:
    by_key = {row.configuration.key: row for row in rows}
    tree, plain = by_key[BEST_FIRST.key], by_key[PLAIN.key]
    share = plain.tokens_per_step / tree.tokens_per_step
    return (
        f"Best-first trees need {share:.0%} of the LLM steps of plain decoding, and take "
        f"{1 / tree.over_plain.median:.0%} of its time and {1 / tree.over_hf.median:.0%} of that of Hugging Face "
        "`generate`."
    )


def _speed_method(conditions: Conditions) -> str:
    return (
        f"{conditions.prompts} prompts, up to {conditions.new_tokens} new tokens each or end-of-text, "
        f"{conditions.rounds} rounds; in a round every configuration answers all prompts, one at a time, with nothing "
        "else running, and every other round goes through the configurations in reverse. SpecServe is the whole stack "
        "as processes (Redis, speculator, verifier, gateway), timed by an HTTP client from the request to the end of "
        "the stream. The suffix index is off, as every prompt is asked more than once. Hugging Face is `generate` in "
        "its own process, timed from token ids to token ids, with its defaults for assisted generation; a bf16 row is "
        "there when a trial found bf16 at least 10% faster.\n\n"
        "- ms per token: time of the whole answer over its tokens; median over prompts (each the median of its "
        "rounds), with quartiles.\n"
        "- ×: speed-up, the median ratio over all pairs of the same prompt in the same round; Hugging Face's fastest "
        "plain row is the base.\n"
        "- tokens per LLM step: all tokens over all forward passes of the LLM, the one over the prompt included.\n"
        "- same output: prompts whose text and number of tokens are those of Hugging Face's fp32 `generate` (of our "
        "plain decoding) in every round."
    )


def _step_table(steps: Sequence[StepTimes]) -> str:
    counts = list(steps[0].median_ms)
    cells = [
        [f"{'LLM' if index == 0 else 'SSM'} {step.model}, ms", *(f"{step.median_ms[count]:.2f}" for count in counts)]
        for index, step in enumerate(steps)
    ]
    note = (
        f"\n\nMedian over steps behind a context of {steps[0].context} tokens, in a process without any service: "
        "forward pass, logits and argmax of every node."
    )
    return markdown_table(["nodes", *map(str, counts)], cells) + note


def _latency_table(latency: Sequence[LatencyRow]) -> str:
    cells = [
        [
            row.configuration.title,
            _with_quartiles(row.per_event, 3),
            _with_quartiles(row.to_first, 2),
            str(row.requests),
        ]
        for row in latency
    ]
    note = (
        "\n\nEach request is sent to the same running stack twice, in alternating order: through the gateway over HTTP "
        "streaming, and to the verifier directly over gRPC, without tokenizer, Redis record or server-sent events. "
        "Added per event: (time of the answer through the gateway - time of the direct answer) / events that carry "
        "tokens; median with quartiles over requests. With drafts an event carries all tokens of a step."
    )
    return markdown_table(["", "added ms per event", "added ms to the first token", "requests"], cells) + note


def _with_quartiles(value: Quartiles, digits: int = 2) -> str:
    return f"{value.median:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
