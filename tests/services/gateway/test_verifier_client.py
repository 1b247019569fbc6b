"""One verifier's calls end with a VerifierError, whatever ends them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import grpc.aio
import pytest

from protos import tree_pb2, verifier_pb2, verifier_pb2_grpc
from services.common.tls import INSECURE
from services.gateway.addresses import Address
from services.gateway.generation import GenerationRequest, Sampling, VerifierFailed, VerifierUnavailable
from services.gateway.verifier_client import RemoteSequence, VerifierClient

SAMPLING = Sampling(
    temperature=0,
    top_k=0,
    top_p=1,
    min_p=0,
    repetition_penalty=1,
    frequency_penalty=0,
    presence_penalty=0,
    logit_bias={},
    seed=1,
)
REQUEST = GenerationRequest("r", "m", (1, 2), SAMPLING, 8, (0,), None, False, True)


class OddVerifier(verifier_pb2_grpc.VerifierServicer):
    """Never tells its model; to each sequence it answers with the outputs given.

    ended: set when its stream has.
    """

    def __init__(self, *outputs: verifier_pb2.SequenceOutput) -> None:
        self._outputs = outputs
        self.asked, self.ended = asyncio.Event(), asyncio.Event()

    async def GetModelInfo(self, request: tree_pb2.ModelInfoRequest, context: object) -> tree_pb2.ModelInfo:
        self.asked.set()
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")

    async def Generate(
        self, request_iterator: AsyncIterator[verifier_pb2.GenerateRequest], context: object
    ) -> AsyncIterator[verifier_pb2.GenerateResponse]:
        try:
            async for request in request_iterator:
                for begun in request.begin:
                    yield verifier_pb2.GenerateResponse(admitted=[begun.sequence_id])
                    for output in self._outputs:
                        output.sequence_id = begun.sequence_id
                        yield verifier_pb2.GenerateResponse(outputs=[output])
        finally:
            self.ended.set()


@asynccontextmanager
async def connected(verifier: OddVerifier) -> AsyncIterator[VerifierClient]:
    server = grpc.aio.server()
    verifier_pb2_grpc.add_VerifierServicer_to_server(verifier, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = VerifierClient(Address("127.0.0.1", port, "127.0.0.1"), INSECURE)
    try:
        yield client
    finally:
        await client.close()
        await server.stop(0)


def test_a_connection_that_is_closed_under_a_call_is_no_cancellation() -> None:
    """A task group would take a cancelled child for one that has nothing to say."""

    async def main() -> None:
        verifier = OddVerifier()
        async with connected(verifier) as client:
            call = asyncio.create_task(client.model_facts(10))
            await verifier.asked.wait()
            await client.close()
            with pytest.raises(VerifierUnavailable, match="has closed its connection"):
                await call
            for later in (client.model_facts(1), client.serving(1), client.wait_not_serving()):
                with pytest.raises(VerifierUnavailable):
                    await later
            with pytest.raises(VerifierUnavailable):
                client.generate(REQUEST, (), lambda: None)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_the_callers_own_cancellation_stays_one() -> None:
    async def main() -> None:
        verifier = OddVerifier()
        async with connected(verifier) as client:
            call = asyncio.create_task(client.model_facts(10))
            await verifier.asked.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(asyncio.wait_for(main(), 20))


def test_facts_have_a_deadline() -> None:
    async def main() -> None:
        async with connected(OddVerifier()) as client:
            with pytest.raises(VerifierUnavailable, match="did not answer in time"):
                await client.model_facts(0.1)

    asyncio.run(asyncio.wait_for(main(), 20))


async def _last(sequence: RemoteSequence) -> None:
    await sequence.admitted()
    async for _ in sequence.steps():
        pass


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        (verifier_pb2.SequenceOutput(token_ids=[5], finish_reason=77), "finish reason 77"),  # type: ignore[arg-type]  # a newer one's
        (
            verifier_pb2.SequenceOutput(
                token_ids=[5],
                logprobs=[verifier_pb2.TokenLogprob(logprob=-1, top_token_ids=[1, 2], top_logprobs=[-1])],
            ),
            "1 log-probabilities of 2 alternatives",
        ),
    ],
)
def test_an_output_that_breaks_the_protocol_ends_its_own_sequence(
    output: verifier_pb2.SequenceOutput, complaint: str
) -> None:
    async def main() -> None:
        verifier = OddVerifier(output)
        async with connected(verifier) as client:
            ended: list[int] = []
            sequences = [client.generate(REQUEST, (), partial(ended.append, number)) for number in (1, 2)]
            for sequence in sequences:
                with pytest.raises(VerifierFailed, match=complaint):
                    await _last(sequence)
            assert sorted(ended) == [1, 2]
            assert not verifier.ended.is_set(), "the stream goes on"

    asyncio.run(asyncio.wait_for(main(), 20))
