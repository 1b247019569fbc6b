"""Runs a benchmark module in a process of its own and reads the JSON lines that it writes."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

from benchmarks.samples import Answer, StepTimes
from services.common.settings import to_flags

LINE_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
LINE_BYTES = 2**22


class WorkerFailed(RuntimeError):
    """A process ended before its work; the message holds its last words."""


async def hugging_face_answers(prompts: list[str], options: Mapping[str, object]) -> AsyncIterator[Answer]:
    """Answers of benchmarks.huggingface, in the order of the prompts, as they come."""
    count = 0
    async for line in _json_lines("benchmarks.huggingface", options, json.dumps(prompts)):
        count += 1
        yield Answer(**line)
    if count != len(prompts):
        raise WorkerFailed(f"benchmarks.huggingface gave {count} answers to {len(prompts)} prompts")


async def step_times(options: Mapping[str, object]) -> StepTimes:
    """The result of benchmarks.step_time."""
    lines = [line async for line in _json_lines("benchmarks.step_time", options)]
    (fields,) = lines
    medians = {int(count): ms for count, ms in fields.pop("median_ms").items()}
    return StepTimes(**fields, median_ms=medians)


async def _json_lines(
    module: str, options: Mapping[str, object], standard_input: str = ""
) -> AsyncIterator[dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *to_flags(options)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=LINE_BYTES,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    tail: collections.deque[str] = collections.deque(maxlen=10)
    errors = asyncio.create_task(_collect(process.stderr, tail))
    try:
        process.stdin.write(standard_input.encode())
        process.stdin.close()
        while line := await asyncio.wait_for(process.stdout.readline(), LINE_TIMEOUT_S):
            yield json.loads(line)
        code = await process.wait()
        await errors
        if code != 0:
            raise WorkerFailed(f"{module} ended with exit code {code}: " + " | ".join(tail))
    finally:
        if process.returncode is None:
            process.terminate()
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        errors.cancel()


async def _collect(stream: asyncio.StreamReader, tail: collections.deque[str]) -> None:
    while chunk := await stream.read(2**16):
        tail.extend(chunk.decode(errors="replace").splitlines())
