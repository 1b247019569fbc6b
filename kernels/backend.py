"""Which implementation of the kernels runs on a device: chosen once, explicit, with the reason beside the name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal, Protocol

import torch

from kernels.blocks import (
    AttentionBlock,
    AttentionWeights,
    GatedLinear,
    Head,
    KvCompaction,
    Linear,
    MlpBlock,
    MlpWeights,
    RmsNorm,
    TreeAttention,
)
from kernels.decoder_blocks import native as native_blocks
from kernels.decoder_blocks.composed import ComposedAttentionBlock, ComposedHead, ComposedMlpBlock, Operations
from kernels.kv_compaction import native as native_compaction
from kernels.kv_compaction import reference as torch_compaction
from kernels.native import native_available, native_status
from kernels.native.memory import PackedMemory
from kernels.packed_linear.native import NativeLinear
from kernels.packed_linear.torch import TorchGatedLinear, TorchLinear
from kernels.rms_norm.reference import rms_norm
from kernels.rotated_write.reference import rotated_write
from kernels.tree_attention import native as native_attention
from kernels.tree_attention import reference as torch_attention
from kernels.tree_growth.levels import GrowLevel

BackendName = Literal["native", "triton", "torch"]
RequestedName = Literal["auto", "native", "triton", "torch"]
REQUESTED = "requested"
"""Reason of a slow backend that was asked for by name."""


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why and what to do."""


class PackHead(Protocol):
    """weight [vocab, hidden] -> Head."""

    def __call__(self, weight: torch.Tensor, /) -> Head: ...


@dataclass(frozen=True)
class Backend:
    """One implementation of every kernel. `reason` says why it was chosen, for the log and the health call.

    pack_* copy the weights into the layout that the implementation wants; the caller may drop its own. A backend is for
    one model, whose weights are packed in the order in which a step uses them.
    activation_dtype, kv_dtype: what activations and the KV cache are for weights stored so.
    int8: pack_* quantize matrices to int8, see `kernels.packed_linear.int8`.
    grow_level: None where trees grow in PyTorch.
    """

    name: BackendName
    reason: str
    activation_dtype: Callable[[torch.dtype], torch.dtype]
    kv_dtype: Callable[[torch.dtype], torch.dtype]
    tree_attention: TreeAttention
    kv_compaction: KvCompaction
    rms_norm: RmsNorm
    pack_head: PackHead
    pack_attention: Callable[[AttentionWeights], AttentionBlock]
    pack_mlp: Callable[[MlpWeights], MlpBlock]
    int8: bool = False
    grow_level: GrowLevel | None = None


def choose_backend(device: torch.device, requested: RequestedName = "auto", *, int8: bool = False) -> Backend:
    """CPU: native when its library is built, else torch. CUDA: triton when it is installed, else torch.

    int8: matrices are quantized to int8 in memory; the native kernels alone can.

    Raises:
        BackendUnavailable: `requested` names a backend that cannot run on `device`.
        ValueError: `requested` is not one of the names.
    """
    if requested not in ("auto", "native", "triton", "torch"):
        raise ValueError(f"backend {requested!r}; it must be auto, native, triton or torch")
    if int8:
        return _choose_for_int8(device, requested)
    if requested == "torch":
        return _torch_backend(device, REQUESTED)
    if device.type == "cpu":
        return _choose_for_cpu(device, requested)
    return _choose_for_gpu(device, requested)


def _choose_for_int8(device: torch.device, requested: RequestedName) -> Backend:
    if device.type != "cpu" or requested not in ("auto", "native"):
        raise BackendUnavailable(
            f"int8 weights run with the native kernels on the CPU, not with {requested} on {device}"
        )
    if not native_available():
        raise BackendUnavailable(native_status())
    return _native_backend(native_status(), int8=True)


