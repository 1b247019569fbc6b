"""The runtime against Hugging Face's own models: logits of chains, chunks and trees, and what must not change them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from kernels.backend import RequestedName
from runtime.batch import FlatBatch, Segment
from runtime.kv_cache import BLOCK_SIZE, CachedSequence, KVCache, slot
from runtime.transformer import LoadOptions, Transformer
from speculation.tree import TokenTree
from tests.tiny_models import SHAPES, VOCAB, write_model

BACKENDS: list[RequestedName] = ["native", "torch"]


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), request.param)


def load(folder: Path, kernels: RequestedName = "auto", dtype: str = "auto") -> tuple[Transformer, KVCache]:
    model = Transformer.load(folder, LoadOptions(device="cpu", dtype=dtype, kernels=kernels))
    assert kernels in ("auto", model.backend.name)
    return model, KVCache(model.config, 64, model.device, model.kv_dtype)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(model: Transformer, cache: KVCache, *segments: Segment) -> torch.Tensor:
    """Of every row."""
    return model.step(segments, range(sum(len(segment.token_ids) for segment in segments)), cache).clone()


def run_chain(model: Transformer, cache: KVCache, tokens: list[int], chunk: int) -> torch.Tensor:
    sequence = CachedSequence()
    cache.reserve(sequence, len(tokens))
    rows = []
    for start in range(0, len(tokens), chunk):
        segment = Segment.chain(sequence, tokens[start : start + chunk], start)
        rows.append(logits_of(model, cache, segment))
    cache.release(sequence)
    return torch.cat(rows)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_logits_equal_hugging_face(folder: Path, kernels: RequestedName) -> None:
    model, cache = load(folder, kernels)
    tokens = prompt(90)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([tokens])).logits[0]
    for chunk in (90, 32, 7):
        torch.testing.assert_close(run_chain(model, cache, tokens, chunk), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("kernels", "dtype"), [("native", "auto"), ("native", "int8"), ("torch", "auto")])
def test_tree_nodes_equal_their_paths_decoded_as_chains(folder: Path, kernels: RequestedName, dtype: str) -> None:
    model, cache = load(folder, kernels, dtype)
    committed = prompt(21)
    tree = TokenTree((5, 6, 7, 8, 9, 10, 6), (-1, 0, 0, 1, 1, 2, 2))
    sequence = CachedSequence()
    cache.reserve(sequence, 64)
    prefix = Segment.chain(sequence, committed, 0)
    nodes = Segment.tree(sequence, tree.token_ids, tree.depths(), tree.ancestor_masks(), len(committed))
    logits = logits_of(model, cache, prefix, nodes)[len(committed) :]
    for node in range(len(tree)):
        path = [tree.token_ids[0], *(tree.token_ids[step] for step in tree.path(node))]
        alone = run_chain(model, cache, committed + path, 1)[-1]
        if model.backend.name == "native":
            assert torch.equal(logits[node], alone), "the native kernels promise equal bits"
        else:
            torch.testing.assert_close(logits[node], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_compacted_path_continues_like_a_chain(folder: Path, kernels: RequestedName) -> None:
    model, cache = load(folder, kernels)
    committed = prompt(BLOCK_SIZE - 2)  # the tree crosses a block boundary
    tree = TokenTree((5, 6, 7, 8, 9), (-1, 0, 0, 2, 3))
    sequence = CachedSequence()
    cache.reserve(sequence, 64)
    prefix = Segment.chain(sequence, committed, 0)
    nodes = Segment.tree(sequence, tree.token_ids, tree.depths(), tree.ancestor_masks(), len(committed))
    model.step([prefix, nodes], [], cache)
    start = len(committed)
    accepted = [2, 3, 4]
    model.compact(
        cache,
        [slot(sequence, start + node) for node in accepted],
        [slot(sequence, start + depth) for depth in (1, 2, 3)],
    )
    sequence.length = start + 4
    following = Segment.chain(sequence, [11], sequence.length)
    logits = logits_of(model, cache, following)[0]
    expected = run_chain(model, cache, [*committed, 5, 7, 8, 9, 11], 1)[-1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_its_batch(folder: Path) -> None:
    model, cache = load(folder, "native")
    sequences = [CachedSequence() for _ in range(5)]
    segments = []
    for index, sequence in enumerate(sequences):
        cache.reserve(sequence, 40)
        segments.append(Segment.chain(sequence, prompt(9 * index + 3, index), 0))
    together = logits_of(model, cache, *segments)
    first = 0
    for segment in segments:
        count = len(segment.token_ids)
        alone = logits_of(model, cache, segment)
        assert torch.equal(together[first : first + count], alone)
        first += count


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.2), (torch.float16, 0.0)])
def test_narrow_weights_compute_like_their_widened_selves(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """float16 to the bit; bfloat16 rounds what it multiplies."""
    folder = write_model(tmp_path / "narrow", "llama-gqa")
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    tokens = prompt(20)
    model, cache = load(folder, "native")
    assert model.weight_dtype == dtype
    widened = Transformer.load(folder, LoadOptions(device="cpu", dtype="float32", kernels="native"))
    other = KVCache(widened.config, 8, widened.device, widened.kv_dtype)
    expected = run_chain(widened, other, tokens, 20)
    torch.testing.assert_close(run_chain(model, cache, tokens, 20), expected, rtol=0, atol=tolerance)


def test_int8_moves_logits_a_little(folder: Path) -> None:
    tokens = prompt(60)
    exact = run_chain(*load(folder, "native"), tokens, 60)
    model, cache = load(folder, dtype="int8")
    rounded = run_chain(model, cache, tokens, 60)
    assert not torch.equal(rounded, exact)
    assert ((rounded - exact).std() / exact.std()) < 0.05
    assert torch.equal(run_chain(model, cache, tokens, 1), rounded)


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_one_call_for_all_layers_has_the_bits_of_the_layers(folder: Path, dtype: str) -> None:
    """The blocks, which ranks of a group call one by one, against the decoder, which one process calls."""
    model, cache = load(folder, "native", dtype)
    sequence = CachedSequence()
    cache.reserve(sequence, 90)
    segment, wanted = Segment.chain(sequence, prompt(90), 0), [*range(3, 90), 0, 0]
    together, written = model.step([segment], wanted, cache), cache.data.clone()
    assert model.argmax == together.argmax(-1).tolist()
    cache.data.zero_()
    hidden = model.forward(FlatBatch.of([segment], model.device), cache)
    assert torch.equal(model.logits(hidden[wanted]), together)
    assert torch.equal(cache.data, written)


def test_tokens_and_positions_beyond_the_model_are_named(folder: Path) -> None:
    model, cache = load(folder, "native")
    sequence = CachedSequence()
    cache.reserve(sequence, 3)
    segment = Segment.chain(sequence, [1, VOCAB, 2], 0)
    with pytest.raises(
        IndexError, match=f"row 1 has token {VOCAB} at position 1; the model has {VOCAB} tokens and 256"
    ):
        model.step([segment], [], cache)
    with pytest.raises(IndexError, match=r"rows 0\.\.3 are wanted; there are 3"):
        model.step([Segment.chain(sequence, [1, 1, 2], 0)], [0, 3], cache)
