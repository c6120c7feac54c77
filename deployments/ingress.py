"""Ingress: the stateless HTTP side. It validates, tokenizes, and streams what replicas send."""

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from magicdec.cluster.metric_table import INGRESS_METRICS
from magicdec.cluster.telemetry import Recorder, common_labels
from magicdec.deployments.api import build_api
from magicdec.deployments.api_keys import ApiKeys
from magicdec.deployments.dispatch import ROUTER_TIMEOUT_S, Dispatcher
from magicdec.deployments.embedded_model import resolve_model
from magicdec.deployments.errors import model_not_found, no_replica
from magicdec.deployments.measured_requests import MeasuredRequests
from magicdec.deployments.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationBody,
)
from magicdec.deployments.replica_api import ReplicaDescription
from magicdec.deployments.responses import ResponseFormat
from magicdec.deployments.settings import ServeSettings
from magicdec.deployments.streaming import Choices, collect, stream_events
from magicdec.types import Request

if TYPE_CHECKING:  # imports transformers, which only a running ingress needs
    from magicdec.deployments.prompts import PromptBuilder

logger = logging.getLogger(__name__)


class Ingress:
    """One of any number of equal processes; Serve serves the FastAPI app it builds."""

    def __init__(
        self,
        settings: ServeSettings,
        router: DeploymentHandle[Any],
        replicas: DeploymentHandle[Any],
    ) -> None:
        from magicdec.model_loader import load_tokenizer

        self._server = settings.server
        self._speculation = settings.engine_config().speculation
        self._model_name = settings.model.name
        self._keys = ApiKeys.from_file(settings.server.api_keys_file)
        self._router = router
        self._replicas = replicas
        self._tokenizer = load_tokenizer(resolve_model(settings.model.path))
        self._builder: PromptBuilder | None = None
        self._created = int(time.time())
        self._recorder: Recorder | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook: called once, after the constructor."""
        return build_api(self, self._keys, max_body_bytes=self._server.max_body_bytes)

    async def complete(self, raw: bytes, client: str) -> Response:
        builder = await self._prompt_builder()

        def prepare() -> tuple[CompletionRequest, list[Request]]:
            body = CompletionRequest.model_validate_json(raw)
            self._check_model(body)
            return body, builder.completion(body)

        body, requests = await asyncio.to_thread(prepare)
        return await self._answer(body, requests, client, chat=False)

    async def chat(self, raw: bytes, client: str) -> Response:
        builder = await self._prompt_builder()

        def prepare() -> tuple[ChatCompletionRequest, list[Request]]:
            body = ChatCompletionRequest.model_validate_json(raw)
            self._check_model(body)
            return body, builder.chat(body)

        body, requests = await asyncio.to_thread(prepare)
        return await self._answer(body, requests, client, chat=True)

    async def models(self) -> Response:
        entry = {
            "id": self._model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "magicdec",
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self) -> Response:
        """200 while a replica reports, or while nobody can say; 503 when there is none."""
        try:
            async with asyncio.timeout(ROUTER_TIMEOUT_S):
                live: list[str] = await self._router.live_replicas.remote()
        except Exception as error:  # Serve raises of many kinds; none says that replicas are down
            logger.warning("the router does not answer: %r", error)
            return JSONResponse({"status": "ok", "router": "unavailable"})
        if not live:
            return JSONResponse({"status": "starting", "replicas": 0}, 503)
        return JSONResponse({"status": "ok", "replicas": len(live)})

    async def _answer(
        self, body: GenerationBody, requests: list[Request], client: str, *, chat: bool
    ) -> Response:
        response = ResponseFormat.new(
            chat=chat, model=self._model_name, with_token_ids=bool(body.return_token_ids)
        )
        wait_s, keep_alive_s = self._server.replica_wait_s, self._server.keep_alive_s
        dispatcher = Dispatcher(self._router, self._replicas, client, replica_wait_s=wait_s)
        choices = Choices(MeasuredRequests(dispatcher, self._sink()), requests)
        if not body.streams:
            return JSONResponse(await collect(choices, response))
        try:
            await choices.wait_started(keep_alive_s)
        except BaseException:
            await choices.close()
            raise
        events = stream_events(
            choices, response, with_usage=body.streams_usage, keep_alive_s=keep_alive_s
        )
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    def _sink(self) -> Recorder:
        """Made at the first request: only then is it sure that Serve runs this."""
        if self._recorder is None:
            replica_id = serve.get_replica_context().replica_id.unique_id
            self._recorder = Recorder(INGRESS_METRICS, common_labels(self._model_name, replica_id))
        return self._recorder

    def _check_model(self, body: GenerationBody) -> None:
        if body.model != self._model_name:
            raise model_not_found(body.model, self._model_name)

    async def _prompt_builder(self) -> "PromptBuilder":
        """Made at the first request: the context length is the engine's to say, and engines
        start while the ingress does."""
        if self._builder is None:
            from magicdec.deployments.prompts import PromptBuilder

            wait_s = self._server.replica_wait_s
            try:
                async with asyncio.timeout(wait_s):
                    replica: ReplicaDescription = await self._replicas.describe.remote()
            except Exception as error:  # whatever it is, no replica has answered yet
                logger.warning("no replica describes itself: %r", error)
                raise no_replica(wait_s) from error
            self._builder = PromptBuilder(
                self._tokenizer,
                max_model_len=replica.max_model_len,
                vocab_size=replica.vocab_size,
                max_choices=self._server.max_choices,
                speculation=self._speculation,
            )
        return self._builder
