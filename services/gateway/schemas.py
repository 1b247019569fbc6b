"""The completion request: its fields, their bounds, and what a client is told about a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import ErrorDetails

from services.gateway.errors import ApiError, invalid

Prompt = str | tuple[int, ...]

MAX_SHOWN = 80
MAX_STOPS = 4


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompts(value: object) -> tuple[Prompt, ...]:
    """One prompt or a batch, as a tuple of texts and token lists; ValueError for anything else or an empty one."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_integer, value))):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("wrong type")
    prompts: list[Prompt] = []
    for prompt in value:
        if isinstance(prompt, str):
            prompts.append(prompt)
        elif isinstance(prompt, list) and all(map(_is_integer, prompt)):
            prompts.append(tuple(prompt))
        else:
            raise ValueError("wrong type")
    if not all(prompts) or not prompts:
        raise ValueError("empty")
    return tuple(prompts)


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise ValueError("wrong type or too many")
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("not a non-empty string")
    return tuple(stops)


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal()):
            raise ValueError("key is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError("bias out of range")
    return {int(key): float(bias) for key, bias in value.items()}


class _Object(BaseModel):
    """An object whose null fields count as absent, as in OpenAI's API."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class StreamOptions(_Object):
    """How a stream is sent."""

    include_usage: bool = Field(False, description="true or false: send an event with the usage before the end")
    include_obfuscation: Literal[False] = Field(False, description="false: there is no padding of events")


class CompletionRequest(_Object):
    """Body of POST /v1/completions.

    Each field's description is what an error message says is allowed.
    """

    model: str = Field(description="the name of the served model, as in /v1/models")
    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts, json_schema_input_type=Any)] = Field(
        description="a non-empty string, a non-empty list of token ids, or a non-empty list of either"
    )
    max_tokens: int = Field(16, ge=0, le=2**31 - 1, description="an integer of at least 0")
    n: int = Field(1, ge=1, le=1024, description="an integer in 1..1024")
    best_of: int | None = Field(None, description="absent or equal to n: choices are not ranked")
    temperature: float = Field(1.0, ge=0, le=2, description="a number in 0..2")
    top_p: float = Field(1.0, ge=0, le=1, description="a number in 0..1")
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="an integer of at least 0; 0 is off")
    min_p: float = Field(0.0, ge=0, le=1, description="a number in 0..1")
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="a number in 0.01..100; 1 is off")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number in -2..2")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="a number in -2..2")
    logit_bias: Annotated[Mapping[int, float], PlainValidator(_logit_bias, json_schema_input_type=dict[str, float])] = (
        Field({}, description="an object from token ids (as strings) to numbers in -100..100")
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="a 64-bit integer")
    stop: Annotated[tuple[str, ...], PlainValidator(_stops, json_schema_input_type=str | list[str])] = Field(
        (), description=f"a non-empty string or a list of up to {MAX_STOPS} of them"
    )
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="an object, only together with stream: true")
    echo: bool = Field(False, description="true or false")
    logprobs: int | None = Field(None, ge=0, le=5, description="an integer in 0..5")
    speculative: bool = Field(True, description="true or false: whether drafts may be made; the text is the same")
    suffix: None = Field(None, description="absent: insertion before a suffix is not supported")
    user: str | None = Field(None, description="a string")

    @classmethod
    def parse(cls, body: object) -> CompletionRequest:
        """The request in a decoded JSON body; ApiError names the first field that is wrong."""
        if not isinstance(body, dict):
            raise invalid(f"the body is {_shown(body)}; it must be a JSON object")
        try:
            request = cls.model_validate(body)
        except ValidationError as error:
            raise _explain(error.errors(include_url=False)[0]) from error
        request._check_together()
        return request

    def _check_together(self) -> None:
        if self.best_of not in (None, self.n):
            raise _refused("best_of", self.best_of)
        if self.stream_options is not None and not self.stream:
            raise _refused("stream_options", self.stream_options.model_dump())
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens is 0; it must be at least 1, or echo must be true", "max_tokens")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def _refused(param: str, value: object) -> ApiError:
    allowed = CompletionRequest.model_fields[param].description
    return invalid(f"{param} is {_shown(value)}; allowed: {allowed}", param)


def _explain(error: ErrorDetails) -> ApiError:
    location = [str(part) for part in error["loc"]]
    path, field = ".".join(location[:2]), location[0]
    model: type[BaseModel] = CompletionRequest
    if field == "stream_options" and len(location) > 1:
        model, field = StreamOptions, location[1]
    if error["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields)
        return invalid(f"unknown field {path}; known fields: {known}", path, "unknown_parameter")
    allowed = model.model_fields[field].description
    if error["type"] == "missing":
        return invalid(f"{path} is missing; required: {allowed}", path, "missing_required_parameter")
    return invalid(f"{path} is {_shown(error['input'])}; allowed: {allowed}", path)
