"""Head norms, rotation and the write into the cache in plain PyTorch, on any device."""

from __future__ import annotations

import torch

from kernels.blocks import HeadNorms
from kernels.rms_norm.reference import rms_norm


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al., 2021) on pairs (d, d + head_dim / 2).

    heads: [rows, heads, head_dim]; cos, sin: float32 [rows, head_dim / 2].
    """
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)


def rotated_write(
    qkv: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: HeadNorms | None,
) -> torch.Tensor:
    """See `kernels.blocks.RotatedWrite`."""
    kv_heads, head_dim = kv.shape[2:]
    heads = qkv.view(len(qkv), qkv.shape[1] // head_dim, head_dim)
    query, key, value = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        query = rms_norm(query, norms.query, norms.eps)
        key = rms_norm(key, norms.key, norms.eps)
    kv[0].index_copy_(0, slots, rotate(key, cos, sin).to(kv.dtype))
    kv[1].index_copy_(0, slots, value.to(kv.dtype))
    return rotate(query, cos, sin)
