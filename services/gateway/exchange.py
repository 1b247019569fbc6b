"""One POST /v1/completions, from the body to the last byte sent, and every way it can end in between."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.common.lifecycle import Draining
from services.common.logs import request_id
from services.gateway.completions import Completion
from services.gateway.errors import RETRY_AFTER_S, ApiError, from_verifier, invalid
from services.gateway.gateway import Gateway
from services.gateway.generation import VerifierError
from services.gateway.plan import CompletionPlan, plan_completion
from services.gateway.records import RecordsUnavailable, State
from services.gateway.replies import EventReply, JsonReply, Reply, send_error
from services.gateway.responses import ResponseWriter
from services.gateway.schemas import CompletionRequest

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
# How long a client that does not read may delay the end of its failed request.
FAREWELL_TIMEOUT_S = 5.0
# Up to this many times the largest body are read and dropped.
DROP_FACTOR = 4


async def read_body(request: Request, max_bytes: int) -> object:
    """The decoded JSON body; ApiError 413 or 400.

    Keeps no more than `max_bytes`. A larger body is read and dropped for a while, because most clients look for an
    answer only when they have sent everything; behind that the connection is closed.
    """
    body = bytearray()
    size = int(declared) if (declared := request.headers.get("content-length", "")).isdecimal() else 0
    if size <= DROP_FACTOR * max_bytes:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= max_bytes:
                body += chunk
            elif size > DROP_FACTOR * max_bytes:
                break
    if size > max_bytes:
        raise ApiError(413, f"the body is larger than {max_bytes} bytes; send less", code="body_too_large")
    try:
        return from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}", code="invalid_json") from error


class CompletionResponse(Response):
    """Serves one request in `__call__`; every way it can end is answered, recorded and counted here."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self._gateway = gateway
        self._arrived = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics = self._gateway.metrics
        status = 500
        try:
            with self._gateway.lifecycle.work(), metrics.open_requests.track_inprogress():
                status = await self._serve(Request(scope, receive), send)
        except Draining as error:
            refusal = ApiError(503, str(error), code="shutting_down", retry_after_s=RETRY_AFTER_S)
            status = refusal.status
            await send_error(send, refusal)
        finally:
            metrics.requests.labels(str(status)).inc()

    async def _serve(self, request: Request, send: Send) -> int:
        """Answer the request; returns the status for the metrics, whatever the client saw of it."""
        gateway = self._gateway
        try:
            async with gateway.time_limit(self._arrived):
                body = CompletionRequest.parse(await read_body(request, gateway.settings.max_body_bytes))
                plan = await plan_completion(body, await gateway.verifiers.facts(), gateway.tokenizer, gateway.limits)
            parameters = body.model_dump(exclude={"prompt"}, exclude_defaults=True)
            seeds = [sequence.sampling.seed for sequence in plan.sequences]
            await gateway.records.create(plan.request_id, parameters, plan.prompts, seeds)
        except (ApiError, VerifierError, RecordsUnavailable, TimeoutError) as error:
            refusal = self._api_error(error)
            await send_error(send, refusal)
            return refusal.status
        except ClientDisconnect:
            return CLIENT_CLOSED_REQUEST
        gateway.metrics.prompt_tokens.inc(plan.prompt_tokens)
        with request_id(plan.request_id):
            return await self._complete(plan, request.receive, send)

    async def _complete(self, plan: CompletionPlan, receive: Receive, send: Send) -> int:
        gateway = self._gateway
        writer = ResponseWriter(plan, int(time.time()))
        reply: Reply = EventReply(send, writer) if plan.request.stream else JsonReply(send, writer, len(plan.sequences))
        completion = Completion(
            plan,
            gateway.tokenizer,
            gateway.verifiers,
            gateway.records,
            gateway.metrics,
            arrived=self._arrived,
            resume=gateway.resume,
        )
        failure: ApiError | None = None
        state, status = State.FAILED, 500
        try:
            async with gateway.time_limit(self._arrived):
                await _until_disconnect(receive, _run(completion, reply, gateway, plan.request_id))
            state, status = State.FINISHED, 200
        except ClientDisconnect:
            state, status = State.CANCELLED, CLIENT_CLOSED_REQUEST
        except (ApiError, VerifierError, TimeoutError) as error:
            failure = self._api_error(error)
            status = failure.status
        finally:
            completion.cancel()
            await gateway.records.end(
                plan.request_id,
                len(plan.sequences),
                state,
                first_token=completion.first_token_at,
                error=failure.message if failure else None,
            )
        if failure is not None:
            log.warning("completion failed", extra={"status": status, "reason": failure.message})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_TIMEOUT_S):
                    await reply.fail(failure)
        return status

    def _api_error(self, error: ApiError | VerifierError | RecordsUnavailable | TimeoutError) -> ApiError:
        match error:
            case ApiError():
                return error
            case VerifierError():
                return from_verifier(error)
            case RecordsUnavailable():
                return ApiError(503, str(error), code="records_unavailable", retry_after_s=RETRY_AFTER_S)
            case TimeoutError():
                return self._gateway.time_is_over()


async def _run(completion: Completion, reply: Reply, gateway: Gateway, completion_id: str) -> None:
    await completion.admit()
    await gateway.records.running(completion_id)
    await reply.start()
    await completion.run(reply.piece)
    await reply.finish(completion.usage)


async def _until_disconnect(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Await the work, but raise ClientDisconnect and cancel it as soon as the client is gone."""
    working = asyncio.create_task(work)
    listening = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        await working
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
