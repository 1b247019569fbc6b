"""The JSON that a client gets, as OpenAI's API writes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from services.gateway.choice import Delta, TokenReport
from services.gateway.completions import Usage
from services.gateway.generation import ModelFacts
from services.gateway.plan import CompletionPlan

Json = dict[str, Any]

DONE_EVENT = b"data: [DONE]\n\n"


def to_json(value: object) -> bytes:
    """Compact UTF-8; a number that JSON cannot write (an infinite log-probability) is an error."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def event(value: object) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def system_fingerprint(facts: ModelFacts) -> str:
    """Changes whenever a seed may give another text: with the model, its tokenizer, or what computes it."""
    parts = [facts.model, facts.tokenizer_hash, facts.device, facts.dtype, facts.kernels]
    return "fp_" + hashlib.sha256(to_json(parts)).hexdigest()[:12]


def usage_object(usage: Usage) -> Json:
    """OpenAI's usage, and `llm_steps`: steps of the LLM that made the completion's tokens, over all choices."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "llm_steps": usage.llm_steps,
    }


class ResponseWriter:
    """Objects of one completion."""

    def __init__(self, plan: CompletionPlan, created: int) -> None:
        options = plan.request.stream_options
        self.include_usage = options is not None and options.include_usage
        self._with_logprobs = plan.request.logprobs is not None
        self._envelope: Json = {
            "id": plan.request_id,
            "object": "text_completion",
            "created": created,
            "model": plan.facts.model,
            "system_fingerprint": system_fingerprint(plan.facts),
        }

    def chunk(self, index: int, delta: Delta) -> Json:
        """One piece of one choice in a stream."""
        chunk = self._envelope | {"choices": [self._choice(index, [delta])]}
        return chunk | {"usage": None} if self.include_usage else chunk

    def usage_chunk(self, usage: Usage) -> Json:
        """The event behind the last choice of a stream."""
        return self._envelope | {"choices": [], "usage": usage_object(usage)}

    def response(self, choices: Sequence[Sequence[Delta]], usage: Usage) -> Json:
        """The whole completion; `choices` holds the pieces of each."""
        return self._envelope | {
            "choices": [self._choice(index, deltas) for index, deltas in enumerate(choices)],
            "usage": usage_object(usage),
        }

    def _choice(self, index: int, deltas: Sequence[Delta]) -> Json:
        reports = [report for delta in deltas for report in delta.reports]
        return {
            "text": "".join([delta.text for delta in deltas]),
            "index": index,
            "logprobs": _logprobs_object(reports) if self._with_logprobs else None,
            "finish_reason": deltas[-1].finish_reason,
        }


def _logprobs_object(reports: Sequence[TokenReport]) -> Json:
    return {
        "text_offset": [report.offset for report in reports],
        "token_logprobs": [report.logprob for report in reports],
        "tokens": [report.token for report in reports],
        "top_logprobs": [report.top for report in reports],
    }
