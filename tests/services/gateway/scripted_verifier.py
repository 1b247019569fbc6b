"""A verifier that says what it is told to: a real gRPC server without a model.

python -m tests.services.gateway.scripted_verifier PORT FACTS REPLY DELAY   (FACTS and REPLY in JSON)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace

import grpc
import grpc.aio

from protos import tree_pb2, verifier_pb2, verifier_pb2_grpc
from services.common.grpc_setup import Endpoint, StatusError, aio_server, serving_grpc
from services.common.lifecycle import Lifecycle
from services.common.tls import INSECURE, Security

Request = verifier_pb2.GenerateRequest
Response = verifier_pb2.GenerateResponse
Context = grpc.aio.ServicerContext[Request, Response]


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
    announce: whether admission is announced before the first token.
    refuse: the answer to the n-th call, counted from 0, if it is refused.
    failure: what a call ends with in place of its last step. finish: whether the last step has a finish reason.
    lost_after: the call fails as UNAVAILABLE once so many tokens are out, `losses` times, each `loss_distance` later.
    """

    reply: Callable[[Request], Sequence[int]]
    step_size: int = 1
    delay_s: float = 0.0
    announce: bool = True
    refuse: Callable[[int], StatusError | None] = lambda call: None
    failure: StatusError | None = None
    finish: bool = True
    lost_after: int = 0
    losses: int = 0
    loss_distance: int = 0
    requests: list[Request] = field(default_factory=list)
    cancelled: dict[str, threading.Event] = field(default_factory=dict)


class ScriptedVerifier(verifier_pb2_grpc.VerifierServicer):
    """Plays a script."""

    def __init__(self, facts: Facts, script: Script) -> None:
        self.facts = facts
        self.script = script

    async def GetModelInfo(self, request: tree_pb2.ModelInfoRequest, context: object) -> tree_pb2.ModelInfo:
        return tree_pb2.ModelInfo(**asdict(self.facts), device="cpu", dtype="float32", kernels="torch")

    async def Generate(self, request: Request, context: Context) -> AsyncIterator[Response]:
        script = self.script
        script.requests.append(request)
        script.cancelled[request.request_id] = threading.Event()
        if (refusal := script.refuse(len(script.requests) - 1)) is not None:
            raise refusal
        if script.announce:
            await context.send_initial_metadata((("specserve-admitted", "1"),))
        try:
            async for response in self._responses(request):
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            script.cancelled[request.request_id].set()
            raise

    async def _responses(self, request: Request) -> AsyncIterator[Response]:
        script = self.script
        done = len(request.generated_token_ids)
        reply = list(script.reply(request))[: request.max_new_tokens]
        ends = [i for i, token in enumerate(reply) if token in request.stop_token_ids]
        reply = reply[: ends[0] + 1] if ends else reply
        if not reply:
            yield Response(prompt_logprobs=_prompt_logprobs(request), finish_reason=verifier_pb2.FINISH_REASON_LENGTH)
            return
        steps = 0
        while done < len(reply):
            await asyncio.sleep(script.delay_s)
            if script.losses and done >= script.lost_after:
                script.losses -= 1
                script.lost_after += script.loss_distance
                raise StatusError(grpc.StatusCode.UNAVAILABLE, "scripted loss")
            token_ids = reply[done : done + script.step_size]
            first, done, steps = done == 0, done + len(token_ids), steps + 1
            finish = verifier_pb2.FINISH_REASON_UNSPECIFIED
            if done == len(reply) and script.failure is not None:
                raise script.failure
            if done == len(reply) and script.finish:
                finish = verifier_pb2.FINISH_REASON_STOP if ends else verifier_pb2.FINISH_REASON_LENGTH
            yield Response(
                token_ids=token_ids,
                logprobs=[_logprob(token, request) for token in token_ids if request.HasField("top_logprobs")],
                prompt_logprobs=_prompt_logprobs(request) if first else [],
                finish_reason=finish,
                llm_steps=steps,
            )


def _prompt_logprobs(request: Request) -> list[verifier_pb2.TokenLogprob]:
    return [_logprob(token, request) for token in request.prompt_token_ids[1:] if request.prompt_logprobs]


def _logprob(token: int, request: Request) -> verifier_pb2.TokenLogprob:
    """The token is the second most likely one, at -1.5; token 100 + i is the i-th, at -1 - i / 2."""
    others = [100 + i for i in range(request.top_logprobs)]
    return verifier_pb2.TokenLogprob(
        logprob=-1.5, top_token_ids=others, top_logprobs=[-1 - i / 2 for i in range(len(others))]
    )


@asynccontextmanager
async def running(
    servicer: ScriptedVerifier, port: int = 0, security: Security = INSECURE, host: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """The verifier as a gRPC server on loopback; yields the port."""
    lifecycle = Lifecycle()
    server = aio_server(lifecycle)
    verifier_pb2_grpc.add_VerifierServicer_to_server(servicer, server)
    endpoint = Endpoint(host, port)
    async with serving_grpc(server, lifecycle, endpoint, security, ("specserve.v1.Verifier",)) as bound:
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
