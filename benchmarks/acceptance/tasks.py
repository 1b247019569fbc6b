"""The parts of a run that do not depend on each other, and the processes that share them out."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from benchmarks.acceptance.bench import Setup, load
from benchmarks.acceptance.decoding import Decoded, Drafting, decode
from benchmarks.acceptance.lines import MODES, WIDTHS, Line, draft_lines, tree_nodes
from benchmarks.acceptance.runners import KnownTexts, Tokens, VisitedNodes
from benchmarks.acceptance.success import SuccessRow, measure_success, success_rows
from services.common.model_facts import ModelFacts
from services.common.prompt_files import BadPrompts
from services.verifier.runner import Runner
from speculation.acceptance import AcceptanceRule

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class Task(Protocol[R_co]):
    """Something to do in a process that has the models; pickled, as its result is."""

    def run(self, setup: Setup) -> R_co: ...


@dataclass(frozen=True)
class PromptSet:
    """A file of prompts and the LLM's own continuations.

    token_ids: of each prompt. greedy, sampled: outputs, at temperature 0 and 1, one for each prompt.
    """

    name: str
    token_ids: tuple[Tokens, ...]
    greedy: tuple[Tokens, ...]
    sampled: tuple[Tokens, ...]

    def texts(self, rule: AcceptanceRule) -> tuple[Tokens, ...]:
        """The outputs along which a rule is measured."""
        return self.greedy if rule is AcceptanceRule.GREEDY else self.sampled


@dataclass(frozen=True)
class Continue:
    """Let the LLM continue a set of prompts by plain decoding."""

    name: str
    prompts: tuple[str, ...]

    def run(self, setup: Setup) -> PromptSet:
        """Raises BadPrompts when a prompt and its continuation exceed the context of one of the models."""
        bench = load(setup)
        prompts = tuple(tuple(bench.tokenizer.encode(prompt)) for prompt in self.prompts)
        if (longest := max(map(len, prompts)) + setup.new_tokens) > bench.context_length:
            raise BadPrompts(
                f"{self.name}: the longest prompt and {setup.new_tokens} new tokens are {longest} tokens, but the "
                f"models' context is {bench.context_length}; shorten the prompt or lower --new-tokens"
            )
        runner = Runner(bench.llm.model, bench.llm.cache)
        greedy, sampled = (
            decode(bench, runner, Drafting(rule), prompts, setup.new_tokens, setup.seed).outputs
            for rule in (AcceptanceRule.GREEDY, AcceptanceRule.SHARED_NOISE)
        )
        return PromptSet(self.name, prompts, greedy, sampled)


@dataclass(frozen=True)
class Covered:
    """A part of Table 1. hits: float64 [prompts, widths] by row. positions: of each prompt."""

    prompts: str
    rule: AcceptanceRule
    hits: Mapping[SuccessRow, np.ndarray]
    positions: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.positions)


@dataclass(frozen=True)
class Success:
    """Table 1 of one set of prompts and rule."""

    prompts: PromptSet
    rule: AcceptanceRule

    def run(self, setup: Setup) -> Covered:
        texts = self.prompts.texts(self.rule)
        rows = success_rows(setup.sets)
        hits = measure_success(load(setup), rows, self.rule, self.prompts.token_ids, texts, setup.seed)
        return Covered(self.prompts.name, self.rule, hits, tuple(map(len, texts)))


@dataclass(frozen=True)
class WalkKey:
    """A cell of Tables 2 and 3."""

    prompts: str
    rule: AcceptanceRule
    line: str
    width: int


@dataclass(frozen=True)
class Walked:
    """A measured cell."""

    key: WalkKey
    decoded: Decoded

    @property
    def rule(self) -> AcceptanceRule:
        return self.key.rule

    @property
    def prompts(self) -> str:
        return self.key.prompts

    @property
    def tokens(self) -> int:
        return sum(self.decoded.tokens)


@dataclass(frozen=True)
class Walk:
    """One cell of Tables 2 and 3. MSS decodes with the LLM, because its text depends on the drafts."""

    prompts: PromptSet
    rule: AcceptanceRule
    line: Line
    width: int

    def run(self, setup: Setup) -> Walked:
        bench = load(setup)
        drafting = Drafting(self.rule, tree_nodes(self.width), self.line.widths(self.width), self.line.sources)
        model, cache = bench.llm.model, bench.llm.cache
        runner: Runner = VisitedNodes(model, cache, AcceptanceRule.MSS)
        if self.rule is not AcceptanceRule.MSS:
            runner = KnownTexts(model, cache, self.prompts.texts(self.rule))
        decoded = decode(bench, runner, drafting, self.prompts.token_ids, setup.new_tokens, setup.seed)
        return Walked(WalkKey(self.prompts.name, self.rule, self.line.key, self.width), decoded)


@dataclass(frozen=True)
class Describe:
    """What models there are: by name, "llm" first, then the SSMs."""

    def run(self, setup: Setup) -> Mapping[str, ModelFacts]:
        return load(setup).facts


def plan(setup: Setup, prompt_sets: Iterable[PromptSet]) -> list[Success | Walk]:
    """Everything to measure, the longest parts first."""
    sets = list(prompt_sets)
    lines = draft_lines(setup.sets)
    cells = [(prompts, rule, line) for rule in MODES[::-1] for line in lines[::-1] for prompts in sets]
    walks = [Walk(*cell, width) for cell in cells for width in WIDTHS[::-1]]
    naive = [Walk(prompts, AcceptanceRule.NAIVE, line, max(WIDTHS)) for prompts in sets for line in lines[:2]]
    return [*(Success(prompts, rule) for prompts in sets for rule in MODES[::-1]), *walks, *naive]


class Workers:
    """Processes that each load the models once; a context manager. With one process all runs in this one."""

    def __init__(self, setup: Setup, processes: int) -> None:
        self._setup = setup
        context = multiprocessing.get_context("spawn")
        self._pool = None if processes == 1 else ProcessPoolExecutor(processes, context)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, tasks: Sequence[Task[R]]) -> Iterator[R]:
        """The tasks' results, as they come."""
        if self._pool is None:
            for task in tasks:
                yield task.run(self._setup)
            return
        for future in as_completed([self._pool.submit(_run, self._setup, task) for task in tasks]):
            yield future.result()


def _run(setup: Setup, task: Task[R]) -> R:
    return task.run(setup)
