"""One rank's part of a transformer, and the two ways to run it: rank 0 leads, the others follow.

A step is one broadcast of its plan, the exchanges within the model, and one broadcast of the paths that rank 0 accepts,
where they leave KV to move. All ranks move it while rank 0 reports, plans and drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kernels.backend import Backend, choose_backend
from runtime.batch import FlatBatch, Segment
from runtime.config import ModelConfig, read_config
from runtime.kv_cache import KVCache, blocks_for_cache
from runtime.parallel.group import Group
from runtime.parallel.orders import AcceptedPaths, StepPlan, unpack
from runtime.parallel.sharding import Shard
from runtime.transformer import LoadOptions, attention_rows, pack_layers, rotary_tables
from runtime.weights import EndWeights, WeightLoader


class RankModel:
    """The layers and heads of one rank, and its part of the vocabulary in the first stage. See Transformer."""

    def __init__(self, shard: Shard, loader: WeightLoader, backend: Backend, group: Group, dtype: torch.dtype) -> None:
        self.shard = shard
        self.backend = backend
        self.device = group.device
        self.weight_dtype = torch.int8 if backend.int8 else dtype
        self.activation_dtype = backend.activation_dtype(dtype)
        self.kv_dtype = backend.kv_dtype(dtype)
        self._group = group
        self._ends = _Ends(shard, loader.ends(), backend, group) if shard.is_first_stage else None
        self._attention, self._mlp = pack_layers(shard.local, loader.layers(), backend)
        self._cos, self._sin = rotary_tables(shard.config, self.device)

    @property
    def config(self) -> ModelConfig:
        return self.shard.config

    @classmethod
    def load(cls, folder: Path, options: LoadOptions, group: Group) -> RankModel:
        """Load this rank's part of a Hugging Face folder.

        Raises:
            UnsupportedModel, BackendUnavailable: as Transformer.load. UnsupportedDegrees: it does not divide so.
            GroupFailed: the ranks do not have the same model, kernels or types.
        """
        shard = Shard(read_config(folder), group.degrees, group.rank)
        backend = choose_backend(group.device, options.kernels, int8=options.dtype == "int8")
        loader = options.weight_loader(folder, shard)
        weights = f"{loader.dtype}, int8 {backend.int8}"
        group.check_same({"model": repr(shard.config), "weights": weights, "kernels": backend.name})
        with torch.inference_mode():
            return cls(shard, loader, backend, group, loader.dtype)

    def new_cache(self, memory_fraction: float, max_sequences: int, blocks: int = 0) -> KVCache:
        """See Transformer.new_cache; as many blocks as the rank with the least memory has, on every rank."""
        local, dtype = self.shard.local, self.kv_dtype
        share = memory_fraction if self.device.type == "cuda" else memory_fraction / self._group.place.local_ranks
        own = blocks_for_cache(local, self.device, dtype, share, max_sequences, blocks)
        return KVCache(local, self._group.minimum(own), self.device, dtype)

    @torch.inference_mode()
    def run(self, plan: StepPlan, cache: KVCache) -> torch.Tensor | None:
        """This rank's part of a step: the logits of the plan's rows on rank 0, None on the others."""
        with self._group.activity.computing():
            plan = plan.to(self.device)
            hidden = self._layers(plan.batch, cache)
            if self.shard.is_last_stage:
                hidden = hidden[plan.rows]
            if self.shard.degrees.pipeline > 1:
                hidden = self._close_the_ring(hidden, len(plan.rows))
            logits = None if self._ends is None else self._ends.logits(hidden)
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # a device that hangs must be seen in the time of its step
            return logits

    @torch.inference_mode()
    def keep(self, paths: AcceptedPaths, cache: KVCache) -> None:
        """Move the KV of accepted paths in this rank's cache. A device that hangs is seen in the next step."""
        with self._group.activity.computing():
            self.backend.kv_compaction(cache.data, *paths.moves.tolist())

    def _layers(self, batch: FlatBatch, cache: KVCache) -> torch.Tensor:
        """The hidden states behind the stage's layers, [rows, hidden]."""
        group, shard = self._group, self.shard
        if self._ends is not None:
            hidden = self._ends.embed(batch.token_ids).to(self.activation_dtype)
        else:
            size = (len(batch.token_ids), self.config.hidden_size)
            hidden = group.receive(size, self.activation_dtype, shard.stage - 1)
        rows = attention_rows(batch, self._cos, self._sin)
        whole = shard.degrees.tensor == 1
        for layer, (attention, mlp) in enumerate(zip(self._attention, self._mlp, strict=True)):
            if whole:
                hidden = attention(hidden, cache.data[layer], rows, residual=True)
                hidden = mlp(hidden, residual=True)
            else:
                hidden = hidden + group.sum_in_stage(attention(hidden, cache.data[layer], rows))
                hidden = hidden + group.sum_in_stage(mlp(hidden))
        if not shard.is_last_stage:
            group.send(hidden, shard.stage + 1)
        return hidden

    def _close_the_ring(self, hidden: torch.Tensor, wanted: int) -> torch.Tensor:
        """Move the last stage's hidden states, of the rows whose logits are wanted, to the first stage."""
        group, last = self._group, self.shard.degrees.pipeline - 1
        if wanted and self.shard.is_last_stage:
            group.send(hidden, 0)
        if not self.shard.is_first_stage:
            return hidden
        size = (wanted, self.config.hidden_size)
        return group.receive(size, self.activation_dtype, last) if wanted else hidden[:0]


