"""Time of one step of a model by the number of its tree nodes, without any service around it.

    python -m benchmarks.step_time --model models/default-llm

A step is what the verifier does on the device: the forward pass over the tree's nodes behind a context, the logits of
every node, and their argmax. Writes one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.samples import StepTimes
from runtime.batch import Segment
from runtime.kv_cache import CachedSequence, KVCache, longest_sequence_blocks
from runtime.transformer import LoadOptions, Transformer
from services.common.loaded_model import leave_cores_to_kernels, use_threads
from services.common.model_files import resolve_model
from speculation.tree import TokenTree

NODE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def measure(name: str, model: Transformer, context: int, counts: Sequence[int], repeats: int) -> StepTimes:
    """Median step times. The node counts take turns, so that a disturbance of the machine hits all of them alike."""
    cache = model.new_cache(0, 1, blocks=longest_sequence_blocks(model.config))
    sequence = CachedSequence()
    cache.reserve(sequence, context + max(counts))
    prompt = [token % model.config.vocab_size for token in range(context)]
    model.step([Segment.chain(sequence, prompt, 0)], [], cache)
    sequence.length = context
    times: dict[int, list[float]] = {count: [] for count in counts}
    for repeat in range(-1, repeats):  # the first turn warms up
        for count in counts:
            elapsed = _step_ms(model, cache, sequence, binary_tree(count))
            if repeat >= 0:
                times[count].append(elapsed)
    return StepTimes(
        model=name,
        device="cpu" if model.device.type == "cpu" else torch.cuda.get_device_name(model.device),
        parameters=model.config.parameters,
        dtype=str(model.weight_dtype).removeprefix("torch."),
        kernels=model.backend.name,
        context=context,
        median_ms={count: statistics.median(values) for count, values in times.items()},
    )


def binary_tree(nodes: int) -> TokenTree:
    """Node i has the children 2i + 1 and 2i + 2."""
    return TokenTree(tuple(range(nodes)), (-1, *((node - 1) // 2 for node in range(1, nodes))))


def _step_ms(model: Transformer, cache: KVCache, sequence: CachedSequence, tree: TokenTree) -> float:
    started = time.perf_counter()
    segment = Segment.tree(sequence, tree.token_ids, tree.depths(), tree.ancestor_masks(), start=sequence.length)
    logits = model.step([segment], range(len(tree)), cache)
    if model.argmax is None:
        (logits.numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()  # as in verification.py
    return 1000 * (time.perf_counter() - started)


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Folder or hub id.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens in front of the tree.")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16 or int8.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each node count.")] = 50,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores.")] = 0,
) -> None:
    """Measures the steps of one model."""
    use_threads(threads)
    loaded = Transformer.load(resolve_model(model), LoadOptions(device, dtype))
    leave_cores_to_kernels(loaded)
    print(json.dumps(dataclasses.asdict(measure(Path(model).name, loaded, context, NODE_COUNTS, repeats))))


if __name__ == "__main__":
    app()
