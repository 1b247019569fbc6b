"""A verifier without a model: scripted tokens at a fixed pace, and when it sent each.

    python -m benchmarks.scripted_verifier --model models/default-llm --port 50051 --token 17 --interval-ms 20

A real gRPC server of the Verifier service, with the verifier's own streams. Writes one JSON object a request to
standard output when the request ends: its prompt and the CLOCK_MONOTONIC time, in seconds, at which each token was
handed over to be sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Annotated

import typer
import uvloop

from protos.verifier_pb2_grpc import add_VerifierServicer_to_server
from services.common.grpc_setup import Endpoint, aio_server, serving_grpc
from services.common.lifecycle import Lifecycle
from services.common.model_facts import ModelFacts
from services.common.model_files import resolve_model, tokenizer_hash
from services.common.tls import INSECURE
from services.verifier.outbox import Outbox
from services.verifier.request import FinishReason, GenerationRequest, Sink, StepOutput
from services.verifier.servicer import SERVICE, UNCOUNTED, Servicer


@dataclass
class ScriptedEngine:
    """Answers every request with `token`, max_new_tokens times, one each interval_s from the request on."""

    token: int
    interval_s: float
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    def submit(self, request: GenerationRequest, sink: Sink) -> int:
        sequence_id = next(self._ids)
        task = self._tasks[sequence_id] = asyncio.ensure_future(self._answer(request, sink))
        task.add_done_callback(lambda _: self._tasks.pop(sequence_id))
        return sequence_id

    def cancel(self, sequence_id: int) -> None:
        if sequence_id in self._tasks:
            self._tasks[sequence_id].cancel()

    async def _answer(self, request: GenerationRequest, sink: Sink) -> None:
        started, sent = time.monotonic(), list[float]()
        for step in range(1, request.max_new_tokens + 1):
            # Due times, not pauses: a late token does not delay those after it.
            await asyncio.sleep(started + step * self.interval_s - time.monotonic())
            last = step == request.max_new_tokens
            sent.append(time.monotonic())
            sink(StepOutput((self.token,), step, finish_reason=FinishReason.LENGTH if last else None))
        print(json.dumps({"prompt": request.prompt, "sent": sent}), flush=True)


async def _serve(engine: ScriptedEngine, facts: ModelFacts, port: int) -> None:
    lifecycle = Lifecycle()
    server = aio_server(lifecycle, UNCOUNTED)
    servicer = Servicer(engine, facts, Outbox(asyncio.get_running_loop()), lifecycle)
    add_VerifierServicer_to_server(servicer, server)
    async with serving_grpc(server, lifecycle, Endpoint("127.0.0.1", port), INSECURE, (SERVICE,)):
        await server.wait_for_termination()


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Folder or hub id of the model whose tokenizer the gateway has.")],
    port: Annotated[int, typer.Option(help="Loopback port to listen on.")],
    token: Annotated[int, typer.Option(min=0, help="The token of every answer.")],
    interval_ms: Annotated[float, typer.Option(min=0, help="Time between two tokens of an answer.")] = 20.0,
) -> None:
    """Serves until it is ended."""
    folder = resolve_model(model)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    facts = ModelFacts(
        model="scripted",
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
        tokenizer_hash=tokenizer_hash(folder),
        eos_token_ids=(config["eos_token_id"],),
        device="cpu",
        dtype="float32",
        kernels="torch",
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_serve(ScriptedEngine(token, interval_ms / 1000), facts, port))


if __name__ == "__main__":
    app()
