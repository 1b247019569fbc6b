# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""Head norms, rotation and the write into the cache on the GPU, in Triton: one launch, a program for some heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.blocks import HeadNorms, check_tensor
from kernels.dependent_launch import dependent_launch, wait_for_kernel_before

# Heads of a program, at most: one alone is less work than starting a program.
HEAD_TILE = 16
COMPILER_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # fused products would round unlike PyTorch's


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _rotated_write_kernel(
    qkv,  # [rows, HEADS + 2 * KV_HEADS, 2 * HALF]
    query,  # [rows, HEADS, 2 * HALF]
    keys,  # [slots, KV_HEADS, 2 * HALF]
    values,
    slots,
    cos,  # [rows, HALF]
    sin,
    query_norm,  # [2 * HALF]
    key_norm,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    NORMED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_kernel_before(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)
    dim = tl.arange(0, HALF_PADDED)
    there = (head < HEADS + 2 * KV_HEADS)[:, None] & (dim < HALF)[None, :]
    of_query = there & (head < HEADS)[:, None]
    of_value = there & (head >= HEADS + KV_HEADS)[:, None]
    of_key = there & (head >= HEADS)[:, None] & (head < HEADS + KV_HEADS)[:, None]
    place = qkv + (row * (HEADS + 2 * KV_HEADS) + head)[:, None] * (2 * HALF) + dim[None, :]
    first = tl.load(place, mask=there, other=0.0)
    second = tl.load(place + HALF, mask=there, other=0.0)
    kind = first.dtype
    x, y = first.to(tl.float32), second.to(tl.float32)
    if NORMED:
        norm = tl.where(of_query, query_norm + dim[None, :], key_norm + dim[None, :])
        turned = of_query | of_key
        low = tl.load(norm, mask=turned, other=0.0).to(kind).to(tl.float32)
        high = tl.load(norm + HALF, mask=turned, other=0.0).to(kind).to(tl.float32)
        inverse = tl.rsqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / (2 * HALF) + eps)[:, None]
        # rounded after the normalisation and after the weight, as in rms_norm
        x, y = (x * inverse).to(kind).to(tl.float32) * low, (y * inverse).to(kind).to(tl.float32) * high
        x, y = x.to(kind).to(tl.float32), y.to(kind).to(tl.float32)
    c = tl.load(cos + row * HALF + dim, mask=dim < HALF, other=0.0)[None, :]
    s = tl.load(sin + row * HALF + dim, mask=dim < HALF, other=0.0)[None, :]
    turned_x, turned_y = (x * c - y * s).to(kind), (y * c + x * s).to(kind)

    queries = query + (row * HEADS + head)[:, None] * (2 * HALF) + dim[None, :]
    tl.store(queries, turned_x, mask=of_query)
    tl.store(queries + HALF, turned_y, mask=of_query)
    slot = tl.load(slots + row)
    entry = keys + (slot * KV_HEADS + head - HEADS)[:, None] * (2 * HALF) + dim[None, :]
    tl.store(entry, turned_x.to(keys.dtype.element_ty), mask=of_key)
    tl.store(entry + HALF, turned_y.to(keys.dtype.element_ty), mask=of_key)
    entry = values + (slot * KV_HEADS + head - HEADS - KV_HEADS)[:, None] * (2 * HALF) + dim[None, :]
    tl.store(entry, first.to(values.dtype.element_ty), mask=of_value)
    tl.store(entry + HALF, second.to(values.dtype.element_ty), mask=of_value)


def rotated_write(
    qkv: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: HeadNorms | None,
) -> torch.Tensor:
    """See `kernels.blocks.RotatedWrite`."""
    check_tensor("kv", kv, (2, None, None, None))
    kv_heads, head_dim = kv.shape[2:]
    check_tensor("qkv", qkv, (None, None))
    rows, heads = qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads
    check_tensor("slots", slots, (rows,), torch.int64)
    check_tensor("cos", cos, (rows, head_dim // 2), torch.float32)
    check_tensor("sin", sin, (rows, head_dim // 2), torch.float32)
    query = qkv.new_empty(rows, heads, head_dim)
    if rows:
        all_heads = heads + 2 * kv_heads
        head_tile = min(HEAD_TILE, triton.next_power_of_2(all_heads))
        _rotated_write_kernel[(rows, triton.cdiv(all_heads, head_tile))](
            qkv,
            query,
            kv[0],
            kv[1],
            slots,
            cos,
            sin,
            cos if norms is None else norms.query,
            cos if norms is None else norms.key,
            0.0 if norms is None else norms.eps,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HALF=head_dim // 2,
            HALF_PADDED=triton.next_power_of_2(head_dim // 2),
            HEAD_TILE=head_tile,
            NORMED=norms is not None,
            **dependent_launch(qkv.device),
            **COMPILER_OPTIONS,
        )
    return query
