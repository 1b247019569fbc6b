"""The page says what was measured, and nothing of where."""

from __future__ import annotations

import json
import platform
from pathlib import Path

from benchmarks.chart import draw_chart
from benchmarks.configurations import BEST_FIRST, HF, LOOKUP, PLAIN, Configuration
from benchmarks.gateway import GatewayLoad
from benchmarks.load import LoadSample
from benchmarks.machine import describe_machine
from benchmarks.markdown import shown_command
from benchmarks.peers.configurations import LLAMA_EXACT
from benchmarks.raw import raw_numbers
from benchmarks.report import Conditions, serving_page
from benchmarks.rounds import Measurements
from benchmarks.samples import Answer, LatencyPair, PeerSteps, Sample, StepTimes, Trial
from benchmarks.target import Target

LLAMA = Configuration("llama.cpp", "llama.cpp, bf16", "llama.cpp", drafts=False, dtype="bfloat16")
SPEEDS: tuple[tuple[Configuration, int, float], ...] = (
    (PLAIN, 12, 4.0),
    (BEST_FIRST, 4, 2.0),
    (LOOKUP, 4, 2.0),
    (HF, 12, 8.0),
    (LLAMA, 12, 3.0),
)
CONDITIONS = Conditions(
    "make bench", "2030-01-01", "cpu", {"CPU": "a fast one"}, 1, 2, 12, {"vLLM": "not installed; `make bench-peers`"}
)
GATEWAY = [GatewayLoad(500, 0, 10_000, 480.0, 0.75, 3.5)]


def target(inflated: str = "") -> Target:
    plain = Answer("text", 12, 12, 12, 0.01, 0.05)
    measured = Measurements(
        samples=[
            Sample(c.key, 0, 0, Answer("text", 12, steps, steps, 0.01, ms * 12 / 1000)) for c, steps, ms in SPEEDS
        ],
        latency=[LatencyPair(PLAIN.key, 0, 0, plain, plain)],
        steps=[
            StepTimes(name, "cpu", size, "bfloat16", "native", 128, {1: ms, 4: 1.05 * ms, 8: 2 * ms})
            for name, size, ms in (("large", 14_200_000, 2.5), ("small", 1_400_000, 0.5))
        ],
        peer_steps=[PeerSteps(LLAMA_EXACT.title, {1: 3.0}), PeerSteps(LLAMA.title, {1: 2.5, 8: 4.0})],
        trials=[Trial("llama.cpp, fp16", 3.25)],
        load=[
            LoadSample(LOOKUP.key, 8, 0, 200.0, [10.0, 20.0], [1.0, 3.0]),
            LoadSample(LLAMA.key, 8, 0, 250.0, [11.0], [2.0]),
        ],
    )
    return Target("large", inflated, tuple(c for c, _, _ in SPEEDS), measured)


def test_the_page_holds_every_table() -> None:
    page = serving_page([target()], GATEWAY, CONDITIONS, "chart.svg")
    row = "3.00 | 2.00 [2.00, 2.00] | 2.00 | 4.00 | 1.00 | 10.0 | 1 of 1 | 1 of 1 |"
    assert f"| {BEST_FIRST.title} | {row}" in page
    assert "need 33% of the LLM steps of plain decoding, and take 50% of its time and 25% of that of Hugging" in page
    assert "| nodes | 1 | 4 | 8 |\n| --- | ---: | ---: | ---: |\n| LLM large, ms | 2.50 | 2.62 | 5.00 |\n" in page
    assert "| llama.cpp, bf16, ms | 2.50 |  | 4.00 |\n| SSM small, ms | 0.50 |" in page
    assert "| 8 | llama.cpp, bf16 | 250 | 11.0 | 11.0 | 2.0 | 2.0 |" in page
    assert "| llama.cpp, fp16 | 3.25 |" in page
    assert f"| {PLAIN.title} | 0.000 [0.000, 0.000] | 0.00 [0.00, 0.00] | 1 |" in page
    assert "| 500 | 480 | 0.75 | 3.50 | 0 | 10000 |" in page
    assert "LLM large: 14.2M parameters, stored as bfloat16, native kernels on cpu" in page
    assert "vLLM took no part: not installed; `make bench-peers`." in page
    assert "- CPU: a fast one\n" in page


def test_the_page_says_which_aims_are_missed_and_by_how_much() -> None:
    page = serving_page([target()], [], CONDITIONS, "chart.svg")
    assert "| time of a plain step, of llama.cpp, bf16's | at most 1.15 | 1.00 | met |" in page
    assert f"{LLAMA_EXACT.title}'s |" not in page  # another precision than ours
    assert "| time of a step of 8 nodes, of one of 1 | at most 1.6 | 2.00 | missed by a factor of 1.25 |" in page
    assert "as llama.cpp, plain, one stream | at least 2 | 1.50 | missed by a factor of 1.33 |" in page
    assert "as Hugging Face, one stream | at least 3 | 4.00 | met |" in page
    assert "| throughput, of the best peer's, 8 streams | at least 1 | 0.80 | missed by a factor of 1.25 |" in page


def test_an_inflated_target_is_called_so() -> None:
    page = serving_page([target(), target("Inflated: not what it seems.")], [], CONDITIONS, "chart.svg")
    assert "## Target: large\n" in page
    assert "## Inflated target: large\n" in page
    assert "**Inflated: not what it seems.**" in page


def test_raw_numbers_name_their_target_and_repeat_no_text() -> None:
    raw = json.loads(raw_numbers(CONDITIONS, [target()], GATEWAY))
    assert {record["target"] for name in ("rows", "samples", "load", "steps") for record in raw[name]} == {"large"}
    assert raw["texts"] == [{"target": "large", "prompt": 0, "text": "text"}]
    assert all(sample["answer"]["text"] is None for sample in raw["samples"])
    assert raw["gateway"][0]["streams"] == 500
    assert raw["conditions"][0]["absent"].keys() == {"vLLM"}


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
        draw_chart({"one": target().rows, "two": target().rows}, tmp_path / name)
    picture = (tmp_path / "a.svg").read_bytes()
    assert picture == (tmp_path / "b.svg").read_bytes()
    assert b">two: ms per token (median, quartiles)</text>" in picture
    assert len(picture) < 60_000
