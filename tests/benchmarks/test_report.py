"""The page says what was measured, and nothing of where."""

from __future__ import annotations

import platform
from pathlib import Path

from benchmarks.chart import draw_chart
from benchmarks.configurations import BEST_FIRST, HF, PLAIN
from benchmarks.machine import describe_machine
from benchmarks.report import Conditions, serving_page, shown_command
from benchmarks.samples import Answer, LatencyPair, Sample, StepTimes
from benchmarks.summary import Row, summarize, summarize_latency


def rows() -> list[Row]:
    samples = [
        Sample(c.key, 0, 0, Answer("text", 12, steps, steps, 0.01, ms * 12 / 1000))
        for c, steps, ms in ((PLAIN, 12, 4.0), (BEST_FIRST, 4, 2.0), (HF, 12, 8.0))
    ]
    return summarize([PLAIN, BEST_FIRST, HF], samples)


def test_the_page_holds_the_three_tables() -> None:
    plain = Answer("text", 12, 12, 12, 0.01, 0.05)
    latency = summarize_latency([PLAIN], [LatencyPair(PLAIN.key, 0, 0, plain, plain)])
    steps = [
        StepTimes(name, "cpu", size, "bfloat16", "native", 128, {1: ms, 8: 2 * ms})
        for name, size, ms in (("large", 14_200_000, 2.5), ("small", 1_400_000, 0.5))
    ]
    conditions = Conditions("make bench", "2030-01-01", "cpu", {"CPU": "a fast one"}, 1, 2, 12)
    page = serving_page(rows(), latency, steps, conditions, "chart.svg")
    assert f"| {BEST_FIRST.title} | 3.00 | 2.00 [2.00, 2.00] | 2.00 | 4.00 | 10.0 | 1 of 1 | 1 of 1 |" in page
    assert "need 33% of the LLM steps of plain decoding, and take 50% of its time and 25% of that of Hugging" in page
    assert "| nodes | 1 | 8 |\n| --- | ---: | ---: |\n| LLM large, ms | 2.50 | 5.00 |\n| SSM small, ms | 0.50 |" in page
    assert f"| {PLAIN.title} | 0.000 [0.000, 0.000] | 0.00 [0.00, 0.00] | 1 |" in page
    assert "LLM large: 14.2M parameters, stored as bfloat16, native kernels on cpu" in page
    assert "- CPU: a fast one\n" in page


def test_the_command_shows_no_folders_of_the_machine() -> None:
    arguments = ["--llm", "/home/someone/llm", "--ssm=/home/someone/ssm", "--rounds", "2", "--out", "a/b.md"]
    shown = shown_command("benchmarks.serving", arguments)
    assert shown == "python -m benchmarks.serving --llm llm --ssm=ssm --rounds 2 --out a/b.md"


def test_the_machine_is_described_without_its_name() -> None:
    facts = describe_machine(threads=3)
    assert platform.node() not in "\n".join(facts.values())
    assert "torch " in facts["versions"]
    assert facts["threads"].startswith("3 ")


def test_the_same_rows_draw_the_same_small_picture(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw_chart(rows(), tmp_path / name)
    picture = (tmp_path / "a.svg").read_bytes()
    assert picture == (tmp_path / "b.svg").read_bytes()
    assert b">tokens per LLM step</text>" in picture
    assert len(picture) < 60_000
