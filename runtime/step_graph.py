"""Decoding steps of fixed shapes: padded to a bucket, computed from static buffers, and so captured in CUDA graphs.

A step's input goes to the device in one copy; nothing is read back here. Captured or called, the computation is the
same; the choice is the caller's (`cuda_capture`, `plain_call`). Knows nothing of trees, sampling or requests.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.backend import Backend
from runtime.batch import FlatBatch, HostBatch, Segment
from runtime.config import ModelConfig
from runtime.kv_cache import SCRATCH_ENTRIES, KVCache, longest_sequence_blocks

MAX_ROWS = 256
MIN_BLOCKS = 64
MASK_WORDS = (1, -(-SCRATCH_ENTRIES // 64))

Compute = Callable[[], None]
Capture = Callable[[Compute], Compute]
"""Given a computation on static buffers, what repeats it."""


class StepComputer(Protocol):
    """A model as a step sees it; see Transformer."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def device(self) -> torch.device: ...

    def forward(self, batch: FlatBatch, cache: KVCache) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step's buffers: rows, sequences and columns of the block tables, words of a row's mask."""

    rows: int
    sequences: int
    blocks: int
    words: int


def bucket(rows: int, sequences: int, blocks: int, words: int, most_blocks: int) -> StepShape:
    """The smallest bucket that holds a step: rows by powers of two, sequences and blocks by powers of four.

    Rows are worth a close fit, the others are bounds of grids and tables. most_blocks: of the longest sequence.
    """
    padded_rows = 1 << (rows - 1).bit_length()
    return StepShape(
        padded_rows,
        min(power_of_four(sequences, 1), padded_rows),
        min(power_of_four(blocks, MIN_BLOCKS), most_blocks),
        next(size for size in MASK_WORDS if words <= size),
    )


def power_of_four(count: int, smallest: int) -> int:
    """The smallest `smallest` times a power of four that is not below `count`."""
    size = smallest
    while size < count:
        size *= 4
    return size


def usual_shapes(sequences: int, most_blocks: int) -> list[StepShape]:
    """Of all steps of up to `sequences` sequences, of prompts or of trees of up to 64 nodes, behind contexts of the
    smallest bucket. The largest first. most_blocks: of the longest sequence.
    """
    shapes = {
        bucket(rows, count, 1, 1, most_blocks)
        for count in range(1, min(sequences, MAX_ROWS) + 1)
        for rows in range(count, MAX_ROWS + 1)
    }
    return sorted(shapes, key=lambda shape: (shape.rows, shape.sequences), reverse=True)


class StaticBatch:
    """A batch whose tensors stay where they are, padded to a shape. `batch` and `wanted` are views of one buffer.

    Padding rows belong to the last sequence, see nothing and write to the scratch slot. wanted: int64 [rows], the rows
    whose logits are asked for, padded with row 0.
    """

    def __init__(self, shape: StepShape, device: torch.device, scratch_slot: int) -> None:
        self.shape = shape
        self._scratch_slot = scratch_slot
        small = 2 * shape.rows + shape.sequences * shape.blocks
        size = shape.rows * (4 + shape.words) + (small + 1) // 2
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        host_batch, host_wanted = _views(self._host, shape)
        self._host_batch = {name: tensor.numpy() for name, tensor in vars(host_batch).items()}
        self._host_wanted = host_wanted.numpy()
        self.batch, self.wanted = _views(self._device, shape)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, segments: Sequence[Segment], wanted: Sequence[int]) -> None:
        """Lay the segments out and copy them to the device, in the order of its stream."""
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still be reading the host's buffer
        host, rows = self._host_batch, 0
        host["row_sequences"].fill(0)
        if segments:
            wide, narrow, masks, tables = HostBatch.of(segments)
            (rows, words), (sequences, blocks) = masks.shape, tables.shape
            for name, row in zip(("token_ids", "positions", "slots"), wide, strict=True):
                host[name][:rows] = row
            for name, row in zip(("row_sequences", "prefix_lengths"), narrow, strict=True):
                host[name][:rows] = row
            host["masks"][:rows, :words] = masks
            host["masks"][:rows, words:] = 0
            host["block_tables"][:sequences, :blocks] = tables
            host["row_sequences"][rows:] = sequences - 1
        for name in ("token_ids", "positions", "prefix_lengths", "masks"):
            host[name][rows:] = 0
        host["slots"][rows:] = self._scratch_slot
        self._host_wanted[: len(wanted)] = wanted
        self._host_wanted[len(wanted) :] = 0
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _views(buffer: torch.Tensor, shape: StepShape) -> tuple[FlatBatch, torch.Tensor]:
    """The tensors of a batch and the wanted rows, in an int64 buffer; the int32 ones stand at its end."""
    rows, words = shape.rows, shape.words
    token_ids, positions, slots, wanted = buffer[: 4 * rows].view(4, rows).unbind()
    masks = buffer[4 * rows : (4 + words) * rows].view(rows, words)
    small = buffer[(4 + words) * rows :].view(torch.int32)
    row_sequences, prefix_lengths = small[: 2 * rows].view(2, rows).unbind()
    tables = small[2 * rows : 2 * rows + shape.sequences * shape.blocks].view(shape.sequences, shape.blocks)
    return FlatBatch(token_ids, positions, slots, row_sequences, prefix_lengths, masks, tables), wanted


class StepGraphs:
    """The steps of one model on one cache. A shape is captured when it first occurs. One thread owns it."""

    def __init__(self, model: StepComputer, cache: KVCache, capture: Capture) -> None:
        self.cache = cache
        self._model = model
        self._capture = capture
        self._most_blocks = longest_sequence_blocks(model.config)
        self._steps: dict[StepShape, tuple[StaticBatch, Compute]] = {}
        # All shapes share it: the results of a step are read before the next.
        self._logits = torch.empty(MAX_ROWS, model.config.vocab_size, dtype=torch.float32, device=model.device)

    @property
    def shapes(self) -> list[StepShape]:
        """What has been captured so far."""
        return list(self._steps)

    def shape_of(self, segments: Sequence[Segment]) -> StepShape | None:
        """The bucket of a step; None where it has too many rows to be worth padding, or blocks beyond the context."""
        rows = sum(len(segment.token_ids) for segment in segments)
        blocks = max((len(segment.cache.blocks) for segment in segments), default=0)
        words = -(-max((mask.bit_length() for s in segments for mask in s.masks), default=0) // 64)
        if not 0 < rows <= MAX_ROWS or blocks > self._most_blocks or words > MASK_WORDS[-1]:
            return None
        return bucket(rows, len(segments), blocks, words, self._most_blocks)

    @torch.inference_mode()
    def prepare(self, sequences: int) -> int:
        """Capture all `usual_shapes` of up to so many sequences; how many these are."""
        shapes = usual_shapes(sequences, self._most_blocks)
        for shape in shapes:
            self._step_of(shape)
        return len(shapes)

    @torch.inference_mode()
    def step(self, shape: StepShape, segments: Sequence[Segment], wanted: Sequence[int]) -> torch.Tensor:
        """Compute the rows of the segments; logits of the wanted ones, float32 [len(wanted), vocab].

        The result is overwritten by the next step.
        """
        static, compute = self._step_of(shape)
        static.fill(segments, wanted)
        compute()
        return self._logits[: len(wanted)]

    def _step_of(self, shape: StepShape) -> tuple[StaticBatch, Compute]:
        if shape not in self._steps:
            self._steps[shape] = self._captured(shape)
        return self._steps[shape]

    def _captured(self, shape: StepShape) -> tuple[StaticBatch, Compute]:
        static = StaticBatch(shape, self._model.device, self.cache.scratch_slot)
        static.fill([], [])  # a capture runs the computation too: it may write to the scratch slot alone

        def compute() -> None:
            hidden = self._model.forward(static.batch, self.cache)
            self._logits[: shape.rows].copy_(self._model.logits(hidden[static.wanted]))

        return static, self._capture(compute)


def plain_call(compute: Compute) -> Compute:
    """No capture: every step calls the computation."""
    return compute


def cuda_capture(device: torch.device) -> Capture:
    """Captures in CUDA graphs that share a memory pool."""
    pool = torch.cuda.graph_pool_handle()

    def capture(compute: Compute) -> Compute:
        # The first run compiles kernels and sets up libraries, which cannot be captured.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with without_collection(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            compute()
        return graph.replay

    return capture


@contextmanager
def without_collection() -> Iterator[None]:
    """Garbage stays meanwhile: a graph among it that is destroyed during a capture ends that with an error."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
