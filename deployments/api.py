"""The HTTP routes: authentication, body parsing and OpenAI's error shape. Knows no Serve."""

import logging
from typing import Protocol

from fastapi import FastAPI
from fastapi.requests import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from magicdec.deployments.api_keys import ApiKeys
from magicdec.deployments.errors import (
    ApiError,
    body_too_large,
    from_request_error,
    from_validation_error,
    internal,
    unauthorized,
)
from magicdec.types import RequestError

logger = logging.getLogger(__name__)


class Service(Protocol):
    """What the routes need: the bodies come as received, the answers are complete. `client` is who
    asks, as ApiKeys names them."""

    async def complete(self, raw: bytes, client: str) -> Response: ...

    async def chat(self, raw: bytes, client: str) -> Response: ...

    async def models(self) -> Response: ...

    async def health(self) -> Response: ...


def build_api(service: Service, keys: ApiKeys, *, max_body_bytes: int) -> FastAPI:
    """All errors leave in OpenAI's shape. /health needs no key."""
    api = FastAPI(title="MagicDec Serve", docs_url=None, redoc_url=None, openapi_url=None)
    _answer_errors(api)

    async def body_of(request: HttpRequest) -> tuple[bytes, str]:
        client = keys.client_of(request.headers.get("authorization"))
        if client is None:
            raise unauthorized()
        return await _read_body(request, max_body_bytes), client

    @api.post("/v1/completions")
    async def completions(request: HttpRequest) -> Response:
        return await service.complete(*await body_of(request))

    @api.post("/v1/chat/completions")
    async def chat_completions(request: HttpRequest) -> Response:
        return await service.chat(*await body_of(request))

    @api.get("/v1/models")
    async def models(request: HttpRequest) -> Response:
        await body_of(request)
        return await service.models()

    @api.get("/health")
    async def health() -> Response:
        return await service.health()

    return api


async def _read_body(request: HttpRequest, max_bytes: int) -> bytes:
    """Raises ApiError (413): unread if the length is declared, else as soon as it is passed."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:  # int refuses 4,301 digits
        raise body_too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise body_too_large(max_bytes)
    return bytes(body)


def to_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


def _answer_errors(api: FastAPI) -> None:
    async def handler(request: HttpRequest, error: Exception) -> Response:
        return to_response(_translate(error))

    for kind in (ApiError, RequestError, ValidationError, HTTPException, Exception):
        api.add_exception_handler(kind, handler)


def _translate(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case RequestError():
            return from_request_error(error)
        case ValidationError():
            return from_validation_error(error)
        case HTTPException():
            headers = dict(error.headers or {})
            return ApiError(error.status_code, str(error.detail), headers=headers)
        case _:
            logger.error("an HTTP handler failed", exc_info=error)
            return internal()
