"""Which part of a model a rank holds: Megatron's sharding (Shoeybi et al., 2019) in stages of consecutive layers.

rank = stage * tensor + tensor_rank. Within a stage the query, key, value, gate and up projections are split by outputs,
the output and down projections by inputs, embedding and head by vocabulary. Embedding, final norm and head belong to
the first stage, so that tied ones are one tensor and logits arise beside rank 0; the last stage sends hidden states
back to it. Knows nothing of processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from runtime.config import ModelConfig, UnsupportedModel


class UnsupportedDegrees(UnsupportedModel):
    """The model does not divide among so many ranks; the message names the degrees that it has."""


@dataclass(frozen=True)
class Degrees:
    """tensor: ranks that share each layer. pipeline: stages that share the layers."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline

    def check(self, config: ModelConfig) -> None:
        """Raise UnsupportedDegrees unless the model divides among these ranks."""
        if self.tensor not in (possible := tensor_degrees(config)):
            raise UnsupportedDegrees(
                f"tensor_parallel is {self.tensor}; a model of {config.heads} heads, {config.kv_heads} KV heads and "
                f"{config.intermediate_size} intermediate units divides by {_listed(possible)}"
            )
        if not 1 <= self.pipeline <= config.layers:
            raise UnsupportedDegrees(
                f"pipeline_parallel is {self.pipeline}; {config.layers} layers have 1 to {config.layers} stages"
            )


def tensor_degrees(config: ModelConfig) -> tuple[int, ...]:
    """The degrees that divide a model; KV heads are divided or, where they are fewer than the ranks, repeated."""

    def divides(ranks: int) -> bool:
        kv_fit = config.kv_heads % ranks == 0 or ranks % config.kv_heads == 0
        return kv_fit and config.heads % ranks == 0 and config.intermediate_size % ranks == 0

    return tuple(ranks for ranks in range(1, config.heads + 1) if divides(ranks))


def _listed(numbers: tuple[int, ...]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True)
class Shard:
    """One rank's part of a model; every range counts what the whole model has.

    Raises:
        UnsupportedDegrees: the model does not divide so.
    """

    config: ModelConfig
    degrees: Degrees
    rank: int

    def __post_init__(self) -> None:
        self.degrees.check(self.config)

    @property
    def stage(self) -> int:
        return self.rank // self.degrees.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.degrees.tensor

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.degrees.pipeline - 1

    @cached_property
    def layers(self) -> range:
        ends = _stage_ends(self.config, self.degrees.pipeline)
        return range(ends[self.stage - 1] if self.stage else 0, ends[self.stage])

    @property
    def heads(self) -> range:
        return self._part(self.config.heads)

    @property
    def kv_heads(self) -> range:
        if self.config.kv_heads >= self.degrees.tensor:
            return self._part(self.config.kv_heads)
        # The rank's query heads all belong to one KV head, because the ranks are a multiple of the KV heads.
        shared = self.tensor_rank * self.config.kv_heads // self.degrees.tensor
        return range(shared, shared + 1)

    @property
    def intermediate(self) -> range:
        return self._part(self.config.intermediate_size)

    @property
    def vocabulary_part(self) -> int:
        """Tokens of each rank but the last, which has the rest."""
        return -(-self.config.vocab_size // self.degrees.tensor)

    @property
    def vocabulary(self) -> range:
        start = min(self.tensor_rank * self.vocabulary_part, self.config.vocab_size)
        return range(start, min(start + self.vocabulary_part, self.config.vocab_size))

    @cached_property
    def local(self) -> ModelConfig:
        """The shape of what this rank computes and caches; vocabulary and hidden size are the whole model's."""
        return replace(
            self.config,
            layers=len(self.layers),
            heads=len(self.heads),
            kv_heads=len(self.kv_heads),
            intermediate_size=len(self.intermediate),
        )

    def _part(self, count: int) -> range:
        size = count // self.degrees.tensor
        return range(self.tensor_rank * size, (self.tensor_rank + 1) * size)


def _stage_ends(config: ModelConfig, stages: int) -> list[int]:
    """Behind its last layer, for each stage; the largest stage has as few weights as can be.

    The first stage also holds embedding and head, and therefore fewer layers; the others share theirs evenly.
    """
    if stages == 1:
        return [config.layers]

    def largest(first: int) -> tuple[int, int, int]:
        others = -(-(config.layers - first) // (stages - 1))
        return (
            max(first * config.layer_parameters + config.end_parameters, others * config.layer_parameters),
            others,
            -first,
        )

    first = min(range(1, config.layers - stages + 2), key=largest)
    others = config.layers - first
    return [first + others * stage // (stages - 1) for stage in range(stages)]