class _Ends:
    """Embedding, final norm and head over a rank's part of the vocabulary."""

    def __init__(self, shard: Shard, weights: EndWeights, backend: Backend, group: Group) -> None:
        self._shard = shard
        self._backend = backend
        self._group = group
        self._embedding = weights.embedding
        self._final_norm = weights.final_norm.to(backend.activation_dtype(weights.embedding.dtype))
        self._head = backend.pack_head(weights.head)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._shard.degrees.tensor == 1:
            return self._embedding[token_ids]
        own = self._shard.vocabulary
        elsewhere = (token_ids < own.start) | (token_ids >= own.stop)
        # A token's row is zero on every rank but one, so that the sum is that row.
        rows = self._embedding[(token_ids - own.start).masked_fill(elsewhere, 0)].masked_fill(elsewhere[:, None], 0)
        return self._group.sum_in_stage(rows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """float32 [rows, vocab] on rank 0."""
        config = self._shard.config
        if not len(hidden):
            return hidden.new_empty(0, config.vocab_size, dtype=torch.float32)
        normed = self._backend.rms_norm(hidden, self._final_norm, config.norm_epsilon)
        logits = self._group.gather_vocabulary(self._head(normed), self._shard.vocabulary_part)
        return None if logits is None else logits[:, : config.vocab_size].contiguous()


class LeadingModel:
    """Rank 0's model: a `StepModel` whose every step all ranks take together."""

    argmax = None

    def __init__(self, own: RankModel, group: Group) -> None:
        self._own = own
        self._group = group

    @property
    def config(self) -> ModelConfig:
        return self._own.config

    @property
    def backend(self) -> Backend:
        return self._own.backend

    @property
    def device(self) -> torch.device:
        return self._own.device

    @property
    def weight_dtype(self) -> torch.dtype:
        return self._own.weight_dtype

    def new_cache(self, memory_fraction: float, max_sequences: int, blocks: int = 0) -> KVCache:
        return self._own.new_cache(memory_fraction, max_sequences, blocks)

    def prepare_steps(self, sequences: int) -> int:
        """See StepModel.prepare_steps; the steps of a group are not captured."""
        return 0

    def step(self, segments: Sequence[Segment], rows: Sequence[int], cache: KVCache) -> torch.Tensor:
        """See StepModel.step. Raises GroupFailed: no step can follow."""
        batch = FlatBatch.of(segments, torch.device("cpu"))
        plan = StepPlan(batch, torch.tensor(rows, dtype=torch.int64))
        with self._group.lockstep():
            self._group.orders.send(plan.pack())
            logits = self._own.run(plan, cache)
        assert logits is not None, "rank 0 has the logits"
        return logits

    def compact(self, cache: KVCache, sources: list[int], targets: list[int]) -> None:
        """See StepModel.compact. Raises GroupFailed: no step can follow."""
        if not sources:
            return
        paths = AcceptedPaths(torch.tensor([sources, targets], dtype=torch.int64))
        with self._group.lockstep():
            self._group.orders.send(paths.pack())
            self._own.keep(paths, cache)


def follow(model: RankModel, cache: KVCache, group: Group) -> None:
    """The life of every rank but 0: take part in steps until rank 0 ends them.

    Raises:
        GroupFailed: the group cannot go on.
    """
    with group.lockstep():
        while (packed := group.orders.receive()) is not None:
            order = unpack(packed)
            if isinstance(order, StepPlan):
                model.run(order, cache)
            else:
                model.keep(order, cache)
