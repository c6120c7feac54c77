"""The routes without Serve: how a body is read, and when it is not."""

from typing import Any

import httpx
import pytest
from fastapi.responses import JSONResponse, Response

from magicdec.deployments.api import build_api
from magicdec.deployments.api_keys import ApiKeys

LIMIT = 100


class Echo:
    """A service that answers with the size of what it was given."""

    async def complete(self, raw: bytes) -> Response:
        return JSONResponse(len(raw))

    async def chat(self, raw: bytes) -> Response:
        return JSONResponse(len(raw))

    async def models(self) -> Response:
        return JSONResponse(0)

    async def health(self) -> Response:
        return JSONResponse(0)


class Body(httpx.AsyncByteStream):
    """Ten chunks of 50 bytes; counts how many were asked for."""

    def __init__(self) -> None:
        self.num_read = 0

    async def __aiter__(self) -> Any:
        for _ in range(10):
            self.num_read += 1
            yield b"x" * 50


async def post(content: bytes | Body, headers: dict[str, str] | None = None) -> httpx.Response:
    api = build_api(Echo(), ApiKeys([]), max_body_bytes=LIMIT)
    transport = httpx.ASGITransport(app=api)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/v1/completions", content=content, headers=headers)


async def test_a_body_at_the_limit_is_read() -> None:
    response = await post(b"x" * LIMIT)
    assert (response.status_code, response.json()) == (200, LIMIT)


@pytest.mark.parametrize("length", ["500", "9" * 5000])
async def test_a_declared_length_above_the_limit_is_refused_unread(length: str) -> None:
    body = Body()
    response = await post(body, {"Content-Length": length})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert str(LIMIT) in response.json()["error"]["message"]
    assert body.num_read == 0


async def test_an_undeclared_length_is_refused_at_the_limit() -> None:
    body = Body()
    response = await post(body)
    assert response.status_code == 413
    assert body.num_read == 3
