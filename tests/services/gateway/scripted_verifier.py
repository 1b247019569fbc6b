"""A verifier that says what it is told to: a real gRPC server without a model.

python -m tests.services.gateway.scripted_verifier PORT FACTS REPLY DELAY   (FACTS and REPLY in JSON)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace

from protos import tree_pb2, verifier_pb2, verifier_pb2_grpc
from services.common.grpc_setup import Endpoint, aio_server, serving_grpc
from services.common.lifecycle import Lifecycle
from services.common.model_facts import ModelFacts
from services.common.tls import INSECURE, Security
from services.verifier.outbox import Outbox
from services.verifier.request import EngineStopped, FinishReason, GenerationRequest, Sink, StepOutput, TokenLogprob
from services.verifier.servicer import SERVICE, UNCOUNTED, Servicer


@dataclass(frozen=True)
class Facts:
    """What it says of its model."""

    tokenizer_hash: str
    model: str = "scripted"
    vocab_size: int = 512
    context_length: int = 256
    eos_token_ids: tuple[int, ...] = (0,)


@dataclass
class Script:
    """What it does.

    reply: the tokens of a request, whatever was generated before; they end with the first stop token.
    step_size: tokens of each step. delay_s: before each step.
    refuse: the answer to the n-th request, counted from 0, if it is refused.
    failure: what a sequence ends with in place of its last step.
    broken: whether a step has log-probabilities for other tokens than its own.
    lost_after: a sequence fails as in a stopping verifier once so many tokens are out, `losses` times, each
    `loss_distance` later.
    """

    reply: Callable[[GenerationRequest], Sequence[int]]
    step_size: int = 1
    delay_s: float = 0.0
    refuse: Callable[[int], Exception | None] = lambda request: None
    failure: Exception | None = None
    broken: bool = False
    lost_after: int = 0
    losses: int = 0
    loss_distance: int = 0
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: dict[str, threading.Event] = field(default_factory=dict)


class ScriptedEngine:
    """Plays a script, each sequence in a task of its own."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self._ids = itertools.count(1)
        self._playing: dict[int, tuple[str, asyncio.Task[None]]] = {}

    def submit(self, request: GenerationRequest, sink: Sink) -> int:
        script = self.script
        script.requests.append(request)
        script.cancelled[request.request_id] = threading.Event()
        if (refusal := script.refuse(len(script.requests) - 1)) is not None:
            raise refusal
        sequence_id = next(self._ids)
        self._playing[sequence_id] = request.request_id, asyncio.ensure_future(self._play(request, sink))
        return sequence_id

    def cancel(self, sequence_id: int) -> None:
        request_id, task = self._playing[sequence_id]
        if task.cancel():
            self.script.cancelled[request_id].set()

    async def _play(self, request: GenerationRequest, sink: Sink) -> None:
        try:
            async for output in self._outputs(request):
                sink(output)
        except Exception as error:  # noqa: BLE001  # what the script says that the sequence ends with
            sink(error)

    async def _outputs(self, request: GenerationRequest) -> AsyncIterator[StepOutput]:
        script = self.script
        done = len(request.generated)
        reply = list(script.reply(request))[: request.max_new_tokens]
        ends = [i for i, token in enumerate(reply) if token in request.stop_token_ids]
        reply = reply[: ends[0] + 1] if ends else reply
        if not reply:
            yield StepOutput((), 0, (), _prompt_logprobs(request), FinishReason.LENGTH)
            return
        steps = 0
        while done < len(reply):
            await asyncio.sleep(script.delay_s)
            if script.losses and done >= script.lost_after:
                script.losses -= 1
                script.lost_after += script.loss_distance
                raise EngineStopped("scripted loss")
            token_ids = tuple(reply[done : done + script.step_size])
            first, done, steps = done == 0, done + len(token_ids), steps + 1
            last = done == len(reply)
            if last and script.failure is not None:
                raise script.failure
            reported = (*token_ids, 0) if script.broken else token_ids if request.top_logprobs is not None else ()
            yield StepOutput(
                token_ids,
                steps,
                logprobs=tuple(_logprob(request) for _ in reported),
                prompt_logprobs=_prompt_logprobs(request) if first else (),
                finish_reason=(FinishReason.STOP if ends else FinishReason.LENGTH) if last else None,
            )


def _prompt_logprobs(request: GenerationRequest) -> tuple[TokenLogprob, ...]:
    return tuple(_logprob(request) for _ in request.prompt[1:] if request.prompt_logprobs)


def _logprob(request: GenerationRequest) -> TokenLogprob:
    """The token is the second most likely one, at -1.5; token 100 + i is the i-th, at -1 - i / 2."""
    others = range(request.top_logprobs or 0)
    return TokenLogprob(-1.5, tuple(100 + i for i in others), tuple(-1 - i / 2 for i in others))


@dataclass
class ScriptedVerifier:
    """What it says of its model, which a test may change, and what it does. streams: how many were opened."""

    facts: Facts
    script: Script
    streams: int = 0


class _Servicer(Servicer):
    """The verifier's own calls before a scripted engine."""

    def __init__(self, verifier: ScriptedVerifier, lifecycle: Lifecycle) -> None:
        outbox = Outbox(asyncio.get_running_loop())
        super().__init__(ScriptedEngine(verifier.script), ModelFacts("", 0, 0, ""), outbox, lifecycle)
        self._verifier = verifier

    async def GetModelInfo(self, request: tree_pb2.ModelInfoRequest, context: object) -> tree_pb2.ModelInfo:
        facts = asdict(self._verifier.facts)
        return ModelFacts(**facts, device="cpu", dtype="float32", kernels="torch").to_wire()

    async def Generate(
        self, request_iterator: AsyncIterator[verifier_pb2.GenerateRequest], context: object
    ) -> AsyncGenerator[verifier_pb2.GenerateResponse, None]:
        self._verifier.streams += 1
        async with aclosing(super().Generate(request_iterator, context)) as responses:
            async for response in responses:
                yield response


@asynccontextmanager
async def running(
    verifier: ScriptedVerifier, port: int = 0, security: Security = INSECURE, host: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """The verifier as a gRPC server on loopback; yields the port."""
    lifecycle = Lifecycle()
    server = aio_server(lifecycle, UNCOUNTED)
    verifier_pb2_grpc.add_VerifierServicer_to_server(_Servicer(verifier, lifecycle), server)
    endpoint = Endpoint(host, port)
    async with serving_grpc(server, lifecycle, endpoint, security, (SERVICE,)) as bound:
        yield bound


async def _main(port: int, facts: Facts, reply: Sequence[int], delay_s: float) -> None:
    async with running(ScriptedVerifier(facts, Script(lambda request: reply, delay_s=delay_s)), port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    _, _port, _facts, _reply, _delay = sys.argv
    with contextlib.suppress(KeyboardInterrupt):
        _given = Facts(**json.loads(_facts))
        _given = replace(_given, eos_token_ids=tuple(_given.eos_token_ids))
        asyncio.run(_main(int(_port), _given, json.loads(_reply), float(_delay)))
