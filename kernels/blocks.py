"""The contracts of the two halves of a decoder layer: what they are given and what they return.

A layer is two calls, attention and feed-forward, so that tensor parallelism can sum each half's output over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless `tensor` is contiguous, of `dtype` and of `shape` (None matches any size)."""
    if not _has_shape(tensor, shape):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [{expected}]")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; call .contiguous() on it")


def _has_shape(tensor: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
    have = tensor.shape
    if len(have) != len(shape):
        return False
    for size, wanted in zip(have, shape, strict=True):  # noqa: SIM110  # a generator costs microseconds in every call of a kernel
        if wanted is not None and size != wanted:
            return False
    return True


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Weights of norm, attention and output projection of one layer, or one rank's share of its heads.

    norm: [hidden], the RMS norm before attention.
    qkv: [(heads + 2 * kv_heads) * head_dim, hidden]; rows of all query heads, then all key heads, then all value heads.
    output: [hidden, heads * head_dim].
    norm_eps: added to the mean square in every RMS norm.
    qkv_bias, output_bias: [rows of qkv], [hidden].
    query_norm, key_norm: [head_dim], RMS norm of each query and key head before the rotation (Qwen3); both or neither.
    scale: factor of the scores; None is head_dim ** -0.5.

    Raises:
        ValueError: shapes that do not fit together, heads not a multiple of kv_heads, an odd head_dim.
    """

    norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    qkv_bias: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads and {self.kv_heads} kv_heads; heads must be a multiple of kv_heads")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; the rotation needs an even number")
        if (self.query_norm is None) != (self.key_norm is None):
            raise ValueError("query_norm and key_norm come together; one of them is None")
        (hidden,) = self.norm.shape
        qkv_rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        check_tensor("norm", self.norm, (hidden,))
        check_tensor("qkv", self.qkv, (qkv_rows, hidden))
        check_tensor("output", self.output, (hidden, self.heads * self.head_dim))
        optional = {
            "qkv_bias": (self.qkv_bias, qkv_rows),
            "output_bias": (self.output_bias, hidden),
            "query_norm": (self.query_norm, self.head_dim),
            "key_norm": (self.key_norm, self.head_dim),
        }
        for name, (tensor, size) in optional.items():
            if tensor is not None:
                check_tensor(name, tensor, (size,))

    @property
    def hidden(self) -> int:
        return self.norm.shape[0]

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True, eq=False)
class MlpWeights:
    """Weights of norm and gated feed-forward of one layer, or one rank's share of its intermediate units.

    norm: [hidden], the RMS norm before it.
    gate_up: [2 * intermediate, hidden]; all rows of the gate, then all rows of the up projection.
    down: [hidden, intermediate].
    """

    norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    norm_eps: float

    def __post_init__(self) -> None:
        (hidden,) = self.norm.shape
        check_tensor("norm", self.norm, (hidden,))
        check_tensor("down", self.down, (hidden, None))
        check_tensor("gate_up", self.gate_up, (2 * self.down.shape[1], hidden))

    @property
    def hidden(self) -> int:
        return self.norm.shape[0]


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """The rows of one step, of all sequences, as attention sees them; every layer shares it.

    Logical entry e of a sequence lives in slot block_table[e // block_size] * block_size + e % block_size. Row i sees
    entries e < prefix_lengths[i] of its sequence and entry prefix_lengths[i] + j for every set bit j of its mask.

    block_tables: int32 [sequences, max_blocks]; blocks that no row sees may hold anything.
    row_sequences: int32 [rows], the row of block_tables of each query row. A sequence's rows are consecutive.
    prefix_lengths: int32 [rows].
    masks: int64 [rows, words]; bit j % 64 of word j // 64, a uint64's bits.
    slots: int64 [rows], where each row's own key and value are written before any row attends.
    cos, sin: float32 [rows, head_dim // 2], the rotation of each row's position.
    """

    block_tables: torch.Tensor
    block_size: int
    row_sequences: torch.Tensor
    prefix_lengths: torch.Tensor
    masks: torch.Tensor
    slots: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __post_init__(self) -> None:
        check_visibility(self.block_tables, self.block_size, self.row_sequences, self.prefix_lengths, self.masks)
        check_tensor("slots", self.slots, (self.rows,), torch.int64)
        check_tensor("cos", self.cos, (self.rows, None), torch.float32)
        check_tensor("sin", self.sin, tuple(self.cos.shape), torch.float32)

    @property
    def rows(self) -> int:
        return self.row_sequences.shape[0]


def check_visibility(
    block_tables: torch.Tensor,
    block_size: int,
    row_sequences: torch.Tensor,
    prefix_lengths: torch.Tensor,
    masks: torch.Tensor,
) -> None:
    """Raise ValueError unless the five arguments that say what each row sees have their shapes and types."""
    rows = row_sequences.shape[0]
    check_tensor("block_tables", block_tables, (None, None), torch.int32)
    check_tensor("row_sequences", row_sequences, (rows,), torch.int32)
    check_tensor("prefix_lengths", prefix_lengths, (rows,), torch.int32)
    check_tensor("masks", masks, (rows, None), torch.int64)
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")


class Head(Protocol):
    """normed [rows, hidden] -> next-token logits, float32 [rows, vocab], not rounded to the weights' type."""

    def __call__(self, normed: torch.Tensor, /) -> torch.Tensor: ...


class AttentionBlock(Protocol):
    """hidden [rows, hidden] -> output projection of attention, [rows, hidden]; plus `hidden` when `residual`.

    With `residual` the sum may be made in `hidden` itself.

    kv: [2, slots, kv_heads, head_dim], the layer's keys and values; the rows' own are written to batch.slots.
    """

    def __call__(
        self, hidden: torch.Tensor, kv: torch.Tensor, batch: AttentionBatch, *, residual: bool = False
    ) -> torch.Tensor: ...


class MlpBlock(Protocol):
    """hidden [rows, hidden] -> gated feed-forward of its RMS norm, [rows, hidden]; plus `hidden` when `residual`.

    With `residual` the sum may be made in `hidden` itself.
    """

    def __call__(self, hidden: torch.Tensor, *, residual: bool = False) -> torch.Tensor: ...


class Linear(Protocol):
    """x [rows, in] -> x weightᵀ + bias, [rows, out], in the type of the activations."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...

    def unrounded(self, x: torch.Tensor, /) -> torch.Tensor:
        """The result in float32, as it was summed."""

    def add_to(self, target: torch.Tensor, x: torch.Tensor, /) -> torch.Tensor:
        """target += the result, in place: the residual costs no launch of its own."""


class MakeLinear(Protocol):
    """weight [out, in], bias [out] or None, type of the activations -> the layer."""

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, /) -> Linear: ...


class GatedLinear(Protocol):
    """x [rows, in] -> silu(x gateᵀ) * (x upᵀ), [rows, inner]; both products are rounded to the type of x before."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...


class MakeGatedLinear(Protocol):
    """gate_up [2 * inner, in], all rows of the gate first; type of the activations -> the layer."""

    def __call__(self, gate_up: torch.Tensor, dtype: torch.dtype, /) -> GatedLinear: ...


class RmsNorm(Protocol):
    """hidden [rows, size], weight [size] -> hidden / sqrt(mean(hidden²) + eps) * weight (Zhang and Sennrich, 2019).

    Computed in float32; the weight multiplies the normalised value after its rounding to hidden's type.
    """

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """RMS norms of every query and key head before the rotation (Qwen3): [head_dim] each."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


class RotatedWrite(Protocol):
    """qkv [rows, (heads + 2 * kv_heads) * head_dim] -> normed and rotated queries, [rows, heads, head_dim].

    The normed and rotated keys and the values go to slots [rows] of kv [2, slots, kv_heads, head_dim], rounded to its
    type. cos, sin: float32 [rows, head_dim / 2].
    """

    def __call__(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor,
        slots: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        norms: HeadNorms | None,
    ) -> torch.Tensor: ...


class TreeAttention(Protocol):
    """Attention of rows over what each sees of its sequence's cache (SpecInfer, section 4.2); see AttentionBatch.

    query: [rows, heads, head_dim]; keys, values: [slots, kv_heads, head_dim]; result: like query. A row that sees
    nothing gets zeros. Slots that no row sees may hold anything, NaN included.
    """

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        block_tables: torch.Tensor,
        block_size: int,
        row_sequences: torch.Tensor,
        prefix_lengths: torch.Tensor,
        masks: torch.Tensor,
        scale: float,
    ) -> torch.Tensor: ...


class KvCompaction(Protocol):
    """cache[:, :, targets[m]] = cache[:, :, sources[m]] for every m, as if all sources were read first; in place.

    cache: [layers, 2, slots, kv_heads, head_dim]; sources, targets: slots of it; targets are distinct.
    """

    def __call__(self, cache: torch.Tensor, sources: Sequence[int], targets: Sequence[int]) -> None: ...
