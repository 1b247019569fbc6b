"""What two services must agree on before they work together, and the refusal when they do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from protos import tree_pb2

TOKENIZER_METADATA = "specserve-tokenizer"
"""Key of the metadata with which a verifier opens a Speculate stream: ModelFacts.tokenizer_identity."""


class ModelMismatch(RuntimeError):
    """Two services serve models whose tokens mean different things; the message has both values."""


@dataclass(frozen=True)
class ModelFacts:
    """A service's model, as `ModelInfo` carries it; the fields are explained there."""

    model: str
    vocab_size: int
    context_length: int
    tokenizer_hash: str
    eos_token_ids: tuple[int, ...] = ()
    device: str = ""
    dtype: str = ""
    kernels: str = ""
    parameters: int = 0

    def to_wire(self) -> tree_pb2.ModelInfo:
        return tree_pb2.ModelInfo(**asdict(self))

    @classmethod
    def from_wire(cls, message: tree_pb2.ModelInfo) -> ModelFacts:
        return cls(
            model=message.model,
            vocab_size=message.vocab_size,
            context_length=message.context_length,
            tokenizer_hash=message.tokenizer_hash,
            eos_token_ids=tuple(message.eos_token_ids),
            device=message.device,
            dtype=message.dtype,
            kernels=message.kernels,
            parameters=message.parameters,
        )

    @property
    def tokenizer_identity(self) -> str:
        """What two models must have in common for a token to mean the same."""
        return f"{self.vocab_size}:{self.tokenizer_hash}"

    def check_drafts_for(self, llm: ModelFacts) -> None:
        """Raise ModelMismatch unless this small model speaks the LLM's tokens."""
        if (self.vocab_size, self.tokenizer_hash) != (llm.vocab_size, llm.tokenizer_hash):
            raise ModelMismatch(
                f"SSM {self.model} has a vocabulary of {self.vocab_size} and tokenizer {self.tokenizer_hash[:12]}, but "
                f"LLM {llm.model} has {llm.vocab_size} and {llm.tokenizer_hash[:12]}; use one with the LLM's tokenizer"
            )
