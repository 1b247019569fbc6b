"""The linear layer for the CPU: weights packed once, in memory in their own type or as int8, sums in float32."""

from __future__ import annotations

from ctypes import byref

import torch

from kernels.blocks import check_tensor
from kernels.native.memory import PackedMemory
from kernels.native.shared_library import load
from kernels.native.structures import STORAGES, LinearStruct, pointer
from kernels.packed_linear.int8 import quantize


class NativeLinear:
    """x float32 [rows, in] -> x weightᵀ + bias, float32 [rows, out].

    bfloat16 weights multiply x rounded to bfloat16, which processors with instructions for it do twice as fast, and
    with AMX eight times; all others multiply x as it is, and weights that several of these types can represent give the
    same bits in each. The bits of a row depend on that row and the weights alone: not on the other rows, the threads,
    or the instructions, but for AMX, which adds in an order of its own.

    weight: [out, in], float32, bfloat16 or float16, copied; other types are refused.
    bias: [out], kept as float32.
    int8: store the weights as int8, see `quantize`.
    gated: pack for a gated layer, where silu of the first half of the outputs multiplies the second half; only the MLP
        block can run it.
    memory: where the packed weight goes, a place of its own by default.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        int8: bool = False,
        gated: bool = False,
        memory: PackedMemory | None = None,
    ) -> None:
        if weight.dtype not in STORAGES or not weight.is_floating_point():
            raise ValueError(
                f"weight is {weight.dtype}; the native kernels take torch.float32, torch.bfloat16 or torch.float16"
            )
        outputs, inputs = weight.shape
        weight, scales = quantize(weight.detach()) if int8 else (weight.detach().contiguous(), None)
        self._library = load()
        self._scales = scales
        self._packed = self._pack(weight, gated, memory)
        self._bias = None if bias is None else bias.detach().float().contiguous()
        if self._bias is not None:
            check_tensor("bias", self._bias, (outputs,))
        self.inputs, self.outputs = inputs, outputs
        self.struct = LinearStruct(
            pointer(self._packed), pointer(scales), pointer(self._bias), inputs, outputs, STORAGES[weight.dtype]
        )
        self._gated = gated

    def _pack(self, weight: torch.Tensor, gated: bool, memory: PackedMemory | None) -> torch.Tensor:
        shape = (STORAGES[weight.dtype], gated, weight.shape[1], weight.shape[0])
        words = self._library.specserve_packed_words(*shape)
        packed = torch.empty(words, dtype=torch.int32) if memory is None else memory.take(words)
        self._library.specserve_pack_linear(pointer(weight), *shape, pointer(packed))
        return packed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert not self._gated, "a gated layer runs in its MLP block"
        check_tensor("x", x, (None, self.inputs), torch.float32)
        out = torch.empty(x.shape[0], self.outputs)
        self._library.specserve_packed_linear(byref(self.struct), pointer(x), x.shape[0], pointer(out))
        return out
