"""Times of the CPU kernels beside PyTorch's own operations, by the number of rows (tree nodes) in a step.

    python -m benchmarks.kernels

Writes benchmarks/results/kernels-cpu.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.machine import describe_machine
from benchmarks.markdown import markdown_table, shown_command
from kernels.backend import Backend, choose_backend
from kernels.blocks import AttentionBatch, AttentionBlock, AttentionWeights, MlpBlock, MlpWeights
from kernels.native import set_num_threads
from kernels.packed_linear.native import NativeLinear

ROWS = (1, 2, 4, 8, 16, 32, 64)
# outputs, inputs: a matrix far larger than the caches, and one of a small model
MATRICES = ((32768, 1024), (2048, 512))
CONTEXTS = (128, 1024)
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 768, 12, 12, 64, 2048
BLOCK_SIZE = 16
_REST_S = 0.01
NAMES = {"native": "ours", "torch": "PyTorch"}

Timed = Callable[[], object]


def best_ms(functions: Mapping[str, Timed], repeats: int) -> dict[str, float]:
    """The shortest of `repeats` runs of each, in milliseconds; they take turns. Each rests until the threads of the one
    before have ceased to spin, and runs once to wake its own.
    """
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            time.sleep(_REST_S)
            function()
            started = time.perf_counter()
            function()
            best[name] = min(best[name], 1000 * (time.perf_counter() - started))
    return best


def tree_batch(rows: int, context: int) -> AttentionBatch:
    """A binary tree behind a context of one sequence."""
    masks = [1]
    for node in range(1, rows):
        masks.append(masks[(node - 1) // 2] | 1 << node)
    blocks = -(-(context + rows) // BLOCK_SIZE)
    return AttentionBatch(
        block_tables=torch.arange(blocks, dtype=torch.int32)[None],
        block_size=BLOCK_SIZE,
        row_sequences=torch.zeros(rows, dtype=torch.int32),
        prefix_lengths=torch.full((rows,), context, dtype=torch.int32),
        masks=torch.tensor([[mask - 2**64 if mask >= 2**63 else mask] for mask in masks]),
        slots=torch.arange(context, context + rows),
        cos=torch.ones(rows, HEAD_DIM // 2),
        sin=torch.zeros(rows, HEAD_DIM // 2),
    )


def linear_cases(backends: Sequence[Backend], outputs: int, inputs: int, rows: int) -> dict[str, Timed]:
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
    cases: dict[str, Timed] = {
        f"{NAMES[backend.name]}, float32": partial(backend.pack_head(weight), x) for backend in backends
    }
    cases["ours, bfloat16 in memory"] = partial(backends[0].pack_head(weight.bfloat16()), x)
    cases["ours, float16 in memory"] = partial(backends[0].pack_head(weight.half()), x)
    cases["ours, int8 in memory"] = partial(NativeLinear(weight, int8=True), x)
    return cases


def attention_cases(backends: Sequence[Backend], context: int, rows: int) -> dict[str, Timed]:
    batch = tree_batch(rows, context)
    query = torch.randn(rows, HEADS, HEAD_DIM)
    kv = torch.randn(2, _slots(context, rows), KV_HEADS, HEAD_DIM)

    def attend(backend: Backend, cache: torch.Tensor) -> torch.Tensor:
        return backend.tree_attention(
            query,
            cache[0],
            cache[1],
            batch.block_tables,
            batch.block_size,
            batch.row_sequences,
            batch.prefix_lengths,
            batch.masks,
            HEAD_DIM**-0.5,
        )

    cases: dict[str, Timed] = {f"{NAMES[backend.name]}, float32": partial(attend, backend, kv) for backend in backends}
    cases["ours, bfloat16 in memory"] = partial(attend, backends[0], kv.bfloat16())
    return cases


def _slots(context: int, rows: int) -> int:
    """Of whole blocks: no kernel may read beyond one."""
    return -(-(context + rows) // BLOCK_SIZE) * BLOCK_SIZE


def layer_cases(backends: Sequence[Backend], context: int, rows: int) -> dict[str, Timed]:
    attention = AttentionWeights(
        norm=torch.ones(HIDDEN),
        qkv=torch.randn((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN) / HIDDEN**0.5,
        output=torch.randn(HIDDEN, HEADS * HEAD_DIM) / HIDDEN**0.5,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        norm_eps=1e-5,
    )
    mlp = MlpWeights(
        norm=torch.ones(HIDDEN),
        gate_up=torch.randn(2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5,
        down=torch.randn(HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5,
        norm_eps=1e-5,
    )
    batch, hidden = tree_batch(rows, context), torch.randn(rows, HIDDEN)
    kv = torch.randn(2, _slots(context, rows), KV_HEADS, HEAD_DIM)

    def run(attention: AttentionBlock, mlp: MlpBlock, cache: torch.Tensor) -> torch.Tensor:
        return mlp(attention(hidden, cache, batch, residual=True), residual=True)

    cases: dict[str, Timed] = {
        f"{NAMES[backend.name]}, float32": partial(run, backend.pack_attention(attention), backend.pack_mlp(mlp), kv)
        for backend in backends
    }
    narrow_attention = replace(attention, qkv=attention.qkv.bfloat16(), output=attention.output.bfloat16())
    narrow_mlp = replace(mlp, gate_up=mlp.gate_up.bfloat16(), down=mlp.down.bfloat16())
    narrow = backends[0].pack_attention(narrow_attention), backends[0].pack_mlp(narrow_mlp)
    cases["ours, bfloat16 in memory"] = partial(run, *narrow, kv.bfloat16())
    return cases


def table(cases: Callable[[int], dict[str, Timed]], repeats: int) -> str:
    """A line for each implementation, a column for each number of rows."""
    columns = [best_ms(cases(rows), repeats) for rows in ROWS]
    lines = [[name, *(f"{column[name]:.3g}" for column in columns)] for name in columns[0]]
    return markdown_table(["milliseconds by rows", *map(str, ROWS)], lines)


def page(repeats: int, threads: int, command: str) -> str:
    cpu = torch.device("cpu")
    backends = [choose_backend(cpu, "native"), choose_backend(cpu, "torch")]
    shape = f"{HEADS} query and {KV_HEADS} key heads of {HEAD_DIM}"
    sections = [
        "# Kernels on the CPU",
        f"Made on {date.today().isoformat()} by `{command}`. Each figure is the shortest of {repeats} runs, in "
        "milliseconds; the implementations take turns. A row is a node of a tree, or a token of plain decoding. "
        "A row of ours has the same bits whatever the other rows are; a row of PyTorch's has not.",
    ]
    for outputs, inputs in MATRICES:
        title = f"## Linear layer, {outputs} x {inputs} ({4 * outputs * inputs / 2**20:.0f} MiB in float32)"
        sections += [title, table(partial(linear_cases, backends, outputs, inputs), repeats)]
    for context in CONTEXTS:
        title = f"## Tree attention, {shape}, behind {context} tokens"
        sections += [title, table(partial(attention_cases, backends, context), repeats)]
    title = f"## Decoder layer, {HIDDEN} wide, {INTERMEDIATE} between, {shape}, behind {CONTEXTS[0]} tokens"
    sections += [title, table(partial(layer_cases, backends, CONTEXTS[0]), repeats), "## Machine"]
    facts = describe_machine(threads)
    sections.append("\n".join(f"- {name}: {fact}" for name, fact in facts.items()))
    return "\n\n".join(sections) + "\n"


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each figure; the shortest counts.")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = torch.get_num_threads(),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("benchmarks/results/kernels-cpu.md"),
) -> None:
    """Measures the kernels and writes the page."""
    torch.set_num_threads(threads)
    set_num_threads(threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        text = page(repeats, threads, shown_command("benchmarks.kernels", sys.argv[1:]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
