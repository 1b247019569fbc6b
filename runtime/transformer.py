"""A decoder of the Llama family over a paged KV cache: token rows in, hidden states and logits out.

Takes positions and ancestor masks, not trees; knows nothing of requests, sampling or other devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.backend import Backend, RequestedName, choose_backend
from kernels.blocks import AttentionBatch, AttentionBlock, AttentionWeights, MlpBlock, MlpWeights
from kernels.decoder.native import NativeDecoder
from kernels.decoder_blocks.native import NativeAttentionBlock, NativeMlpBlock
from kernels.draft_loop.native import DraftSequence, GrownTree, NativeDraftLoop
from kernels.packed_linear.native import NativeLinear
from runtime.batch import FlatBatch, Segment, rows_of
from runtime.config import ModelConfig, inverse_frequencies, read_config
from runtime.kv_cache import BLOCK_SIZE, KVCache, blocks_for_cache
from runtime.parallel.sharding import Degrees, Shard
from runtime.step_graph import Capture, StepGraphs, cuda_capture
from runtime.weights import Checkpoint, EndWeights, LayerWeights, WeightLoader

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadOptions:
    """Where and how a model runs.

    device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:1", ...
    dtype: "auto" (as stored), "float32", "bfloat16", "float16" or "int8": the type of the weights in memory. On CPU
        sums are fp32 whatever the storage; bf16 weights multiply inputs rounded to bf16, the others fp32 inputs, so
        that fp16 weights give the bits that the same weights widened to fp32 give. "int8" quantizes the matrices while
        loading (a scale for each output; norms, biases and the embedding stay as stored), which makes another model.
    kernels: "auto", "native", "triton" or "torch".
    """

    device: str = "auto"
    dtype: str = "auto"
    kernels: RequestedName = "auto"

    def resolve_device(self) -> torch.device:
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def weight_loader(self, folder: Path, shard: Shard) -> WeightLoader:
        """Raises UnsupportedModel: the folder's weights are missing or damaged."""
        checkpoint = Checkpoint(folder)
        stored = checkpoint.stored_dtype()
        dtype = DTYPES.get(self.dtype, stored if stored in DTYPES.values() else torch.float32)
        return WeightLoader(checkpoint, shard, self.resolve_device(), dtype)


