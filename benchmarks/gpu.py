"""Tree attention against the device's copy rate, the step of a 7B-shaped model against reading its weights once, and
drafts of a small model.

    python -m benchmarks.gpu

Needs a CUDA device. Writes benchmarks/results/gpu.md.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.dense_attention import BLOCK_SIZE, Tree, ancestor_masks, flex, sdpa
from benchmarks.draft_times import DEPTH, draft_table
from benchmarks.markdown import markdown_table, shown_command
from kernels.backend import Backend, choose_backend
from kernels.blocks import AttentionWeights, TreeAttention
from kernels.decoder_blocks.composed import ComposedAttentionBlock
from runtime.batch import FlatBatch, Segment
from runtime.config import ModelConfig, RopeScaling
from runtime.kv_cache import CachedSequence, KVCache, longest_sequence_blocks
from runtime.step_graph import cuda_capture
from runtime.transformer import Transformer
from runtime.weights import EndWeights, LayerWeights
from services.common.model_files import resolve_model
from services.launcher.settings import EMBEDDED_SSMS

CONTEXTS = (1024, 4096, 16384)
ATTENTION_NODES = (1, 8, 32, 64)
STEP_NODES = (1, 8, 16, 32, 64)
STEP_CONTEXT = 1024
# Attention is called for so many layers in a row, whose caches together do not fit the L2 cache, as in a step.
LAYER_BYTES, MOST_LAYERS = 256 * 2**20, 16
# query heads, key heads, head dim: LLaMA-7B's, and grouped as in Llama 3 8B
HEADS = ((32, 32, 128), (32, 8, 128))
PEERS: Mapping[str, Callable[[Tree], TreeAttention]] = {"SDPA, dense mask": sdpa, "flex attention": flex}

LLAMA_7B = ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    context_length=4096,
    norm_epsilon=1e-5,
    rope_theta=10000.0,
    rope_scaling=RopeScaling(),
    tied_embeddings=False,
    attention_bias=False,
    output_bias=False,
    head_norm=False,
    eos_token_ids=(),
)


def attention_bytes(entries: int, nodes: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """What attention has to move: every key and value once, the queries in, the results out."""
    return (2 * entries * kv_heads + 2 * nodes * heads) * head_dim * itemsize


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
    """What a step has to read: all weights once, of the embedding next to nothing."""
    rows = (config.heads + 2 * config.kv_heads) * config.head_dim
    attention = config.hidden_size * (rows + config.heads * config.head_dim)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return (config.layers * layer + config.vocab_size * config.hidden_size) * itemsize


def random_weights(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[EndWeights, list[LayerWeights]]:
    """Weights of a model's shape, made on the device; norms are 1, so that nothing overflows."""

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, inputs, device=device, dtype=dtype).mul_(inputs**-0.5)

    def layer() -> LayerWeights:
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        return LayerWeights(
            input_norm=torch.ones(config.hidden_size, device=device, dtype=dtype),
            qkv=matrix(query + 2 * key, config.hidden_size),
            qkv_bias=None,
            query_norm=None,
            key_norm=None,
            output=matrix(config.hidden_size, query),
            output_bias=None,
            post_attention_norm=torch.ones(config.hidden_size, device=device, dtype=dtype),
            gate_up=matrix(2 * config.intermediate_size, config.hidden_size),
            down=matrix(config.hidden_size, config.intermediate_size),
        )

    ends = EndWeights(
        embedding=torch.randn(config.vocab_size, config.hidden_size, device=device, dtype=dtype),
        final_norm=torch.ones(config.hidden_size, device=device, dtype=dtype),
        head=matrix(config.vocab_size, config.hidden_size),
    )
    return ends, [layer() for _ in range(config.layers)]


def with_attention(backend: Backend, attention: TreeAttention) -> Backend:
    """The same backend around another attention."""

    def pack_attention(weights: AttentionWeights) -> ComposedAttentionBlock:
        block = backend.pack_attention(weights)
        assert isinstance(block, ComposedAttentionBlock)
        return block.with_attention(attention)

    return replace(backend, tree_attention=attention, pack_attention=pack_attention)


