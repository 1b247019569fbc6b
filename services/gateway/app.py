"""The HTTP routes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from services.gateway.errors import ApiError, from_verifier
from services.gateway.exchange import CompletionResponse
from services.gateway.gateway import Gateway
from services.gateway.generation import ModelFacts, ModelMismatch, VerifierError
from services.gateway.plan import check_model
from services.gateway.records import RecordsUnavailable
from services.gateway.schemas import CompletionRequest


def create_app(gateway: Gateway) -> FastAPI:
    """The gateway's ASGI application."""
    app = FastAPI(title="SpecServe", docs_url=None, redoc_url=None)
    _add_completions(app, gateway)
    _add_models(app, gateway)
    _add_operations(app, gateway)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(VerifierError, _answer_verifier_error)
    app.add_exception_handler(Exception, _answer_fault)
    return app


def _add_completions(app: FastAPI, gateway: Gateway) -> None:
    body = {"required": True, "content": {"application/json": {"schema": CompletionRequest.model_json_schema()}}}

    @app.post("/v1/completions", openapi_extra={"requestBody": body})
    async def create_completion() -> Response:
        return CompletionResponse(gateway)


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    def model_object(facts: ModelFacts) -> dict[str, object]:
        return {"id": facts.model, "object": "model", "created": gateway.started, "owned_by": "specserve"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, object]:
        return {"object": "list", "data": [model_object(await gateway.verifiers.facts())]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, object]:
        facts = await gateway.verifiers.facts()
        check_model(name, facts)
        return model_object(facts)


def _add_operations(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        missing = await missing_parts(gateway)
        status = {"status": "not ready" if missing else "ready", "missing": missing}
        return JSONResponse(status, status_code=503 if missing else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(gateway.lifecycle.registry), media_type=CONTENT_TYPE_LATEST)


async def missing_parts(gateway: Gateway) -> dict[str, str]:
    """Parts without which no request can be served, each with the reason; empty when all are there."""
    missing: dict[str, str] = {}
    if gateway.lifecycle.draining:
        missing["gateway"] = "shutting down"
    try:
        await gateway.verifiers.facts()
    except ModelMismatch as error:
        missing["tokenizer"] = str(error)
    except VerifierError as error:
        missing["verifier"] = str(error)
    try:
        await gateway.records.ping()
    except RecordsUnavailable as error:
        missing["redis"] = str(error)
    return missing


def _answer(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, dict(error.headers))


async def _answer_api_error(request: Request, error: Any) -> Response:
    return _answer(error)


async def _answer_verifier_error(request: Request, error: Any) -> Response:
    return _answer(from_verifier(error))


async def _answer_http_exception(request: Request, error: Any) -> Response:
    """Routes and methods that do not exist."""
    asked = f"{request.method} {request.url.path}"
    match error.status_code:
        case 404:
            answer = ApiError(
                404,
                f"there is no {asked}; there is POST /v1/completions and GET /v1/models, /health, /ready, /metrics",
                code="not_found",
            )
        case 405:
            allowed = (error.headers or {}).get("Allow", "")
            answer = ApiError(405, f"{asked} is not allowed; allowed: {allowed}", code="method_not_allowed")
        case status:
            answer = ApiError(status, str(error.detail))
    response = _answer(answer)
    response.headers.update(error.headers or {})
    return response


async def _answer_fault(request: Request, error: Exception) -> Response:
    """A fault of the gateway; the framework logs it with its traceback."""
    return _answer(ApiError(500, "internal error of the gateway; its log has more", code="internal_error"))