class Transformer:
    """A loaded model. Not thread-safe: one thread owns it and its caches.

    argmax: the most likely token of each row of the last step's logits, where the step found it on the way.
    capture: how computations on its newest cache are captured; None where they are not.
    """

    def __init__(
        self,
        config: ModelConfig,
        ends: EndWeights,
        layers: Iterable[LayerWeights],
        backend: Backend,
        device: torch.device,
    ) -> None:
        self.config = config
        self.backend = backend
        self.device = device
        self.weight_dtype = torch.int8 if backend.int8 else ends.embedding.dtype
        self.activation_dtype = backend.activation_dtype(ends.embedding.dtype)
        self.kv_dtype = backend.kv_dtype(ends.embedding.dtype)
        self._embedding = ends.embedding
        self._attention, self._mlp = pack_layers(config, layers, backend)
        self._final_norm = ends.final_norm.to(self.activation_dtype)
        self._head = backend.pack_head(ends.head)
        self._cos, self._sin = rotary_tables(config, device)
        self._decoder = self._native_decoder()
        self._draft_loop = None if self._decoder is None else NativeDraftLoop(self._decoder)
        self.argmax: list[int] | None = None
        self._graphs: StepGraphs | None = None
        self.capture: Capture | None = None

    @classmethod
    def load(cls, folder: Path, options: LoadOptions) -> Transformer:
        """Load a Hugging Face folder.

        Raises:
            UnsupportedModel: the folder is missing, damaged or of an unsupported kind.
            BackendUnavailable: the kernels asked for cannot run here.
        """
        config = read_config(folder)
        device = options.resolve_device()
        loader = options.weight_loader(folder, Shard(config, Degrees(), rank=0))
        with torch.inference_mode():
            backend = choose_backend(device, options.kernels, int8=options.dtype == "int8")
            return cls(config, loader.ends(), loader.layers(), backend, device)

    def new_cache(self, memory_fraction: float, max_sequences: int, blocks: int = 0) -> KVCache:
        """A KV cache of `blocks` blocks, or, when that is 0, of what fits into `memory_fraction` of the free memory and
        `max_sequences` can use.

        Raises:
            CacheFull: too small for one sequence of full context and its largest tree.
        """
        blocks = blocks_for_cache(self.config, self.device, self.kv_dtype, memory_fraction, max_sequences, blocks)
        cache = KVCache(self.config, blocks, self.device, self.kv_dtype)
        if self.device.type == "cuda" and self.backend.name == "triton":
            self.capture = cuda_capture(self.device)
            self._graphs = StepGraphs(self, cache, self.capture)
        return cache

    def prepare_steps(self, sequences: int) -> int:
        """Capture the steps of up to `sequences` sequences behind short contexts, so that no request waits for it; how
        many shapes that are, 0 where steps are not captured.
        """
        return 0 if self._graphs is None else self._graphs.prepare(sequences)

    @torch.inference_mode()
    def forward(self, batch: FlatBatch, cache: KVCache) -> torch.Tensor:
        """Write the rows' keys and values into the cache; return the last hidden states, [rows, hidden].

        A row's result depends on what it sees alone, not on the other rows of the batch.
        """
        attention_batch = attention_rows(batch, self._cos, self._sin)
        hidden = self._embedding[batch.token_ids].to(self.activation_dtype)
        for layer, (attention, mlp) in enumerate(zip(self._attention, self._mlp, strict=True)):
            hidden = attention(hidden, cache.data[layer], attention_batch, residual=True)
            hidden = mlp(hidden, residual=True)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits of some rows: hidden [rows, hidden] -> float32 [rows, vocab]."""
        normed = self.backend.rms_norm(hidden, self._final_norm, self.config.norm_epsilon)
        return self._head(normed)

    def step(self, segments: Sequence[Segment], rows: Sequence[int], cache: KVCache) -> torch.Tensor:
        """Compute the segments' rows and return the next-token logits of some of them, float32 [len(rows), vocab].

        rows: in any order, which is the result's. Every cache must have the blocks that its rows write. The result may
        be overwritten by the next step.
        """
        if self._decoder is not None:
            logits, self.argmax = self._decoder.step(rows_of(segments), rows, BLOCK_SIZE, cache.data)
            return logits
        graphs = self._graphs
        if graphs is not None and graphs.cache is cache and (shape := graphs.shape_of(segments)) is not None:
            return graphs.step(shape, segments, rows)
        hidden = self.forward(FlatBatch.of(segments, self.device), cache)
        if not rows:
            return hidden.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        if list(rows) != list(range(len(hidden))):
            hidden = hidden[torch.tensor(rows, dtype=torch.int64, device=self.device)]
        return self.logits(hidden)

    @property
    def grows_trees(self) -> bool:
        """Whether `grow_trees` is there: with the native kernels."""
        return self._draft_loop is not None

    def grow_trees(self, cache: KVCache, sequences: Sequence[DraftSequence]) -> list[GrownTree]:
        """Compute the sequences' pending tokens and grow a tree below the last of each, in one call."""
        assert self._draft_loop is not None, "ask grows_trees first"
        return self._draft_loop.grow(cache.data, BLOCK_SIZE, sequences)

    def _native_decoder(self) -> NativeDecoder | None:
        """All layers in one call, where all of them are native."""
        pairs = list(zip(self._attention, self._mlp, strict=True))
        blocks = [(a, m) for a, m in pairs if isinstance(a, NativeAttentionBlock) and isinstance(m, NativeMlpBlock)]
        if len(blocks) < len(pairs) or not isinstance(self._head, NativeLinear):
            return None
        norm, epsilon = self._final_norm, self.config.norm_epsilon
        return NativeDecoder(blocks, norm, epsilon, self._head, self._embedding, self._cos, self._sin)

    def compact(self, cache: KVCache, sources: list[int], targets: list[int]) -> None:
        """Move the entries in slots `sources` to slots `targets`, in all layers, as if all were read first."""
        if sources:
            self.backend.kv_compaction(cache.data, sources, targets)


def pack_layers(
    config: ModelConfig, layers: Iterable[LayerWeights], backend: Backend
) -> tuple[list[AttentionBlock], list[MlpBlock]]:
    """Both halves of each layer in the backend's own layout; config: of the part that the layers are."""
    attention: list[AttentionBlock] = []
    mlp: list[MlpBlock] = []
    for layer in layers:
        attention.append(backend.pack_attention(_attention_weights(config, layer)))
        mlp.append(backend.pack_mlp(_mlp_weights(config, layer)))
    return attention, mlp


def attention_rows(batch: FlatBatch, cos: torch.Tensor, sin: torch.Tensor) -> AttentionBatch:
    """The batch as every layer's attention sees it; cos, sin: of `rotary_tables`."""
    return AttentionBatch(
        block_tables=batch.block_tables,
        block_size=BLOCK_SIZE,
        row_sequences=batch.row_sequences,
        prefix_lengths=batch.prefix_lengths,
        masks=batch.masks,
        slots=batch.slots,
        cos=cos[batch.positions],
        sin=sin[batch.positions],
    )


def _attention_weights(config: ModelConfig, layer: LayerWeights) -> AttentionWeights:
    return AttentionWeights(
        norm=layer.input_norm,
        qkv=layer.qkv,
        output=layer.output,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        norm_eps=config.norm_epsilon,
        qkv_bias=layer.qkv_bias,
        output_bias=layer.output_bias,
        query_norm=layer.query_norm,
        key_norm=layer.key_norm,
    )


def _mlp_weights(config: ModelConfig, layer: LayerWeights) -> MlpWeights:
    return MlpWeights(
        norm=layer.post_attention_norm, gate_up=layer.gate_up, down=layer.down, norm_eps=config.norm_epsilon
    )


def rotary_tables(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position times frequency, float32 [context, head_dim / 2]."""
    positions = torch.arange(config.context_length, dtype=torch.float32)
    angles = torch.outer(positions, torch.tensor(inverse_frequencies(config), dtype=torch.float32))
    return angles.cos().to(device), angles.sin().to(device)