@dataclass(frozen=True)
class Step:
    """A step over a tree behind the context of one sequence, again and again.

    The sequence's blocks are consecutive from 0, what dense attention asks for. Its keys and values are all zero.
    """

    model: Transformer
    cache: KVCache
    segment: Segment

    @classmethod
    def of(cls, model: Transformer, context: int, nodes: int) -> Step:
        cache = model.new_cache(0.5, 1, blocks=longest_sequence_blocks(model.config))
        sequence = CachedSequence(length=context)
        cache.reserve(sequence, context + nodes)
        depths = [(node + 1).bit_length() - 1 for node in range(nodes)]
        return cls(model, cache, Segment.tree(sequence, list(range(nodes)), depths, ancestor_masks(nodes), context))

    @property
    def nodes(self) -> int:
        return len(self.segment.token_ids)

    def __call__(self) -> torch.Tensor:
        """float32 logits [nodes, vocab]."""
        return self.model.step([self.segment], range(self.nodes), self.cache)

    def on_device(self) -> Callable[[], object]:
        """What the device does of it, without the way there and back."""
        batch = FlatBatch.of([self.segment], self.model.device)
        return lambda: self.model.logits(self.model.forward(batch, self.cache))


def captured_ms(compute: Callable[[], object]) -> float:
    """Milliseconds of a computation that is captured in a graph; the median."""
    from triton.testing import do_bench  # triton has wheels for some platforms only

    def run() -> None:
        compute()

    replay = cuda_capture(torch.device("cuda"))(run)
    result: float = do_bench(replay, warmup=20, rep=100, return_mode="median")
    return result


