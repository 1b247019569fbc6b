"""llama.cpp's step time by rows, from its own benchmark of batched decoding."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.workers import WorkerFailed

STEPS = 16


async def llama_step_times(
    folder: Path, model: Path, rows: Sequence[int], context: int, threads: int, flags: Sequence[str]
) -> Mapping[int, float]:
    """Mean milliseconds of a step that decodes one token of each of n sequences, with all logits, for each n of rows.

    Each sequence has a context of its own, where the nodes of a tree share one; at these lengths the weights dominate.

    Raises:
        WorkerFailed: the program ended with an error.
    """
    command = [
        *(str(folder / "bin" / "llama-batched-bench"), "--model", str(model), "--output-format", "jsonl"),
        *("--threads", str(threads), "--threads-batch", str(threads)),
        *("-npp", str(context), "-ntg", str(STEPS), "-npl", ",".join(map(str, rows))),
        *("--ctx-size", str(max(rows) * (context + STEPS)), *flags),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    if process.returncode != 0:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise WorkerFailed(f"llama-batched-bench ended with exit code {process.returncode}: {''.join(last)}")
    records = [json.loads(line) for line in output.decode().splitlines() if line.startswith("{")]
    return {record["pl"]: 1000 * record["t_tg"] / STEPS for record in records}
