"""The acceptance tables on tiny models: known rates, and the shortcuts against the real engine."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.acceptance.__main__ import PROMPT_SETS, app, measure, write_results
from benchmarks.acceptance.bench import Bench, Setup, load
from benchmarks.acceptance.decoding import Drafting, decode
from benchmarks.acceptance.estimates import Comparison, Ratio
from benchmarks.acceptance.lines import MODES, WIDTHS, draft_lines, static_widths, tree_nodes
from benchmarks.acceptance.results import Conditions, Results
from benchmarks.acceptance.runners import KnownTexts, VisitedNodes
from benchmarks.acceptance.success import acceptance_of_draws, deal
from benchmarks.acceptance.tasks import WalkKey, Workers
from services.common.prompt_files import read_prompts
from services.verifier.runner import Runner
from speculation.acceptance import AcceptanceRule, accept
from speculation.merge import MergedDraft
from speculation.tree import TokenTree
from tests.tiny_models import write_model, write_relative

NEW_TOKENS = 20
PROMPTS = {"cats": ("the cat sat on", "a child was singing"), "dogs": ("the dog ran to the", "summer days of")}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """The boosted set has the LLM itself and a relative; the independent one two strangers."""
    folder = tmp_path_factory.mktemp("acceptance")
    # An end-of-text token outside of the vocabulary: every text has its full length.
    llm = write_model(folder / "llm", eos_token_id=[])
    relative = write_relative(folder / "relative", llm, noise=0.05)
    strangers = [write_model(folder / f"stranger-{seed}", seed=seed, eos_token_id=[]) for seed in (1, 2)]
    boosted, independent = (str(llm), str(relative)), tuple(map(str, strangers))
    return Setup(str(llm), boosted, independent, NEW_TOKENS, sequences=2, threads=1)


@pytest.fixture(scope="module")
def bench(setup: Setup) -> Bench:
    return load(setup)


@pytest.fixture(scope="module")
def prompts(bench: Bench) -> list[tuple[int, ...]]:
    return [tuple(bench.tokenizer.encode(text)) for texts in PROMPTS.values() for text in texts]


@pytest.fixture(scope="module")
def results(setup: Setup) -> Results:
    with Workers(setup, 1) as workers:
        return measure(workers, setup, PROMPTS, Console(quiet=True))[0]


@pytest.mark.parametrize("rule", [AcceptanceRule.GREEDY, AcceptanceRule.SHARED_NOISE, AcceptanceRule.NAIVE])
@pytest.mark.parametrize("widths", [(), static_widths(2)])
def test_a_walk_along_known_text_takes_the_engines_steps(
    bench: Bench, prompts: list[tuple[int, ...]], rule: AcceptanceRule, widths: tuple[int, ...]
) -> None:
    model, cache = bench.llm.model, bench.llm.cache
    run = partial(decode, bench, prompts=prompts, new_tokens=NEW_TOKENS, seed=5)
    plain = run(Runner(model, cache), Drafting(rule))
    sources = ("boosted-2",) if widths else ("boosted-2", "independent-1")
    drafting = Drafting(rule, tree_nodes(2), widths, sources)
    real = run(Runner(model, cache), drafting)
    assert run(KnownTexts(model, cache, plain.outputs), drafting) == real
    assert real.outputs == plain.outputs
    assert sum(real.steps) < sum(plain.steps) == len(prompts) * NEW_TOKENS


def test_visiting_nodes_alone_takes_the_engines_steps(bench: Bench, prompts: list[tuple[int, ...]]) -> None:
    model, cache = bench.llm.model, bench.llm.cache
    run = partial(decode, bench, prompts=prompts, new_tokens=NEW_TOKENS, seed=5)
    drafting = Drafting(AcceptanceRule.MSS, tree_nodes(3), (), ("boosted-2", "independent-1"))
    assert run(VisitedNodes(model, cache, AcceptanceRule.MSS), drafting) == run(Runner(model, cache), drafting)


def test_the_llm_as_its_own_ssm_is_always_right(results: Results) -> None:
    itself, _, in_all, _ = results.rows[:4]
    assert (len(itself.sources), len(in_all.sources)) == (1, 2)
    # 20 tokens in steps of at most 9
    most = NEW_TOKENS / 3
    for name in PROMPTS:
        for rule in MODES:
            assert results.success[name, rule, itself][0].value == pytest.approx(1, abs=1e-5)
            for line in ("static", "best-first") if rule is not AcceptanceRule.MSS else ("static",):
                figure = results.tokens_per_step[WalkKey(name, rule, line, 1)]
                assert figure.value == pytest.approx(most if line == "static" else figure.value)
                assert 1 < figure.value <= most
        assert results.success[name, AcceptanceRule.GREEDY, in_all][4].value == 1


def test_strangers_are_hardly_ever_right(results: Results) -> None:
    strangers = [row for row in results.rows if row.of == "independent"]
    assert len(strangers) == 4
    for name in PROMPTS:
        for rule in MODES:
            assert results.tokens_per_step[WalkKey(name, rule, "independent", 1)].value < 1.6
            assert all(results.success[name, rule, row][0].value < 0.4 for row in strangers if not row.each)


def test_more_candidates_of_an_ssm_succeed_more_often(results: Results) -> None:
    for row in results.rows:
        for name, rule in product(PROMPTS, MODES):
            if len(row.sources) == 1:
                rates = [ratio.value for ratio in results.success[name, rule, row]]
                assert all(more >= fewer - 1e-6 for fewer, more in pairwise(rates))


def test_ratios_are_of_sums_with_paired_resamples() -> None:
    half, twice, none = Ratio.of([1, 2], [2, 4]), Ratio.of([2, 4], [1, 2]), Ratio.of([0, 0], [1, 1])
    assert (half.value, half.error) == (0.5, 0)
    assert twice.over(half) == Comparison(4, 4, 4)
    assert half.over(none) == Comparison(math.inf, math.inf, math.inf)
    assert none.over(none) == Comparison(1, 1, 1)
    uneven = Ratio.of([10, 1], [1, 1])
    assert uneven.over(uneven) == Comparison(1, 1, 1)
    assert uneven.error > 1


def test_the_page_its_numbers_and_its_picture(setup: Setup, bench: Bench, results: Results, tmp_path: Path) -> None:
    out = tmp_path / "results" / "page.md"
    conditions = Conditions("make it", "2030-01-01", {"CPU": "a fast one"}, bench.facts, NEW_TOKENS, 0, setup.beam)
    write_results(out, results, conditions)
    page = out.read_text()
    cells = len(PROMPTS) * len(MODES) * len(WIDTHS)
    assert f"as many nodes in all** (Table 2): holds everywhere. Of {cells} cells {cells} are above" in page
    assert "![Tokens per LLM step by width of the tree](page.svg)" in page
    assert str(tmp_path) not in page
    raw = json.loads(out.with_suffix(".json").read_text())
    lines = draft_lines(setup.sets)
    assert len(raw["tokens_per_step"]) == cells * len(lines) + 2 * len(PROMPTS)  # and naive sampling
    assert len(raw["success"]) == len(PROMPTS) * len(MODES) * len(results.rows)
    assert raw["prompts"][0]["greedy_tokens"] == [NEW_TOKENS] * 2
    assert b"the paper" in out.with_suffix(".svg").read_bytes()


def test_the_probability_of_acceptance_is_that_of_the_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    p, first, second = torch.rand(3, 6, generator=generator, dtype=torch.float64).softmax(-1)
    drawn = ([2, 4], [0])
    draws = [(q[None], torch.tensor([tokens])) for q, tokens in zip((first, second), drawn, strict=True)]
    chances = acceptance_of_draws(p[None], draws)[0]
    trees = tuple(
        TokenTree((9, *tokens), (-1, *[0] * len(tokens)), {0: q.float()})
        for q, tokens in zip((first, second), drawn, strict=True)
    )
    draft = MergedDraft(TokenTree((9, 2, 4, 0), (-1, 0, 0, 0)), trees, ((0, 1, 2), (0, 3)))
    log_p = p.log().float()
    runs = 1500
    chosen = [
        accept(AcceptanceRule.MSS, draft, lambda _node, _path: log_p, seed=seed, position=1).token_ids[0]
        for seed in range(runs)
    ]
    # What the draws leave over may be one of their tokens too; the first draw is chosen by nothing else.
    error = 3 / runs**0.5
    assert chosen.count(2) / runs == pytest.approx(chances[0].item(), abs=error)
    assert sum(token in (2, 4, 0) for token in chosen) / runs >= chances[-1].item() - error
    assert chances.tolist() == sorted(chances.tolist())


@pytest.mark.parametrize(("draws", "hands", "dealt"), [(1, 3, [1, 0, 0]), (5, 3, [2, 2, 1]), (3, 1, [3])])
def test_draws_are_dealt_in_turn(draws: int, hands: int, dealt: list[int]) -> None:
    assert deal(draws, hands) == dealt


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_have_as_many_nodes_as_said(width: int) -> None:
    level = nodes = 1
    for children in static_widths(width):
        level *= children
        nodes += level
    assert nodes - 1 == tree_nodes(width)


@pytest.mark.parametrize("path", PROMPT_SETS, ids=lambda path: path.stem)
def test_the_projects_held_out_prompts(path: Path) -> None:
    prompts = read_prompts(path)
    assert len(set(prompts)) == 40
    assert all(prompt == prompt.strip() for prompt in prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "chat"], "give NAME=FILE"),
        (["--prompts", "a=nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompts", "a={bad}"], "line 2"),
        (["--prompts", "a={good}", "--prompts", "a={good}"], "a set a already"),
        (["--prompts", "a={good}", "--llm", "./nowhere"], "model ./nowhere"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(tmp_path: Path, options: list[str], message: str) -> None:
    files = {"good": tmp_path / "good.jsonl", "bad": tmp_path / "bad.jsonl"}
    files["good"].write_text('{"prompt": "a"}\n')
    files["bad"].write_text('{"prompt": "a"}\n{"text": "b"}\n')
    done = CliRunner().invoke(app, [option.format(**files) for option in options])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_prompt_beyond_the_context_is_refused(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "the cat sat on the mat " * 60}))
    flags = ["--llm", setup.llm, "--ssm", setup.boosted[1], "--prompts", f"long={path}", "--processes", "1"]
    done = CliRunner().invoke(app, flags)
    assert done.exit_code == 2
    assert "long: the longest prompt and 128 new tokens are" in done.stderr


def test_help_teaches() -> None:
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0
    for flag in (
        "--llm",
        "--ssm",
        "--independent",
        "--prompts",
        "--prompts-per-set",
        "--new-tokens",
        "--seed",
        "--out",
    ):
        assert flag in done.stdout