def step_ms(compute: Callable[[], torch.Tensor], repeats: int) -> float:
    """Milliseconds on the host's clock from the nodes of a step to the tokens chosen behind them; the median."""
    times = []
    for repeat in range(-5, repeats):
        started = time.perf_counter()
        compute().argmax(-1).tolist()
        if repeat >= 0:
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def copy_rates() -> dict[str, float]:
    """Bytes a second, read and written together, of a copy within the device."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copies = {"cudaMemcpy": lambda: target.copy_(source), "a kernel": lambda: torch.mul(source, 1.0, out=target)}
    return {name: 2 * source.nbytes / (captured_ms(copy) / 1000) for name, copy in copies.items()}


def attention_table(heads: int, kv_heads: int, head_dim: int, rate: float, peers: Sequence[str]) -> str:
    lines = []
    for context in CONTEXTS:
        for nodes in ATTENTION_NODES:
            times = dict(attention_times(context, nodes, heads, kv_heads, head_dim, peers))
            moved = attention_bytes(context + nodes, nodes, heads, kv_heads, head_dim, 2)
            lines.append(attention_line(context, nodes, times, moved, rate))
    header = ["context", "nodes", *(f"{name}, ms" for name in ("ours", *peers)), "ours, TB/s", "of the copy rate"]
    return markdown_table(header, lines)


def attention_times(
    context: int, nodes: int, heads: int, kv_heads: int, head_dim: int, peers: Sequence[str]
) -> Iterator[tuple[str, float]]:
    device = torch.device("cuda")
    tree = Tree.binary(context, nodes, device)
    size = 2, tree.block_tables.shape[1] * BLOCK_SIZE, kv_heads, head_dim
    layers = min(MOST_LAYERS, 1 + LAYER_BYTES // (2 * math.prod(size)))
    query = torch.randn(nodes, heads, head_dim, device=device, dtype=torch.bfloat16)
    caches = torch.randn(layers, *size, device=device, dtype=torch.bfloat16)
    for name in ("ours", *peers):
        attention = choose_backend(device, "triton").tree_attention if name == "ours" else PEERS[name](tree)
        measure = partial(captured_ms, partial(attend_all, tree, attention, query, caches))
        yield name, (measure() if name == "ours" else or_failure(name, measure)) / layers


def attend_all(tree: Tree, attention: TreeAttention, query: torch.Tensor, caches: torch.Tensor) -> None:
    """caches: [layers, 2, slots, kv_heads, dim]."""
    for keys, values in caches:
        tree.attend(attention, query, keys, values)


def attention_line(context: int, nodes: int, times: Mapping[str, float], moved: int, rate: float) -> list[str]:
    """A line of the table; moved: bytes. rate: of a copy, bytes a second."""
    achieved = moved / (times["ours"] / 1000)
    figures = [shown_ms(milliseconds, 4) for milliseconds in times.values()]
    return [f"{context}", f"{nodes}", *figures, f"{achieved / 1e12:.2f}", f"{achieved / rate:.0%}"]


def step_table(config: ModelConfig, rate: float, repeats: int, peers: Sequence[str]) -> str:
    device = torch.device("cuda")
    weights = random_weights(config, device, torch.bfloat16)
    backend = choose_backend(device, "triton")
    floor = 1000 * weight_bytes(config, 2) / rate
    lines = []
    for nodes in STEP_NODES:
        tree = Tree.binary(STEP_CONTEXT, nodes, device)
        times: dict[str, float] = {}
        for name in ("ours", *peers):
            own = backend if name == "ours" else with_attention(backend, PEERS[name](tree))
            step = Step.of(Transformer(config, *weights, own, device), STEP_CONTEXT, nodes)
            if name == "ours":
                times |= {name: step_ms(step, repeats), "on the device": captured_ms(step.on_device())}
            else:
                times[name] = or_failure(name, partial(step_ms, step, repeats))
        lines.append(step_line(nodes, times, floor))
    header = ["nodes", "ours, ms", "of that on the device, ms", *(f"{name}, ms" for name in peers)]
    return markdown_table([*header, "ours / floor", "on the device / floor"], lines)


def step_line(nodes: int, times: Mapping[str, float], floor_ms: float) -> list[str]:
    over = [f"{times[name] / floor_ms:.2f}" for name in ("ours", "on the device")]
    return [f"{nodes}", *(shown_ms(milliseconds, 3) for milliseconds in times.values()), *over]


def or_failure(peer: str, measure: Callable[[], float]) -> float:
    """Milliseconds of a peer, NaN where PyTorch cannot compile it for a shape; why goes to the error output."""
    try:
        return measure()
    except RuntimeError as error:
        print(f"{peer} failed: {error}", file=sys.stderr)
        return math.nan


def shown_ms(milliseconds: float, digits: int) -> str:
    return "fails" if math.isnan(milliseconds) else f"{milliseconds:.{digits}f}"


def sections(repeats: int, peers: Sequence[str], ssm: str, command: str) -> Iterator[str]:
    """Of the page, each as soon as it has been measured."""
    rates = copy_rates()
    rate = max(rates.values())
    shown_rates = " and ".join(f"{own / 1e12:.2f} by {name}" for name, own in rates.items())
    gigabytes = weight_bytes(LLAMA_7B, 2) / 1e9
    yield "# On a GPU"
    yield (
        f"Made on {date.today().isoformat()} by `{command}` on one {torch.cuda.get_device_name()} with torch "
        f"{version('torch')} and triton {version('triton')}. A copy within the device moves so many TB/s, read and "
        f"written together: {shown_rates}; the higher counts below. All is bf16 and captured in CUDA graphs. Attention "
        "is called for several layers in a row, whose keys and values are in memory, not in the L2 cache."
    )
    yield "## Step of a 7B-shaped model with random weights"
    yield (
        f"One sequence, {STEP_CONTEXT} tokens of context, from the nodes on the host to the chosen tokens on the host; "
        f"and what of it the device takes. Floor: {gigabytes:.1f} GB of weights at the rate of a copy, "
        f"{1000 * gigabytes * 1e9 / rate:.2f} ms."
    )
    yield step_table(LLAMA_7B, rate, repeats, peers)
    for heads, kv_heads, head_dim in HEADS:
        yield f"## Tree attention, {heads} query and {kv_heads} key heads of {head_dim}"
        yield attention_table(heads, kv_heads, head_dim, rate, peers)
    yield "## Drafts of a small model"
    yield (
        f"{Path(ssm).name}, greedily, up to {DEPTH} levels, from the accepted tokens to the trees on the host: all "
        "levels captured in one graph, and level by level."
    )
    yield draft_table(resolve_model(ssm), repeats)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each figure; the median counts.")] = 50,
    peer: Annotated[
        list[str] | None, typer.Option(help=f"{', or '.join(PEERS)}; repeatable. Both where none is named.")
    ] = None,
    ssm: Annotated[str, typer.Option(help="Small model that drafts: a folder or a hub id.")] = EMBEDDED_SSMS[0],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("benchmarks/results/gpu.md"),
) -> None:
    """Measures on a CUDA device and writes the page."""
    peers = peer or list(PEERS)
    if strangers := [name for name in peers if name not in PEERS]:
        raise typer.BadParameter(f"{strangers[0]!r}; the peers are {', '.join(PEERS)}")
    if not torch.cuda.is_available():
        print("no CUDA device is there; this benchmark measures nothing without one", file=sys.stderr)
        raise typer.Exit(1)
    torch.manual_seed(0)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = ""
    with torch.inference_mode():
        for section in sections(repeats, peers, ssm, shown_command("benchmarks.gpu", sys.argv[1:])):
            print(section, end="\n\n", flush=True)
            text += f"{section}\n\n"
            out.write_text(text.rstrip() + "\n")  # what has been measured stays, whatever comes


if __name__ == "__main__":
    typer.run(main)
