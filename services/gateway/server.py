"""The gateway as a running server."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from starlette.types import ASGIApp

from services.common.lifecycle import Lifecycle, StartupError
from services.common.model_files import TOKENIZER_FILES, resolve_model, tokenizer_hash
from services.common.tls import security_of
from services.gateway.api_keys import ApiKeys, RequireApiKey
from services.gateway.app import create_app
from services.gateway.gateway import Gateway
from services.gateway.https import HttpsCertificate
from services.gateway.metrics import GatewayMetrics
from services.gateway.records import Records
from services.gateway.replicas import Finding, Replicas
from services.gateway.settings import GatewaySettings
from services.gateway.tokenizer import GatewayTokenizer

log = logging.getLogger(__name__)

# After the drain's time, for the errors of the last requests to reach their clients.
STOP_GRACE_S = 2
# Longer than clients (5 s in OpenAI's Python SDK) and load balancers (60 s by common defaults) keep idle connections:
# were it the server that closes one, a request could be on its way there.
KEEP_ALIVE_S = 75
BACKLOG = 2048


@asynccontextmanager
async def serve(settings: GatewaySettings, lifecycle: Lifecycle) -> AsyncIterator[None]:
    """Serve HTTP inside the context; what is open when it ends gets an error. StartupError."""
    https = _https(settings)
    protect = _protection(settings)
    listener = _listen(settings.host, settings.port)
    async with (
        _gateway(settings, lifecycle) as gateway,
        _http(protect(create_app(gateway)), listener, https, lifecycle),
    ):
        log.info("listening", extra={"url": url_of(listener, https=https is not None)})
        yield
        gateway.end_open_requests()


def _https(settings: GatewaySettings) -> HttpsCertificate | None:
    if settings.https_cert is None or settings.https_key is None:
        return None
    return HttpsCertificate(settings.https_cert, settings.https_key)


def _protection(settings: GatewaySettings) -> Callable[[ASGIApp], ASGIApp]:
    """What stands in front of the application: a check of API keys, if there are any; StartupError."""
    if settings.api_keys_file is None and not settings.api_keys:
        return lambda app: app
    keys = ApiKeys(settings.api_keys_file, settings.api_keys)
    return lambda app: RequireApiKey(app, keys)


@asynccontextmanager
async def _gateway(settings: GatewaySettings, lifecycle: Lifecycle) -> AsyncIterator[Gateway]:
    """The parts of a gateway; verifiers and Redis need not be there yet."""
    folder = resolve_model(settings.model, TOKENIZER_FILES)
    try:
        tokenizer = GatewayTokenizer.from_folder(folder)
    except ValueError as error:
        raise StartupError(str(error)) from error
    metrics = GatewayMetrics(lifecycle.registry)
    security = security_of(settings, settings.tls_server_name)
    finding = Finding(settings.verifier, security, settings.connect_timeout_s, tokenizer_hash(folder))
    verifiers = Replicas(finding, metrics)
    records = Records(
        settings.redis_url,
        owner=f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}",
        ttl_s=settings.record_ttl_s,
        timeout_s=settings.redis_timeout_s,
        on_error=metrics.record_errors.inc,
    )
    try:
        async with verifiers.watched():
            yield Gateway(settings, tokenizer, verifiers, records, metrics, lifecycle)
    finally:
        await records.close()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the lifecycle has them."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def _http(
    app: ASGIApp, listener: socket.socket, https: HttpsCertificate | None, lifecycle: Lifecycle
) -> AsyncIterator[None]:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=STOP_GRACE_S,
        ssl_certfile=None if https is None else https.cert,
        ssl_keyfile=None if https is None else https.key,
    )
    config.load()
    if https is not None and config.ssl is not None:
        https.serve(config.ssl)
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    serving.add_done_callback(lambda task: _report_crash(task, lifecycle))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def _report_crash(serving: asyncio.Task[None], lifecycle: Lifecycle) -> None:
    if not serving.cancelled() and (error := serving.exception()) is not None:
        lifecycle.fail(error)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
        ) from error


def url_of(listener: socket.socket, *, https: bool) -> str:
    """The base URL of what listens there."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if https else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
