"""The stage of Ray Data that has rows answered by the engines of this job's own application."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from ray import serve

from magicdec.config import SpeculativeConfig
from magicdec.deployments.batch_bodies import MAX_CHOICES, parse_body, requests_of
from magicdec.deployments.batch_outcome import Outcome, answer_item, failed
from magicdec.deployments.batch_output import RowResult
from magicdec.deployments.batch_row import BatchRow, RowDefaults, row_seed
from magicdec.deployments.dispatch import Dispatcher
from magicdec.deployments.embedded_model import resolve_model
from magicdec.deployments.errors import (
    ApiError,
    from_request_error,
    from_validation_error,
)
from magicdec.deployments.prompts import PromptBuilder
from magicdec.deployments.protocol import ChatCompletionRequest, GenerationBody
from magicdec.deployments.responses import ResponseFormat, add_usages
from magicdec.deployments.streaming import Choices, collect
from magicdec.model_loader import load_tokenizer
from magicdec.types import Request, RequestError

CLIENT = "batch"
REPLICA_WAIT_S = 60.0  # of one try
SERVED_S = 2 * REPLICA_WAIT_S  # a try that took longer did not only wait
RETRY_PERIOD_S = 2.0
TRY_AGAIN = (429, 503)  # no engine has room, or none is there


@dataclass(frozen=True, slots=True)
class EngineTarget:
    """The engines, and what is needed to make requests for them. `patience_s`: for how long on end
    a row waits for engines that are gone. `alone`: no other row is live, so one that is live at
    two deaths of engines is what kills them."""

    app_name: str
    router: str  # deployments of that application
    replicas: str
    model_path: str
    model_name: str
    max_model_len: int
    vocab_size: int
    speculation: SpeculativeConfig
    patience_s: float
    alone: bool = False


class EngineCaller:
    """One process, many rows at a time, all on one event loop."""

    def __init__(self, target: EngineTarget, defaults: RowDefaults) -> None:
        self._target = target
        self._defaults = defaults
        self._router = serve.get_deployment_handle(target.router, target.app_name)
        self._replicas = serve.get_deployment_handle(target.replicas, target.app_name)
        self._builder = PromptBuilder(
            load_tokenizer(resolve_model(target.model_path)),
            max_model_len=target.max_model_len,
            vocab_size=target.vocab_size,
            max_choices=MAX_CHOICES,
            speculation=target.speculation,
        )

    async def __call__(self, item: dict[str, Any]) -> dict[str, bytes]:
        """See answer_item."""
        return await answer_item(item, self._defaults, self._outcome)

    async def _outcome(self, row: BatchRow, key: str) -> Outcome:
        give_up = time.monotonic() + self._target.patience_s
        try:
            body, requests = await asyncio.to_thread(self._requests, row, key)
        except ValidationError as error:
            return Outcome(failed(row, key, from_validation_error(error)))
        except RequestError as error:
            return Outcome(failed(row, key, from_request_error(error)))
        while True:
            started = time.monotonic()
            try:
                return Outcome(await self._answer(row, key, body, requests))
            except ApiError as error:
                if error.code == "replica_died_twice" and not self._target.alone:
                    return Outcome(None, is_suspect=True)
                if error.status not in TRY_AGAIN:
                    return Outcome(failed(row, key, error))
                if time.monotonic() - started > SERVED_S:  # an engine had it
                    give_up = time.monotonic() + self._target.patience_s
                if time.monotonic() > give_up:
                    return Outcome(None, unreachable=error.message)
            await asyncio.sleep(RETRY_PERIOD_S)

    def _requests(self, row: BatchRow, key: str) -> tuple[GenerationBody, list[Request]]:
        body = parse_body(row)
        if body.seed is None:
            body = body.model_copy(update={"seed": row_seed(key)})
        return body, requests_of(body, self._builder)

    async def _answer(
        self, row: BatchRow, key: str, body: GenerationBody, requests: list[Request]
    ) -> RowResult:
        """Raises ApiError."""
        dispatcher = Dispatcher(self._router, self._replicas, CLIENT, replica_wait_s=REPLICA_WAIT_S)
        response = ResponseFormat.new(
            chat=isinstance(body, ChatCompletionRequest),
            model=self._target.model_name,
            with_token_ids=bool(body.return_token_ids),
        )
        choices = Choices(dispatcher, requests)
        answer = await collect(choices, response)
        usage = add_usages(choices.usages)
        return RowResult(
            row.custom_id,
            key,
            {"status_code": 200, "request_id": response.response_id, "body": answer},
            None,
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.num_rounds,
            usage.num_accepted_tokens,
        )
