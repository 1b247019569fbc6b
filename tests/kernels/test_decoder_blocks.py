"""The halves of a decoder layer: native against PyTorch's operations, and the native ones' promise about bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from kernels.backend import choose_backend
from kernels.blocks import AttentionBatch, AttentionWeights, MlpWeights
from kernels.decoder_blocks.native import NativeAttentionBlock, NativeMlpBlock, rms_norm
from kernels.packed_linear.int8 import quantize
from tests.kernels.problems import ancestor_masks, mask_words

BLOCK_SIZE = 16
BLOCKS = 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layer:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    biases: bool = False
    head_norms: bool = False
    dtype: torch.dtype = torch.float32


LAYERS = [
    Layer(hidden=24, heads=3, kv_heads=1, head_dim=8, intermediate=40),
    Layer(hidden=60, heads=4, kv_heads=2, head_dim=20, intermediate=101, biases=True),
    Layer(hidden=288, heads=6, kv_heads=6, head_dim=48, intermediate=768, dtype=torch.bfloat16),
    Layer(hidden=128, heads=8, kv_heads=1, head_dim=64, intermediate=256, head_norms=True),
]


def attention_weights(layer: Layer) -> AttentionWeights:
    torch.manual_seed(0)
    rows = (layer.heads + 2 * layer.kv_heads) * layer.head_dim
    norms = [torch.rand(layer.head_dim) + 0.5 for _ in range(2)] if layer.head_norms else [None, None]
    return AttentionWeights(
        norm=torch.rand(layer.hidden) + 0.5,
        qkv=(torch.randn(rows, layer.hidden) / layer.hidden**0.5).to(layer.dtype),
        output=(torch.randn(layer.hidden, layer.heads * layer.head_dim) / layer.hidden**0.5).to(layer.dtype),
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        norm_eps=1e-5,
        qkv_bias=torch.randn(rows) if layer.biases else None,
        output_bias=torch.randn(layer.hidden) if layer.biases else None,
        query_norm=norms[0],
        key_norm=norms[1],
    )


def mlp_weights(layer: Layer) -> MlpWeights:
    torch.manual_seed(1)
    return MlpWeights(
        norm=torch.rand(layer.hidden) + 0.5,
        gate_up=(torch.randn(2 * layer.intermediate, layer.hidden) / layer.hidden**0.5).to(layer.dtype),
        down=(torch.randn(layer.hidden, layer.intermediate) / layer.intermediate**0.5).to(layer.dtype),
        norm_eps=1e-5,
    )


def rotation(positions: list[int], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.tensor(positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def make_batch(
    layer: Layer, prefixes: list[int], masks: list[int], slots: list[int], positions: list[int]
) -> AttentionBatch:
    """Rows of one sequence whose logical entry e lives in slot e."""
    cos, sin = rotation(positions, layer.head_dim)
    return AttentionBatch(
        block_tables=torch.arange(BLOCKS, dtype=torch.int32)[None],
        block_size=BLOCK_SIZE,
        row_sequences=torch.zeros(len(prefixes), dtype=torch.int32),
        prefix_lengths=torch.tensor(prefixes, dtype=torch.int32),
        masks=torch.tensor([mask_words(mask, 1) for mask in masks]),
        slots=torch.tensor(slots),
        cos=cos,
        sin=sin,
    )


def prompt_batch(layer: Layer, start: int, rows: int) -> AttentionBatch:
    positions = list(range(start, start + rows))
    return make_batch(layer, [p + 1 for p in positions], [0] * rows, positions, positions)


def tree_batch(layer: Layer, prefix: int, parents: list[int]) -> AttentionBatch:
    depths = [0] * len(parents)
    for node in range(1, len(parents)):
        depths[node] = depths[parents[node]] + 1
    slots = [prefix + node for node in range(len(parents))]
    positions = [prefix + depth for depth in depths]
    return make_batch(layer, [prefix] * len(parents), ancestor_masks(parents), slots, positions)


def empty_kv(layer: Layer, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((2, BLOCKS * BLOCK_SIZE, layer.kv_heads, layer.head_dim), float("nan"), dtype=dtype)


PARENTS = [-1, 0, 1, 1, 0, 4, 5, 2]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_attention_block_equals_torch(layer: Layer, residual: bool, kv_dtype: torch.dtype) -> None:
    weights = attention_weights(layer)
    native, reference = choose_backend(CPU, "native"), choose_backend(CPU, "torch")
    assert (native.name, reference.name) == ("native", "torch")
    caches = [empty_kv(layer, kv_dtype) for _ in range(2)]
    for batch in (prompt_batch(layer, 0, 13), tree_batch(layer, 13, PARENTS)):
        hidden = torch.randn(batch.rows, layer.hidden)
        expected = reference.pack_attention(weights)(hidden.clone(), caches[1], batch, residual=residual)
        kept = hidden.clone()
        actual = native.pack_attention(weights)(hidden, caches[0], batch, residual=residual)
        # one element of a row or of the cache rounded the other way to bfloat16 moves an output by a few thousandths
        tolerance = 2e-2 if torch.bfloat16 in (kv_dtype, layer.dtype) else 1e-4
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=1e-4)
        torch.testing.assert_close(caches[0], caches[1], atol=1e-4, rtol=1e-2, equal_nan=True)
        assert torch.equal(hidden, kept)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_mlp_block_equals_torch(layer: Layer, residual: bool) -> None:
    weights = mlp_weights(layer)
    hidden = 3 * torch.randn(11, layer.hidden)
    actual = choose_backend(CPU, "native").pack_mlp(weights)(hidden, residual=residual)
    expected = choose_backend(CPU, "torch").pack_mlp(weights)(hidden, residual=residual)
    tolerance = 2e-2 if layer.dtype == torch.bfloat16 else 1e-4  # see above
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_int8_blocks_are_their_widened_selves(layer: Layer) -> None:
    def widened(weight: torch.Tensor) -> torch.Tensor:
        values, scales = quantize(weight)
        return values.float() * scales[:, None]

    attention, mlp = attention_weights(layer), mlp_weights(layer)
    wide_attention = replace(attention, qkv=widened(attention.qkv), output=widened(attention.output))
    wide_mlp = replace(mlp, gate_up=widened(mlp.gate_up), down=widened(mlp.down))
    batch, hidden = prompt_batch(layer, 0, 13), torch.randn(13, layer.hidden)
    caches = [empty_kv(layer, torch.float32) for _ in range(2)]
    actual = NativeAttentionBlock(attention, int8=True)(hidden, caches[0], batch)
    torch.testing.assert_close(
        actual, NativeAttentionBlock(wide_attention)(hidden, caches[1], batch), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        NativeMlpBlock(mlp, int8=True)(hidden), NativeMlpBlock(wide_mlp)(hidden), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("size", [1, 20, 288])
def test_rms_norm_equals_torch(size: int) -> None:
    hidden, weight = torch.randn(5, size), torch.rand(size)
    expected = choose_backend(CPU, "torch").rms_norm(hidden, weight, 1e-5)
    torch.testing.assert_close(rms_norm(hidden, weight, 1e-5), expected, atol=1e-6, rtol=1e-5)


def test_activation_of_extreme_values_is_finite() -> None:
    extreme = MlpWeights(torch.ones(2), torch.tensor([[900.0, 0.0], [0.0, 1.0]]), torch.ones(2, 1), 1e-5)
    hidden = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    actual = NativeMlpBlock(extreme)(hidden)
    expected = choose_backend(CPU, "torch").pack_mlp(extreme)(hidden)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("kv_dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_tree_nodes_have_the_bits_of_plain_decoding(layer: Layer, kv_dtype: torch.dtype, int8: bool) -> None:
    """A whole layer on a tree in one step, and each of its paths token by token behind the same prompt."""
    attention = NativeAttentionBlock(attention_weights(layer), int8=int8)
    mlp = NativeMlpBlock(mlp_weights(layer), int8=int8)
    prompt, nodes = torch.randn(13, layer.hidden), torch.randn(len(PARENTS), layer.hidden)

    def forward(hidden: torch.Tensor, kv: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        return mlp(attention(hidden, kv, batch, residual=True), residual=True)

    kv = empty_kv(layer, kv_dtype)
    prompt_together = forward(prompt, kv, prompt_batch(layer, 0, 13))
    tree = forward(nodes, kv, tree_batch(layer, 13, PARENTS))
    for node in range(len(PARENTS)):
        path = [node]
        while path[0] > 0:
            path.insert(0, PARENTS[path[0]])
        kv = empty_kv(layer, kv_dtype)
        for position in range(13):
            alone = forward(prompt[position : position + 1], kv, prompt_batch(layer, position, 1))
            assert torch.equal(alone[0], prompt_together[position])
        for depth, member in enumerate(path):
            alone = forward(nodes[member : member + 1], kv, tree_batch(layer, 13 + depth, [-1]))
        assert torch.equal(alone[0], tree[node])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_row_does_not_depend_on_the_number_of_rows(layer: Layer) -> None:
    """So many rows that their norm is made together, and so few that each thread makes it for itself."""
    mlp, hidden = NativeMlpBlock(mlp_weights(layer)), torch.randn(400, layer.hidden)
    together = mlp(hidden, residual=True)
    for few in (1, 5, 16):
        assert torch.equal(torch.cat([mlp(part, residual=True) for part in hidden.split(few)]), together)


def test_wrong_operands_are_named() -> None:
    layer = LAYERS[0]
    block = NativeAttentionBlock(attention_weights(layer))
    batch = prompt_batch(layer, 0, 2)
    with pytest.raises(ValueError, match=r"hidden has shape \(3, 24\); it must be \[2, 24\]"):
        block(torch.randn(3, 24), empty_kv(layer), batch)
    with pytest.raises(ValueError, match=r"kv has shape .* it must be \[2, any, 1, 8\]"):
        block(torch.randn(2, 24), empty_kv(LAYERS[1]), batch)
    with pytest.raises(ValueError, match=r"kv is torch\.float16"):
        block(torch.randn(2, 24), empty_kv(layer, torch.float16), batch)
    with pytest.raises(ValueError, match="query_norm and key_norm come together"):
        AttentionWeights(torch.ones(4), torch.ones(12, 4), torch.ones(4, 4), 1, 1, 4, 1e-5, query_norm=torch.ones(4))
