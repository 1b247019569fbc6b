"""One target model's part of the serving page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.aims import Aim, load_aims, step_aims, stream_aims
from benchmarks.configurations import BEST_FIRST, PLAIN, Configuration
from benchmarks.load import summarize_load
from benchmarks.markdown import markdown_table, with_quartiles
from benchmarks.peers.configurations import SHORT_NAMES, WIDTHS
from benchmarks.rounds import Measurements
from benchmarks.samples import PeerSteps, StepTimes, Trial
from benchmarks.summary import Row, summarize


@dataclass(frozen=True)
class Target:
    """A large model that was measured. inflated: whose text and cost it has, in words, or empty."""

    name: str
    inflated: str
    configurations: tuple[Configuration, ...]
    measured: Measurements

    @property
    def rows(self) -> list[Row]:
        return summarize(self.configurations, self.measured.samples)

    @property
    def aims(self) -> list[Aim]:
        same = [steps for steps in self.measured.peer_steps if _as_wide(self.measured.steps[0], steps)]
        return [
            *step_aims(self.measured.steps[0], same),
            *stream_aims(self.rows),
            *load_aims(summarize_load(self.measured.load), self.configurations),
        ]


def target_sections(target: Target) -> list[str]:
    """Markdown."""
    measured, rows = target.measured, target.rows
    sections = [
        f"## {'Inflated target' if target.inflated else 'Target'}: {target.name}",
        _models(target),
        _speed_table(rows),
        _findings(rows),
        f"### Aims, {target.name}",
        _aims_table(target.aims),
        f"### Time of a step by its number of tree nodes, {target.name}",
        _step_table(measured.steps, measured.peer_steps),
    ]
    if measured.load:
        sections += [f"### Several streams at once, {target.name}", _load_table(target)]
    if measured.trials:
        sections += [f"### Settings of the peers that were tried, {target.name}", _trial_table(measured.trials)]
    return sections


def _as_wide(ours: StepTimes, theirs: PeerSteps) -> bool:
    """Whether both read as many bytes of weights: bf16 and fp16 are equals."""
    return any(
        WIDTHS.get(ours.dtype) == WIDTHS[dtype] and f", {short}" in theirs.title for dtype, short in SHORT_NAMES.items()
    )


def _models(target: Target) -> str:
    models = [
        f"{'LLM' if index == 0 else 'SSM'} {step.model}: {step.parameters / 1e6:.1f}M parameters, stored as "
        f"{step.dtype}, {step.kernels} kernels on {step.device}"
        for index, step in enumerate(target.measured.steps)
    ]
    note = f" **{target.inflated}**" if target.inflated else ""
    return f"{'; '.join(models)}.{note}"


def _speed_table(rows: Sequence[Row]) -> str:
    header = [
        "one stream, greedy",
        "tokens per LLM step",
        "ms per token",
        "× ours plain",
        "× HF `generate`",
        "our default × this",
        "first token, ms",
        "same output as HF",
        "as ours plain",
    ]
    cells = [
        [
            row.configuration.title,
            f"{row.tokens_per_step:.2f}",
            with_quartiles(row.ms_per_token),
            f"{row.over_plain.median:.2f}",
            "" if row.over_hf is None else f"{row.over_hf.median:.2f}",
            f"{row.behind_ours.median:.2f}",
            f"{row.first_token_ms:.1f}",
            "" if row.same_as_hf is None else f"{row.same_as_hf} of {row.prompts}",
            f"{row.same_as_plain} of {row.prompts}",
        ]
        for row in rows
    ]
    return markdown_table(header, cells)


def _findings(rows: Sequence[Row]) -> str:
    by_key = {row.configuration.key: row for row in rows}
    if BEST_FIRST.key not in by_key:
        return "Best-first trees without look-up took no part."
    tree, plain = by_key[BEST_FIRST.key], by_key[PLAIN.key]
    share = plain.tokens_per_step / tree.tokens_per_step
    hugging_face = (
        "" if tree.over_hf is None else f" and {1 / tree.over_hf.median:.0%} of that of Hugging Face `generate`"
    )
    return (
        f"Best-first trees need {share:.0%} of the LLM steps of plain decoding, and take "
        f"{1 / tree.over_plain.median:.0%} of its time{hugging_face}."
    )


def _aims_table(aims: Sequence[Aim]) -> str:
    cells = [
        [
            aim.title,
            f"{'at least' if aim.at_least else 'at most'} {aim.bound:g}",
            f"{aim.value:.2f}",
            "met" if aim.met else f"missed by a factor of {aim.missed_by:.2f}",
        ]
        for aim in aims
    ]
    return markdown_table(["ratio", "aim", "measured", ""], cells)


def _step_table(steps: Sequence[StepTimes], peers: Sequence[PeerSteps]) -> str:
    counts = list(steps[0].median_ms)
    lines = [(f"{'LLM' if index == 0 else 'SSM'} {step.model}, ms", step.median_ms) for index, step in enumerate(steps)]
    lines[1:1] = [(f"{peer.title}, ms", peer.ms) for peer in peers]
    cells = [[name, *(f"{ms[count]:.2f}" if count in ms else "" for count in counts)] for name, ms in lines]
    note = (
        f"\n\nOurs: median over steps behind a context of {steps[0].context} tokens, in a process without any service: "
        "forward pass, logits and argmax of every node."
    )
    if peers:
        note += (
            " llama.cpp: its own `llama-batched-bench`, one token of each of n sequences behind as long a context of "
            "its own, mean of the steps; the two take turns, and the table has the medians."
        )
    return markdown_table(["nodes", *map(str, counts)], cells) + note


def _load_table(target: Target) -> str:
    titles = {configuration.key: configuration.title for configuration in target.configurations}
    header = [
        "streams",
        "served by",
        "tokens per second",
        "first token p50, ms",
        "p99",
        "between events p50, ms",
        "p99",
    ]
    cells = [
        [
            str(row.streams),
            titles[row.configuration],
            f"{row.tokens_per_s:.0f}",
            *(f"{ms:.1f}" for ms in (row.first_token_p50, row.first_token_p99, row.gap_p50, row.gap_p99)),
        ]
        for row in summarize_load(target.measured.load)
    ]
    note = (
        "\n\nThat many clients in one process, each with one greedy request open at a time, four requests each; tokens "
        "per second while all of them had one open. An event brings the tokens of a step: several where drafts were "
        "accepted."
    )
    return markdown_table(header, cells, text_columns=2) + note


def _trial_table(trials: Sequence[Trial]) -> str:
    cells = [[trial.title, f"{trial.ms_per_token:.2f}"] for trial in trials]
    note = "\n\nThe fastest of each kind on a few short answers has the row above; chance may have ordered neighbours."
    return markdown_table(["setting", "ms per token"], cells) + note