def _choose_for_cpu(device: torch.device, requested: RequestedName) -> Backend:
    if requested == "triton":
        raise BackendUnavailable("triton does not run on the CPU; ask for native, torch or auto")
    if native_available():
        return _native_backend(native_status())
    if requested == "native":
        raise BackendUnavailable(native_status())
    return _torch_backend(device, native_status())


def _choose_for_gpu(device: torch.device, requested: RequestedName) -> Backend:
    if requested == "native":
        raise BackendUnavailable(f"the native kernels run on the CPU, not on {device}; ask for triton, torch or auto")
    if find_spec("triton") is None:
        reason = "triton is not installed; pip install triton"
        if requested == "triton":
            raise BackendUnavailable(reason)
        return _torch_backend(device, reason)
    # Imported here because triton has wheels for some platforms only.
    from kernels.kv_compaction import triton as triton_compaction
    from kernels.rms_norm import triton as triton_norm
    from kernels.rotated_write import triton as triton_write
    from kernels.tree_attention import triton as triton_attention
    from kernels.tree_growth import triton as triton_growth

    operations = Operations(
        _triton_linear,
        _triton_gated_linear,
        triton_norm.rms_norm,
        triton_write.rotated_write,
        triton_attention.tree_attention,
    )
    reason = f"triton {version('triton')}"
    backend = composed_backend("triton", reason, device, operations, triton_compaction.kv_compaction)
    return replace(backend, grow_level=triton_growth.grow_level)


def _triton_linear(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    """float32 goes to PyTorch's libraries: the tensor cores that the Triton layer is made of have no such product."""
    from kernels.packed_linear.triton import TritonLinear

    return TorchLinear(weight, bias, dtype) if dtype == torch.float32 else TritonLinear(weight, bias, dtype)


def _triton_gated_linear(gate_up: torch.Tensor, dtype: torch.dtype) -> GatedLinear:
    from kernels.packed_linear.triton import TritonGatedLinear

    return TorchGatedLinear(gate_up, dtype) if dtype == torch.float32 else TritonGatedLinear(gate_up, dtype)


def _native_backend(reason: str, int8: bool = False) -> Backend:
    memory = PackedMemory()
    return Backend(
        name="native",
        reason=reason,
        activation_dtype=lambda weight_dtype: torch.float32,
        kv_dtype=lambda weight_dtype: torch.bfloat16 if weight_dtype == torch.bfloat16 else torch.float32,
        tree_attention=native_attention.tree_attention,
        kv_compaction=native_compaction.kv_compaction,
        rms_norm=native_blocks.rms_norm,
        pack_head=partial(NativeLinear, int8=int8, memory=memory),
        pack_attention=partial(native_blocks.NativeAttentionBlock, int8=int8, memory=memory),
        pack_mlp=partial(native_blocks.NativeMlpBlock, int8=int8, memory=memory),
        int8=int8,
    )


def _torch_backend(device: torch.device, reason: str) -> Backend:
    operations = Operations(TorchLinear, TorchGatedLinear, rms_norm, rotated_write, torch_attention.tree_attention)
    return composed_backend("torch", reason, device, operations, torch_compaction.kv_compaction)


def composed_backend(
    name: BackendName, reason: str, device: torch.device, operations: Operations, kv_compaction: KvCompaction
) -> Backend:
    """Decoder layers of the given operations."""

    def activation_dtype(weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if device.type == "cpu" else weight_dtype

    return Backend(
        name=name,
        reason=reason,
        activation_dtype=activation_dtype,
        kv_dtype=activation_dtype,
        tree_attention=operations.tree_attention,
        kv_compaction=kv_compaction,
        rms_norm=operations.rms_norm,
        pack_head=lambda weight: ComposedHead(weight, activation_dtype(weight.dtype), operations),
        pack_attention=lambda weights: ComposedAttentionBlock(weights, activation_dtype(weights.qkv.dtype), operations),
        pack_mlp=lambda weights: ComposedMlpBlock(weights, activation_dtype(weights.down.dtype), operations),
    )
