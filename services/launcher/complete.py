"""`specserve complete`: a prompt in the terminal, its completion as it comes, and what it cost."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True)
class CompletionOptions:
    """The request; model None asks the server for its first one. api_key: for a server that asks for one."""

    url: str
    model: str | None
    max_tokens: int
    temperature: float
    seed: int | None
    timeout_s: float
    api_key: str | None = field(default=None, repr=False)


class CompletionError(Exception):
    """The completion failed; the message is one line for the user."""


@dataclass(frozen=True)
class Cost:
    """tokens: generated. llm_steps: of the large model, not counting the prompt's. Times: seconds from the request."""

    tokens: int
    llm_steps: int
    first_text_s: float
    total_s: float

    def summary(self) -> str:
        parts = [f"{self.tokens} tokens"]
        if self.llm_steps:
            parts.append(f"{self.llm_steps} LLM steps ({self.tokens / self.llm_steps:.2f} tokens/step)")
        parts.append(f"first text after {1000 * self.first_text_s:.0f} ms")
        if self.tokens:
            parts.append(f"{1000 * self.total_s / self.tokens:.1f} ms/token in all")
        return ", ".join(parts)


def complete(prompt: str, options: CompletionOptions) -> int:
    """Writes the completion to stdout as it comes and its cost to stderr; returns the exit code."""
    try:
        headers = {} if options.api_key is None else {"authorization": f"Bearer {options.api_key}"}
        with httpx.Client(base_url=options.url, timeout=options.timeout_s, headers=headers) as client:
            cost = _stream(client, prompt, options)
    except CompletionError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except httpx.ConnectError:
        print(f"error: nothing answers at {options.url}; start it with `specserve up`, or give --url", file=sys.stderr)
        return 1
    except httpx.HTTPError as error:
        print(f"\nerror: {options.url}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"\n\n{cost.summary()}", file=sys.stderr)
    return 0


def _stream(client: httpx.Client, prompt: str, options: CompletionOptions) -> Cost:
    body: dict[str, Any] = {
        "model": options.model or _first_model(client),
        "prompt": prompt,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.seed is not None:
        body["seed"] = options.seed
    started = time.perf_counter()
    first_text_s = 0.0
    usage: dict[str, Any] = {}
    with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            response.read()
            raise CompletionError(_message(response))
        for event in _events(response):
            if "error" in event:
                raise CompletionError(event["error"]["message"])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                first_text_s = first_text_s or time.perf_counter() - started
                print(choice["text"], end="", flush=True)
    total_s = time.perf_counter() - started
    return Cost(usage.get("completion_tokens", 0), usage.get("llm_steps", 0), first_text_s, total_s)


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise CompletionError("the server ended the stream before its end")


def _first_model(client: httpx.Client) -> str:
    response = client.get("/v1/models")
    if response.is_error:
        raise CompletionError(_message(response))
    return str(response.json()["data"][0]["id"])


def _message(response: httpx.Response) -> str:
    try:
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code}: {response.text[:200]}"
