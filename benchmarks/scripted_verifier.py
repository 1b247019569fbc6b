"""A verifier without a model: scripted tokens at a fixed pace, and when it sent each.

    python -m benchmarks.scripted_verifier --model models/default-llm --port 50051 --token 17 --interval-ms 20

A real gRPC server of the Verifier service. Writes one JSON object a request to standard output when the request ends:
its prompt and the CLOCK_MONOTONIC time, in seconds, at which each token was handed to gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

import grpc.aio
import typer

from protos import tree_pb2, verifier_pb2, verifier_pb2_grpc
from services.common.grpc_setup import Endpoint, aio_server, serving_grpc
from services.common.lifecycle import Lifecycle
from services.common.model_files import resolve_model, tokenizer_hash
from services.common.tls import INSECURE

Context = grpc.aio.ServicerContext[verifier_pb2.GenerateRequest, verifier_pb2.GenerateResponse]


@dataclass(frozen=True)
class ScriptedVerifier(verifier_pb2_grpc.VerifierServicer):
    """Answers every request with `token`, max_new_tokens times, one each interval_s from the request on."""

    facts: tree_pb2.ModelInfo
    token: int
    interval_s: float

    async def GetModelInfo(self, request: tree_pb2.ModelInfoRequest, context: object) -> tree_pb2.ModelInfo:
        return self.facts

    async def Generate(
        self, request: verifier_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[verifier_pb2.GenerateResponse]:
        await context.send_initial_metadata((("specserve-admitted", "1"),))
        started, sent = time.monotonic(), list[float]()
        for step in range(request.max_new_tokens):
            # Due times, not pauses: a late token does not delay those after it.
            await asyncio.sleep(started + (step + 1) * self.interval_s - time.monotonic())
            last = step + 1 == request.max_new_tokens
            response = verifier_pb2.GenerateResponse(
                token_ids=[self.token],
                llm_steps=step + 1,
                finish_reason=verifier_pb2.FINISH_REASON_LENGTH if last else verifier_pb2.FINISH_REASON_UNSPECIFIED,
            )
            sent.append(time.monotonic())
            yield response
        print(json.dumps({"prompt": list(request.prompt_token_ids), "sent": sent}), flush=True)


async def _serve(verifier: ScriptedVerifier, port: int) -> None:
    lifecycle = Lifecycle()
    server = aio_server(lifecycle)
    verifier_pb2_grpc.add_VerifierServicer_to_server(verifier, server)
    endpoint = Endpoint("127.0.0.1", port)
    async with serving_grpc(server, lifecycle, endpoint, INSECURE, ("specserve.v1.Verifier",)):
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
    facts = tree_pb2.ModelInfo(
        model="scripted",
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
        tokenizer_hash=tokenizer_hash(folder),
        eos_token_ids=[config["eos_token_id"]],
        device="cpu",
        dtype="float32",
        kernels="torch",
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(ScriptedVerifier(facts, token, interval_ms / 1000), port))


if __name__ == "__main__":
    app()
