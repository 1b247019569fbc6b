"""Clients that time one stream: HTTP to an OpenAI server, gRPC straight to the verifier.

They share the machine with what they measure, so they only take times while the stream runs and parse afterwards.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc

from benchmarks.samples import Answer
from protos.tree_pb2 import ModelInfoRequest, SamplingParams
from protos.verifier_pb2 import BeginSequence, GenerateRequest, SequenceOutput
from protos.verifier_pb2_grpc import VerifierStub
from services.common.model_files import resolve_model
from services.gateway.detokenizer import Detokenizer
from services.gateway.tokenizer import GatewayTokenizer

TIMEOUT_S = 300.0
DATA = b"data: "
DONE = b"data: [DONE]"


class RequestFailed(RuntimeError):
    """The server refused or broke off a request; the message says why."""


Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Stream:
    """One streamed completion as it came.

    started: when the request was sent, on CLOCK_MONOTONIC. times: of each event, in seconds since then.
    """

    started: float
    times: list[float]
    events: list[dict[str, Any]]
    total_s: float

    @property
    def ended(self) -> float:
        """As `started`."""
        return self.started + self.total_s

    @property
    def token_times(self) -> list[float]:
        """Times of the events that brought text."""
        return [
            time
            for time, event in zip(self.times, self.events, strict=True)
            if any(choice["text"] for choice in event["choices"])
        ]

    def answer(self) -> Answer:
        """The completion.

        llm_steps: as the server tells; llama.cpp tells the accepted drafts, which needed no step of their own; vLLM
        tells nothing and sends an event for every step.
        """
        pieces = [choice["text"] for event in self.events for choice in event["choices"]]
        last = self.events[-1]
        usage, timings = last["usage"], last.get("timings")
        tokens = usage["completion_tokens"]
        steps = tokens - timings.get("draft_n_accepted", 0) if timings is not None else len(pieces)
        return Answer(
            text="".join(pieces),
            tokens=tokens,
            events=len(pieces),
            llm_steps=usage.get("llm_steps", steps),
            first_token_s=self.times[0],
            total_s=self.total_s,
        )


@dataclass(frozen=True)
class CompletionClient:
    """Streaming completions of one model at `url`, greedy ones unless `fields` of the requests say otherwise."""

    url: str
    model: str
    fields: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def connect(cls, url: str) -> CompletionClient:
        """A client of the first model that the server has.

        Raises:
            RequestFailed: the server does not tell.
        """
        with _connection(url) as connection:
            connection.request("GET", "/v1/models")
            return cls(url, str(json.loads(_ok(connection, url).read())["data"][0]["id"]))

    def complete(self, prompt: Prompt, new_tokens: int) -> Answer:
        """Stream one completion to its end; see stream()."""
        return self.stream(prompt, new_tokens).answer()

    def stream(self, prompt: Prompt, new_tokens: int) -> Stream:
        """Stream one completion.

        Raises:
            RequestFailed: no connection, an error status or event, or a stream without an end.
        """
        body = {
            "model": self.model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.fields,
        }
        with _connection(self.url) as connection:
            started = time.monotonic()
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            lines, times = _read_events(_ok(connection, self.url))
            total_s = time.monotonic() - started
        events = [json.loads(line[len(DATA) :]) for line in lines]
        if errors := [event["error"]["message"] for event in events if "error" in event]:
            raise RequestFailed(errors[0])
        return Stream(started, [moment - started for moment in times], events, total_s)


@contextmanager
def _connection(url: str) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    try:
        yield connection
    except (OSError, http.client.HTTPException) as error:
        raise RequestFailed(f"{url}: {error!r}") from error
    finally:
        connection.close()


def _ok(connection: http.client.HTTPConnection, url: str) -> http.client.HTTPResponse:
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise RequestFailed(f"{url} answered {response.status}: {response.read()[:500].decode()}")
    return response


def _read_events(response: http.client.HTTPResponse) -> tuple[list[bytes], list[float]]:
    lines: list[bytes] = []
    times: list[float] = []
    for line in response:
        if line.startswith(DONE):
            if not lines:
                raise RequestFailed("the stream ended without an event")
            return lines, times
        if line.startswith(DATA):
            times.append(time.monotonic())
            lines.append(line)
    raise RequestFailed("the server ended the stream before its end")


class VerifierClient:
    """Greedy completions straight from the verifier, with the gateway's tokenizer outside of the measured time."""

    def __init__(self, channel: grpc.Channel, llm: str) -> None:
        self._stub = VerifierStub(channel)
        self._tokenizer = GatewayTokenizer.from_folder(Path(resolve_model(llm)))
        self._stop = self._stub.GetModelInfo(ModelInfoRequest(), timeout=TIMEOUT_S).eos_token_ids

    def complete(self, prompt: Prompt, new_tokens: int) -> Answer:
        """Stream one completion.

        Raises:
            RequestFailed: the verifier is out of reach, or ended the call with an error.
        """
        sequence = BeginSequence(
            sequence_id=1,
            request_id="benchmark",
            prompt_token_ids=self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt,
            max_new_tokens=new_tokens,
            stop_token_ids=self._stop,
            sampling=SamplingParams(temperature=0, top_p=1, repetition_penalty=1),
        )
        started = time.monotonic()
        outputs, times = list[SequenceOutput](), list[float]()
        try:
            for response in self._stub.Generate(iter([GenerateRequest(begin=[sequence])]), timeout=TIMEOUT_S):
                times += [time.monotonic()] * len(response.outputs)
                outputs += response.outputs
                for failure in response.failures:
                    raise RequestFailed(f"the verifier failed: {failure.message}")
        except grpc.RpcError as error:
            raise RequestFailed(f"the verifier failed: {error}") from error
        total_s = time.monotonic() - started
        tokens = [token for output in outputs for token in output.token_ids]
        return Answer(
            text=self._text(sequence.prompt_token_ids, tokens),
            tokens=len(tokens),
            events=len(outputs),
            llm_steps=outputs[-1].llm_steps,
            first_token_s=times[0] - started,
            total_s=total_s,
        )

    def _text(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        detokenizer = Detokenizer(self._tokenizer)
        detokenizer.push_all(prompt)
        return detokenizer.push_all(tokens) + detokenizer.finish()
