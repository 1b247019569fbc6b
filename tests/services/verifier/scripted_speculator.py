"""A speculator that answers what it is told to: a real gRPC server without a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from protos import speculator_pb2, tree_pb2
from protos.speculator_pb2_grpc import SpeculatorServicer, add_SpeculatorServicer_to_server
from services.common.model_files import tokenizer_hash
from tests.ports import free_port
from tests.tiny_models import VOCAB

TIMEOUT_S = 30

Answer = Callable[[speculator_pb2.SpeculateRequest], speculator_pb2.SpeculateResponse]


class Recorder:
    """What a scripted speculator has seen, and what it answers: nothing, if not told otherwise."""

    def __init__(self, answer: Answer = lambda message: speculator_pb2.SpeculateResponse(step=message.step)) -> None:
        self.answer = answer
        self.opened: list[int] = []
        self.closed: list[int] = []


@contextmanager
def scripted_speculator(llm: Path, recorder: Recorder) -> Iterator[str]:
    """A real gRPC server that fits the LLM and whose drafts are scripted; yields its address."""
    facts = tree_pb2.ModelInfo(model="scripted", vocab_size=VOCAB, tokenizer_hash=tokenizer_hash(llm))

    class Scripted(SpeculatorServicer):
        def ListModels(self, request: tree_pb2.ModelInfoRequest, context: Any) -> speculator_pb2.DraftModels:
            return speculator_pb2.DraftModels(models=[facts])

        def Speculate(
            self, request_iterator: Iterator[speculator_pb2.SpeculateRequest], context: Any
        ) -> Iterator[speculator_pb2.SpeculateResponse]:
            for message in request_iterator:
                recorder.opened.extend(opened.sequence_id for opened in message.open)
                recorder.closed.extend(message.close)
                yield recorder.answer(message)

    server = grpc.server(ThreadPoolExecutor(4))
    add_SpeculatorServicer_to_server(Scripted(), server)
    port = server.add_insecure_port(f"127.0.0.1:{free_port()}")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(1).wait(TIMEOUT_S)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as the condition holds; fails when it never does."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)
