# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""Head norms, rotation and the write into the cache on the GPU, in Triton: one launch, one program a head of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.blocks import HeadNorms, check_tensor

COMPILER_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}  # fused products would round unlike PyTorch's


@triton.jit
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
    NORMED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, HALF_PADDED)
    inside = dim < HALF
    place = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + dim
    first = tl.load(place, mask=inside, other=0.0)
    second = tl.load(place + HALF, mask=inside, other=0.0)
    slot = tl.load(slots + row)
    if head >= HEADS + KV_HEADS:
        target = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * (2 * HALF) + dim
        tl.store(target, first.to(values.dtype.element_ty), mask=inside)
        tl.store(target + HALF, second.to(values.dtype.element_ty), mask=inside)
        return
    kind = first.dtype
    x, y = first.to(tl.float32), second.to(tl.float32)
    if NORMED:
        norm = tl.where(head < HEADS, query_norm, key_norm) + dim
        inverse = tl.rsqrt((tl.sum(x * x, axis=0) + tl.sum(y * y, axis=0)) / (2 * HALF) + eps)
        # rounded after the normalisation and after the weight, as in rms_norm
        x = (x * inverse).to(kind).to(tl.float32) * tl.load(norm, mask=inside, other=0.0).to(kind).to(tl.float32)
        y = (y * inverse).to(kind).to(tl.float32) * tl.load(norm + HALF, mask=inside, other=0.0).to(kind).to(tl.float32)
        x, y = x.to(kind).to(tl.float32), y.to(kind).to(tl.float32)
    c = tl.load(cos + row * HALF + dim, mask=inside, other=0.0)
    s = tl.load(sin + row * HALF + dim, mask=inside, other=0.0)
    turned_x, turned_y = (x * c - y * s).to(kind), (y * c + x * s).to(kind)
    if head < HEADS:
        turned = query + (row * HEADS + head) * (2 * HALF) + dim
        tl.store(turned, turned_x, mask=inside)
        tl.store(turned + HALF, turned_y, mask=inside)
    else:
        target = keys + (slot * KV_HEADS + head - HEADS) * (2 * HALF) + dim
        tl.store(target, turned_x.to(keys.dtype.element_ty), mask=inside)
        tl.store(target + HALF, turned_y.to(keys.dtype.element_ty), mask=inside)


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
        _rotated_write_kernel[(rows, heads + 2 * kv_heads)](
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
            NORMED=norms is not None,
            **COMPILER_OPTIONS,
        )
    return query
