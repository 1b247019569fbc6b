"""A verifier that speaks the real protocol and thinks of nothing: token 7, every PERIOD_S seconds."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from protos import verifier_pb2, verifier_pb2_grpc
from protos.tree_pb2 import ModelInfo, ModelInfoRequest
from services.common.grpc_setup import Endpoint, StatusError, aio_server, serving_grpc
from services.common.lifecycle import Lifecycle, StartupError
from services.common.service import run_service
from services.common.settings import ServiceSettings, setting
from services.common.tls import security_of

PERIOD_S = 0.02
SERVICE = "specserve.v1.Verifier"


@dataclass(frozen=True, kw_only=True)
class ExampleSettings(ServiceSettings):
    """An example of a service."""

    port: int = setting("Port to listen on.", default=0)
    health_port: int = setting("Port of a listener for health checks alone.", default=0)
    load_s: float = setting("Seconds that the event loop stands still at the start.", default=0.0)
    refuse: bool = setting("Fail to start.", default=False)
    fail_after_s: float | None = setting("Seconds until a thread of the service fails.", default=None)


class ExampleVerifier(verifier_pb2_grpc.VerifierServicer):
    async def GetModelInfo(self, request: ModelInfoRequest, context: Any) -> ModelInfo:
        raise ZeroDivisionError("a bug")

    async def Generate(
        self, request_iterator: AsyncIterator[verifier_pb2.GenerateRequest], context: Any
    ) -> AsyncIterator[verifier_pb2.GenerateResponse]:
        request = await anext(aiter(request_iterator))
        if not request.begin:
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "there is nothing to do")
        for _ in range(request.begin[0].max_new_tokens):
            yield verifier_pb2.GenerateResponse(outputs=[verifier_pb2.SequenceOutput(token_ids=[7])])
            await asyncio.sleep(PERIOD_S)


@asynccontextmanager
async def serve(settings: ExampleSettings, lifecycle: Lifecycle) -> AsyncIterator[None]:
    time.sleep(settings.load_s)  # noqa: ASYNC251  # stands for loading a model, which does not let the loop run
    if settings.refuse:
        raise StartupError("it was told to fail")
    server = aio_server(lifecycle)
    verifier_pb2_grpc.add_VerifierServicer_to_server(ExampleVerifier(), server)
    endpoint = Endpoint("127.0.0.1", settings.port, settings.health_port)
    async with serving_grpc(server, lifecycle, endpoint, security_of(settings), [SERVICE]) as port:
        print(f"port {port}", flush=True)
        if settings.fail_after_s is not None:
            threading.Timer(settings.fail_after_s, lifecycle.fail, [RuntimeError("the engine died")]).start()
        yield
    print("freed", flush=True)


if __name__ == "__main__":
    run_service(ExampleSettings, "verifier", serve)
