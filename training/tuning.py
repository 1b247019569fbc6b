"""The rounds of boost-tuning: the LLM's continuations, then one small model after the other on what is left.

Every phase keeps what it has made and skips what is there, so that a run killed at any moment goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from runtime.config import ModelConfig, read_config
from runtime.transformer import LoadOptions, Transformer
from services.common.loaded_model import leave_cores_to_kernels, use_threads
from services.common.model_files import resolve_model
from training.boosting import Flags, UncoveredSegments
from training.card import write_card
from training.continuations import SHARD, TOP, Continuation, Job, make_shard, read_shard, shard_path, write_shard
from training.distillation import Batch, BatchOrder, Student, distillation_loss, first_choice_hits
from training.distributed import Group
from training.evaluation import HeldOut, evaluate
from training.files import CannotWrite
from training.loop import LoopSettings, TrainingRun
from training.pretrain import build_llama
from training.tuning_inputs import (
    CannotTune,
    SsmStart,
    TuneSettings,
    check_starts,
    claim,
    continuations_made_of,
    jobs_of,
    tuned_of,
)

HELD_OUT_EVERY = 50  # prompts
MOST_HELD_OUT = 64  # continuations
HEAD_DIM = 64


def run(settings: TuneSettings, group: Group, console: Console) -> None:
    """Tune all the models.

    Raises:
        CannotTune, BadPrompts, ModelFilesError, UnsupportedModel: something that the user can put right.
        CannotWrite: the disk is full, or a folder cannot be written to.
    """
    disable_progress_bar()  # transformers draws one for a load of milliseconds
    use_threads(settings.threads)
    folder = resolve_model(settings.llm)
    config = read_config(folder)
    starts = check_starts(settings, folder, config)
    jobs = jobs_of(settings, folder, config)
    if group.leads:
        claim(settings.continuations / "made-of.json", continuations_made_of(settings, folder))
        claim(settings.out / "tuned-of.json", tuned_of(settings, folder, starts))
    group.wait()
    llm = Transformer.load(folder, LoadOptions(device=str(group.device)))
    leave_cores_to_kernels(llm)
    _continue_prompts(llm, jobs, settings, group, console)
    use_threads(settings.threads)
    learnt, held_out = _split(jobs, settings)
    console.print(f"{sum(c.new for c in learnt):,} tokens of the LLM to learn from in {len(learnt):,} continuations")
    uncovered = UncoveredSegments([continuation.new for continuation in learnt], settings.segment)
    everything = UncoveredSegments([continuation.new for continuation in learnt], settings.segment).flags
    for number, start in enumerate(starts, start=1):
        flags = uncovered.flags if settings.boost else everything
        tuned = _Tuned(settings, number, start, folder, config, group)
        if not any(own.any() for own in flags):
            console.print(f"ssm-{number}: nothing is left to learn; {number - 1} SSMs cover all")
            return
        tuned.train(learnt, [own.copy() for own in flags], held_out)
        uncovered.cover(tuned.hits(learnt))
        console.print(f"ssm-1 to ssm-{number} cover {uncovered.coverage()}")
        if group.leads:
            tuned.describe(llm, held_out, str(uncovered.coverage()), console)
        group.wait()


class _Tuned:
    """One round: a small model from its start to its folder."""

    def __init__(
        self, settings: TuneSettings, number: int, start: SsmStart, llm: Path, config: ModelConfig, group: Group
    ) -> None:
        self.folder = settings.out / f"ssm-{number}"
        self._settings = settings
        self._number = number
        self._start = start
        self._llm = llm
        self._group = group
        torch.manual_seed(settings.seed + number)
        self._model = self._starting_model(config)
        self._model.to(group.device)  # type: ignore[arg-type]  # transformers wraps `to` without its overloads
        self._learnt = 0

    def _starting_model(self, config: ModelConfig) -> PreTrainedModel:
        start = self._start
        if start.previous:
            return _load(str(self._settings.out / f"ssm-{self._number - 1}"))
        return _load(start.model) if start.model else _new_model(start, config)

    def train(self, learnt: Sequence[Continuation], flags: Sequence[Flags], held_out: Sequence[Continuation]) -> None:
        """Distil on the flagged positions of the continuations, then write the model's folder."""
        settings, group = self._settings, self._group
        chosen = [index for index, own in enumerate(flags) if own.any()]
        self._learnt = len(chosen)
        lengths = [len(learnt[index].tokens) for index in chosen]
        order = BatchOrder(lengths, settings.batch, settings.seed + self._number)
        tokens_per_step = sum(lengths) // len(lengths) * min(settings.batch, len(lengths))
        student = group.wrap(Student(self._model))

        def loss_of_step(step: int, part: int) -> torch.Tensor:
            indices = [chosen[index] for index in order.of_step(step)]
            wanted = sum(int(flags[index].sum()) for index in indices)
            own = [indices[index] for index in group.share(len(indices))] or indices[:1]
            batch = Batch.of([learnt[i] for i in own], [flags[i] for i in own], group.device)
            logits = student(batch.token_ids, batch.wanted)
            # The mean over all processes' positions: gradients are averaged over the processes.
            return distillation_loss(logits, batch.top_ids, batch.top_log_probs) * (group.size / wanted)

        steps = max(1, settings.tokens // tokens_per_step)
        loop = LoopSettings(steps=steps, parts=1, tokens_per_step=tokens_per_step, learning_rate=settings.learning_rate)
        measure = "share of held-out positions where the LLM's first choice differs"
        training = TrainingRun(self._model, self.folder, loop, measure, group)
        training.train(loss_of_step, lambda: 1 - self._agreement(held_out))
        if group.leads:
            training.export(self._llm)
        group.wait()

    def hits(self, learnt: Sequence[Continuation]) -> list[Flags]:
        """Where the model's first choice is the LLM's."""
        share = self._group.share(len(learnt))
        own = first_choice_hits(self._model, [learnt[index] for index in share], self._settings.batch)
        everybody = self._group.gather(own)
        return [everybody[index % self._group.size][index // self._group.size] for index in range(len(learnt))]

    def describe(self, llm: Transformer, held_out: Sequence[Continuation], coverage: str, console: Console) -> None:
        """Measure the model as it will be served; write its calibration and its card."""
        ssm = Transformer.load(self.folder, LoadOptions(device=str(self._group.device)))
        figures: HeldOut = evaluate(llm, ssm, held_out)
        figures.calibration.write(self.folder, figures.measurements())
        write_card(
            self.folder,
            llm=Path(self._settings.llm).name,
            start=_told(self._start, self._number),
            parameters=(ssm.config.parameters, llm.config.parameters),
            round_of=(self._number, len(self._settings.ssms)) if self._settings.boost else None,
            learnt=self._learnt,
            tokens=self._settings.tokens,
            coverage=coverage,
            figures=figures,
        )
        console.print(f"{self.folder}: top-1..5 of the LLM's choice {_percent(figures.greedy)}", highlight=False)

    def _agreement(self, held_out: Sequence[Continuation]) -> float:
        hits = first_choice_hits(self._model, held_out, self._settings.batch)
        return float(sum(own.sum() for own in hits) / sum(len(own) for own in hits))


def _told(start: SsmStart, number: int) -> str:
    """The start as the card tells it, without folders of this machine."""
    if start.previous:
        return f"ssm-{number - 1}"
    return Path(start.model).name if start.model else f"nothing, with {start.layers} layers of width {start.width}"


def _percent(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)


def _continue_prompts(
    llm: Transformer, jobs: Sequence[Job], settings: TuneSettings, group: Group, console: Console
) -> None:
    """Make the shards of continuations that are missing; every process its own."""
    shards = range(-(-len(jobs) // SHARD))
    missing = [shard for shard in shards if not shard_path(settings.continuations, shard).exists()]
    group.wait()
    if not missing:
        return
    _check_disk(settings, len(missing) * SHARD)
    columns = (TextColumn("LLM continues prompts"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, refresh_per_second=1) as shown:
        bar = shown.add_task("", total=len(missing) * SHARD * settings.new_tokens / group.size)
        made = 0

        def on_token(count: int) -> None:
            nonlocal made
            made += count
            speed = made / max(1e-9, shown.tasks[0].elapsed or 0)
            shown.update(bar, advance=count, description=f"{made:,} tokens, {speed:,.0f} tokens/s")

        for index in group.share(len(missing)):
            shard = missing[index]
            part = jobs[shard * SHARD : (shard + 1) * SHARD]
            made_here = make_shard(llm, part, settings.new_tokens, settings.seed * 1_000_003 + shard, on_token)
            write_shard(shard_path(settings.continuations, shard), made_here)
            shown.update(bar, completed=(index // group.size + 1) * SHARD * settings.new_tokens)
            if not console.is_terminal:
                console.print(f"shard {index + 1} of {len(missing)}: {shown.tasks[0].description}", highlight=False)
    group.wait()


def _check_disk(settings: TuneSettings, count: int) -> None:
    needed = count * settings.new_tokens * (4 + 6 * TOP)
    free = shutil.disk_usage(settings.continuations).free
    if needed > free:
        raise CannotWrite(
            f"{settings.continuations}: the continuations need up to {needed / 2**20:,.0f} MiB, "
            f"{free / 2**20:,.0f} MiB are free; make room, or give fewer prompts or --new-tokens"
        )


def _split(jobs: Sequence[Job], settings: TuneSettings) -> tuple[list[Continuation], list[Continuation]]:
    """What is learnt, and every HELD_OUT_EVERY-th prompt's continuations, which are not."""
    per_prompt = 1 + settings.samples
    learnt: list[Continuation] = []
    held_out: list[Continuation] = []
    index = 0
    for shard in range(-(-len(jobs) // SHARD)):
        for continuation in read_shard(shard_path(settings.continuations, shard)):
            (held_out if index // per_prompt % HELD_OUT_EVERY == 0 else learnt).append(continuation)
            index += 1
    if not learnt:
        raise CannotTune(
            f"{settings.prompts} has a single prompt, which is held out; give at least 2, better thousands"
        )
    return learnt, held_out[:MOST_HELD_OUT]


def _new_model(start: SsmStart, config: ModelConfig) -> PreTrainedModel:
    """A new Llama with tied embeddings, the LLM's vocabulary and its context."""
    heads = max(1, start.width // HEAD_DIM)
    eos = config.eos_token_ids[0] if config.eos_token_ids else 0
    return build_llama(
        config.vocab_size, eos, config.context_length, start.width, start.layers, heads, 1, 2 * start.width
    )


def _load(folder: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model
