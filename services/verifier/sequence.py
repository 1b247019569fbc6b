"""A sequence on its way through the engine."""

from __future__ import annotations

from runtime.kv_cache import CachedSequence
from services.verifier.request import FinishReason, GenerationRequest, Sink, TokenLogprob
from speculation.logits import LogitsPipeline


class Sequence:
    """The tokens of one request and where its computation stands. Only the engine's thread touches it.

    tokens: prompt and output. The last one is the root of the next tree: its key and value are not in the cache.
    cache: KV entries 0..cache.length-1 belong to tokens[:cache.length]; when they are all but the last, it decodes.
    """

    def __init__(self, sequence_id: int, request: GenerationRequest, sink: Sink, pipeline: LogitsPipeline) -> None:
        self.id = sequence_id
        self.request = request
        self.sink = sink
        self.pipeline = pipeline
        pipeline.advance(request.generated)
        self.tokens: list[int] = [*request.prompt, *request.generated]
        self.cache = CachedSequence()
        self.finish_reason: FinishReason | None = None
        self.llm_steps = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        self.prompt_logprobs_sent = not request.prompt_logprobs

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """How many tokens may still be generated."""
        return self.request.max_new_tokens - self.generated

    @property
    def wants_drafts(self) -> bool:
        """Whether drafts are of use to it, from its next token but one on."""
        return self.request.speculative and self.remaining > 2

    @property
    def uncomputed(self) -> int:
        """Tokens before the root whose KV is missing."""
        return len(self.tokens) - 1 - self.cache.length

    def append(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Add accepted tokens up to a stop token or the limit; set the finish reason; return those added."""
        kept = token_ids[: self.remaining]
        stop = next((i for i, token_id in enumerate(kept) if token_id in self.request.stop_token_ids), None)
        if stop is not None:
            kept = kept[: stop + 1]
            self.finish_reason = FinishReason.STOP
        self.tokens.extend(kept)
        self.pipeline.advance(kept)
        if self.finish_reason is None and self.remaining == 0:
            self.finish_reason = FinishReason.LENGTH
        return kept
