"""gRPC as every service uses it: limits, keepalive, TLS, health, reflection, and exceptions turned into statuses."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.lifecycle import Draining, Lifecycle, StartupError
from services.common.tls import INSECURE, Security, Tls

log = logging.getLogger(__name__)

# Bounds the largest message: sampled distributions of a tree, [nodes, vocab] float32, are 33 MB for 64 x 128256.
MAX_MESSAGE_BYTES = 64 * 2**20
# A peer that is gone or hangs while its connection stays is noticed after KEEPALIVE_TIME_MS + KEEPALIVE_TIMEOUT_MS.
KEEPALIVE_TIME_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 5_000
# A channel tries again at least this often, so that a restarted peer is found soon.
MAX_RECONNECT_BACKOFF_MS = 1_000
# Cancelled handlers get this long to clean up.
STOP_GRACE_S = 1.0

Options = tuple[tuple[str, int | str], ...]

_MESSAGE_OPTIONS: Options = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
_KEEPALIVE_OPTIONS: Options = (
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    # What a machine that is gone leaves unacknowledged, and what a process that hangs leaves unanswered.
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS: Options = (
    *_MESSAGE_OPTIONS,
    *_KEEPALIVE_OPTIONS,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS),
)
SERVER_OPTIONS: Options = (
    *_MESSAGE_OPTIONS,
    *_KEEPALIVE_OPTIONS,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
    # Two servers on one port would each get a part of the requests; the second must fail to start.
    ("grpc.so_reuseport", 0),
)

Handler = Callable[[Any, Any], Any]
Context = grpc.aio.ServicerContext[Any, Any]


class StatusError(Exception):
    """Raised by a handler: ends the call with this status and message."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def status_of(error: Exception) -> StatusError:
    """The status that a handler's exception means; one that nobody planned for is INTERNAL."""
    if isinstance(error, StatusError):
        return error
    if isinstance(error, Draining):
        return StatusError(grpc.StatusCode.UNAVAILABLE, str(error))
    if isinstance(error, NotImplementedError):  # what protoc's servicers raise for a call that a service lacks
        return StatusError(grpc.StatusCode.UNIMPLEMENTED, str(error) or "this call is not supported")
    if isinstance(error, TimeoutError):
        return StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, str(error) or "the call took too long")
    return StatusError(grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}; the service's log has more")


class _Interceptor(grpc.aio.ServerInterceptor):
    """Counts calls as open work, refuses them during a drain, and ends failed ones with a status."""

    def __init__(self, lifecycle: Lifecycle, exempt: frozenset[str]) -> None:
        self._lifecycle = lifecycle
        self._exempt = exempt

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith((f"/{grpc_health.SERVICE_NAME}/", f"/{reflection.SERVICE_NAME}/")):
            return handler
        counted = method not in self._exempt
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary, counted), **codecs)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._unary(handler.stream_unary, counted), **codecs)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream, counted), **codecs)
        assert handler.stream_stream is not None  # a handler has exactly one behavior
        return grpc.stream_stream_rpc_method_handler(self._stream(handler.stream_stream, counted), **codecs)

    def _unary(self, behavior: Handler, counted: bool) -> Handler:
        async def guarded(request: Any, context: Context) -> Any:
            with self._open(counted):
                return await behavior(request, context)

        async def call(request: Any, context: Context) -> Any:
            try:
                return await guarded(request, context)
            except Exception as error:  # noqa: BLE001  # whatever a handler raises ends its call, not the server
                await _abort(context, error)

        return call

    def _stream(self, behavior: Handler, counted: bool) -> Handler:
        if not inspect.isasyncgenfunction(behavior):
            return self._unary(behavior, counted)  # a coroutine that writes its responses to the context

        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                with self._open(counted):
                    async with aclosing(behavior(request, context)) as responses:
                        async for response in responses:
                            yield response
            except Exception as error:  # noqa: BLE001  # ends its call, not the server
                await _abort(context, error)

        return call

    def _open(self, counted: bool) -> AbstractContextManager[None]:
        return self._lifecycle.work() if counted else nullcontext()


