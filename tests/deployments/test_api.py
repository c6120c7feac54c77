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

    async def complete(self, raw: bytes, client: str) -> Response:
        return JSONResponse(len(raw), headers={"client": client})

    async def chat(self, raw: bytes, client: str) -> Response:
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


async def post(
    content: bytes | Body, headers: dict[str, str] | None = None, keys: tuple[str, ...] = ()
) -> httpx.Response:
    api = build_api(Echo(), ApiKeys(list(keys)), max_body_bytes=LIMIT)
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


async def test_clients_are_told_apart_by_their_keys_without_giving_these_away() -> None:
    keys = ("sk-first", "sk-second")
    names = []
    for key in (*keys, keys[0]):
        response = await post(b"x", {"Authorization": f"Bearer {key}"}, keys)
        assert response.status_code == 200
        names.append(response.headers["client"])
        assert names[-1] and "sk-" not in names[-1]
    assert names[0] == names[2] != names[1]
    assert (await post(b"x", {"Authorization": "Bearer sk-wrong"}, keys)).status_code == 401


async def test_without_keys_all_are_one_client() -> None:
    for header in ({}, {"Authorization": "Bearer anything"}):
        assert (await post(b"x", header)).headers["client"] == ""
