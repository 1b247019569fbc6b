"""Failures as OpenAI's clients know them: an HTTP status and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from services.gateway.generation import (
    ModelMismatch,
    VerifierBusy,
    VerifierError,
    VerifierRefused,
    VerifierUnavailable,
)

RETRY_AFTER_S = 1


class ApiError(Exception):
    """What the client gets instead of a completion.

    retry_after_s: when it makes sense to try again; sent as the header `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> Mapping[str, str]:
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        special = {401: {"www-authenticate": "Bearer"}, 413: {"connection": "close"}}
        return headers | special.get(self.status, {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON object of OpenAI's API."""
        return {"error": {"message": self.message, "type": self._type(), "param": self.param, "code": self.code}}

    def _type(self) -> str:
        match self.status:
            case 429:
                return "rate_limit_error"
            case status if status >= 500:
                return "server_error"
            case _:
                return "invalid_request_error"


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong in itself."""
    return ApiError(400, message, param=param, code=code)


def from_verifier(error: VerifierError) -> ApiError:
    """The client's view of a failed verifier call."""
    message = str(error)
    match error:
        case VerifierBusy():
            seconds = max(1, math.ceil(error.retry_after_ms / 1000))
            return ApiError(429, message, code="queue_full", retry_after_s=seconds)
        case VerifierRefused():
            return ApiError(400, message, code="refused")
        case VerifierUnavailable():
            return ApiError(503, message, code="verifier_unavailable", retry_after_s=RETRY_AFTER_S)
        case ModelMismatch():
            return ApiError(503, message, code="model_mismatch")
        case _:
            return ApiError(502, message, code="verifier_failed")