async def _abort(context: Context, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    status = status_of(error)
    if status.code is grpc.StatusCode.INTERNAL:
        log.error("a call failed", exc_info=error)
    await context.abort(status.code, status.message)


def aio_server(lifecycle: Lifecycle, exempt: frozenset[str] = frozenset()) -> grpc.aio.Server:
    """A server whose calls are open work of the lifecycle; add the servicers, then enter serving_grpc().

    exempt: full names ("/package.Service/Method") of calls that the drain does not wait for: streams that last as long
    as their client. Their handlers return once `lifecycle.drain_started` is set. Health and reflection are exempt.
    """
    return grpc.aio.server(interceptors=[_Interceptor(lifecycle, exempt)], options=SERVER_OPTIONS)


@dataclass(frozen=True)
class Endpoint:
    """Where a service listens.

    port: 0 chooses a free one. health_port: of a second listener without TLS for health checks alone; 0: none.
    """

    host: str
    port: int
    health_port: int = 0


@asynccontextmanager
async def serving_grpc(
    server: grpc.aio.Server, lifecycle: Lifecycle, endpoint: Endpoint, security: Security, services: Sequence[str]
) -> AsyncIterator[int]:
    """Adds health and reflection for `services` (full names), binds and serves; yields the port.

    Every service, and the server as a whole (""), is SERVING from here to the drain. At the end new calls are refused
    and those still open cancelled after STOP_GRACE_S.

    Raises:
        StartupError: an address cannot be bound.
    """
    health = grpc_health.aio.HealthServicer()
    for service in services:
        await health.set(service, health_pb2.HealthCheckResponse.SERVING)
    tasks: list[asyncio.Task[None]] = []
    lifecycle.on_drain(lambda: tasks.append(asyncio.ensure_future(health.enter_graceful_shutdown())))
    reflection.enable_server_reflection([*services, grpc_health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    servers = [server]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    bound = _bind(server, endpoint.host, endpoint.port, security, "--port")
    if endpoint.health_port:
        probed = grpc.aio.server(options=SERVER_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(health, probed)
        _bind(probed, endpoint.host, endpoint.health_port, INSECURE, "--health-port")
        servers.append(probed)
    try:
        for each in servers:
            await each.start()
        log.info("listening", extra={"address": f"{endpoint.host}:{bound}", "tls": security is not INSECURE})
        yield bound
    finally:
        for each in servers:
            await each.stop(STOP_GRACE_S)


def _bind(server: grpc.aio.Server, host: str, port: int, security: Security, flag: str) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if security is INSECURE:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, security.server_credentials())
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {address} ({error}); choose another --host or {flag}") from None


def aio_channel(address: str, security: Security, name: str = "") -> grpc.aio.Channel:
    """An asyncio channel to HOST:PORT; connects at its first call, and again whenever the connection is lost.

    With TLS it keeps the certificates of now; a new channel takes the newest. name: that the peer's certificate must
    carry, unless the settings give one; the host of the address when it is empty.
    """
    if security is INSECURE:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    options = (*CHANNEL_OPTIONS, *_name_options(security, name))
    return grpc.aio.secure_channel(address, security.channel_credentials(), options=options)


def channel(address: str, security: Security) -> grpc.Channel:
    """aio_channel() for threads."""
    if security is INSECURE:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    options = (*CHANNEL_OPTIONS, *_name_options(security, ""))
    return grpc.secure_channel(address, security.channel_credentials(), options=options)


def _name_options(security: Tls, name: str) -> Options:
    wanted = security.server_name or name
    return (("grpc.ssl_target_name_override", wanted),) if wanted else ()


async def health_status(
    connection: grpc.aio.Channel, service: str = "", timeout_s: float = 1.0, wait_for_ready: bool = False
) -> int | None:
    """What the peer's health call says, a HealthCheckResponse.ServingStatus; None when it does not answer.

    service: "" is the server as a whole. wait_for_ready: attempts to connect that fail are repeated until the timeout.
    """
    stub: Any = health_pb2_grpc.HealthStub(connection)  # its type stub lacks the calls
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        response = await stub.Check(request, timeout=timeout_s, wait_for_ready=wait_for_ready)
    except grpc.aio.AioRpcError:
        return None
    return int(response.status)


async def is_serving(connection: grpc.aio.Channel, service: str = "", timeout_s: float = 1.0) -> bool:
    """Whether the peer is reachable and its health call says SERVING."""
    return await health_status(connection, service, timeout_s) == health_pb2.HealthCheckResponse.SERVING


async def wait_not_serving(connection: grpc.aio.Channel) -> None:
    """Return when the peer stops SERVING; grpc.aio.AioRpcError when the connection is lost."""
    stub: Any = health_pb2_grpc.HealthStub(connection)  # its type stub lacks the calls
    call = stub.Watch(health_pb2.HealthCheckRequest())
    try:
        async for response in call:
            if response.status != health_pb2.HealthCheckResponse.SERVING:
                return
    finally:
        call.cancel()
