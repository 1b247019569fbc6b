"""The serving page: tables, how they were measured, on which machine, by which command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.configurations import Configuration
from benchmarks.gateway import GatewayLoad
from benchmarks.markdown import markdown_table, with_quartiles
from benchmarks.samples import LatencyPair
from benchmarks.summary import LatencyRow, summarize_latency
from benchmarks.target import Target, target_sections

ADDED_MS_AIM, OPEN_STREAMS_AIM = 1.0, 500


@dataclass(frozen=True)
class Conditions:
    """date: ISO. machine: facts by name. absent: peers that took no part, and why."""

    command: str
    date: str
    device: str
    machine: Mapping[str, str]
    prompts: int
    rounds: int
    new_tokens: int
    absent: Mapping[str, str] = field(default_factory=dict)


def serving_page(targets: Sequence[Target], gateway: Sequence[GatewayLoad], conditions: Conditions, chart: str) -> str:
    """The whole page in Markdown. chart: file name of the picture beside the page."""
    pairs = [pair for target in targets for pair in target.measured.latency]
    configurations = {c.key: c for target in targets for c in target.configurations}
    sections = [
        f"# Serving speed, {conditions.device}",
        f"Made on {conditions.date} by `{conditions.command}`.",
        f"![Milliseconds per token and tokens per LLM step]({chart})",
        *(f"{name} took no part: {why}." for name, why in conditions.absent.items()),
        *(section for target in targets for section in target_sections(target)),
        "## How it was measured",
        _method(conditions),
        "## What the gateway adds",
        _latency_table(list(configurations.values()), pairs),
        *([_gateway_table(gateway)] if gateway else []),
        "## Machine",
        "\n".join(f"- {name}: {fact}" for name, fact in conditions.machine.items()),
    ]
    return "\n\n".join(sections) + "\n"


def _method(conditions: Conditions) -> str:
    return (
        f"{conditions.prompts} prompts, up to {conditions.new_tokens} new tokens each or end-of-text, "
        f"{conditions.rounds} rounds; in a round every configuration answers all prompts, one at a time, with nothing "
        "else running, and every other round goes through the configurations in reverse. Prompts are sent as token "
        "ids. SpecServe is the whole stack as processes (Redis, verifier with speculator, gateway), llama.cpp and vLLM "
        "are their own OpenAI servers; all are timed by the same HTTP client from the request to the end of the "
        "stream, with the same weights and as many threads for the LLM. Where a budget decides what SpecServe drafts, "
        "it has served each load once before, as a running service has; of the peers' settings several were tried. No "
        "prompt's computation is kept from one request to the next (prompt caches off). The suffix index is off, as "
        "every prompt is asked more than once. Hugging Face is `generate` in its own process, timed from token ids to "
        "token ids, with its defaults for assisted "
        "generation; a bf16 row of it is there when a trial found bf16 faster.\n\n"
        "- ms per token: time of the whole answer over its tokens; median over prompts (each the median of its "
        "rounds), with quartiles.\n"
        "- ×: speed-up, the median ratio over all pairs of the same prompt in the same round; Hugging Face's fastest "
        "plain row is the base. Our default × this: how many times as fast our default was as the row.\n"
        "- tokens per LLM step: all tokens over all forward passes of the LLM, the one over the prompt included; for "
        "llama.cpp from the accepted drafts that it reports, for vLLM over the events that it sends.\n"
        "- same output: prompts whose text and number of tokens are those of Hugging Face's fp32 `generate` (of our "
        "plain decoding) in every round."
    )


def _latency_table(configurations: Sequence[Configuration], pairs: Sequence[LatencyPair]) -> str:
    rows: list[LatencyRow] = summarize_latency(configurations, pairs)
    cells = [
        [
            row.configuration.title,
            with_quartiles(row.per_event, 3),
            with_quartiles(row.to_first, 2),
            str(row.requests),
        ]
        for row in rows
    ]
    note = (
        "\n\nEach request is sent to the same running stack twice, in alternating order: through the gateway over HTTP "
        "streaming, and to the verifier directly over gRPC, without tokenizer, Redis record or server-sent events. "
        "Added per event: (time of the answer through the gateway - time of the direct answer) / events that carry "
        "tokens; median with quartiles over requests of all targets. With drafts an event carries all tokens of a step."
    )
    return markdown_table(["", "added ms per event", "added ms to the first token", "requests"], cells) + note


def _gateway_table(loads: Sequence[GatewayLoad]) -> str:
    header = ["open streams", "events per second", "added ms per event, p50", "p99", "failed streams", "events"]
    cells = [
        [
            str(load.streams),
            f"{load.events_per_s:.0f}",
            f"{load.added_ms_p50:.2f}",
            f"{load.added_ms_p99:.2f}",
            str(load.failed),
            str(load.events),
        ]
        for load in loads
    ]
    note = (
        "\n\nOne gateway process before a verifier that streams scripted tokens at a fixed pace (a real gRPC server, "
        "no model): from the moment when the verifier hands a token to gRPC to the moment when the client has read its "
        f"event, on one machine. Aims: p50 under {ADDED_MS_AIM:g} ms, {OPEN_STREAMS_AIM} open streams without one "
        "failing."
    )
    return markdown_table(header, cells) + note
