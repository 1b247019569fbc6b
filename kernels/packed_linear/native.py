"""The linear layer for the CPU: weights packed once, float32 or bfloat16 in memory, float32 arithmetic."""

from __future__ import annotations

from ctypes import byref

import torch

from kernels.blocks import check_tensor
from kernels.native.library import load
from kernels.native.structures import LinearStruct, pointer


class NativeLinear:
    """x float32 [rows, in] -> x weightᵀ + bias, float32 [rows, out].

    The bits of a row depend on that row and the weights alone: not on the other rows, the threads, or whether weights
    that bfloat16 can represent are stored as bfloat16 or as float32.

    weight: [out, in], float32 or bfloat16, copied; other types are refused.
    bias: [out], kept as float32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"weight is {weight.dtype}; the native kernels store torch.float32 or torch.bfloat16")
        outputs, inputs = weight.shape
        weight = weight.detach().contiguous()
        is_bfloat16 = int(weight.dtype == torch.bfloat16)
        self._library = load()
        words = self._library.specserve_packed_words(inputs, outputs, is_bfloat16)
        self._packed = torch.empty(words, dtype=torch.int32)
        self._library.specserve_pack_linear(pointer(weight), is_bfloat16, inputs, outputs, pointer(self._packed))
        self._bias = None if bias is None else bias.detach().float().contiguous()
        if self._bias is not None:
            check_tensor("bias", self._bias, (outputs,))
        self.inputs, self.outputs = inputs, outputs
        self.struct = LinearStruct(pointer(self._packed), pointer(self._bias), inputs, outputs, is_bfloat16)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        check_tensor("x", x, (None, self.inputs), torch.float32)
        out = torch.empty(x.shape[0], self.outputs)
        self._library.specserve_packed_linear(byref(self.struct), pointer(x), x.shape[0], pointer(out))
        return out
