"""Requests that join one that decodes already, and what an engine answers them."""

from collections.abc import Sequence

from magicdec.engine import Engine
from magicdec.types import Request, SamplingParams
from tests.generation import random_prompts, run, token_ids


def requests_of(prompt_lens: Sequence[int], sampling: Sequence[SamplingParams]) -> list[Request]:
    """As many as there are kinds of sampling."""
    prompts = random_prompts(list(prompt_lens[: len(sampling)]))
    return [Request(str(i), tuple(prompts[i]), own) for i, own in enumerate(sampling)]


def answers(engine: Engine, wanted: list[Request], num_before: int) -> dict[str, list[int]]:
    """All but the first arrive after so many steps. Nothing is lost of the pool."""
    engine.add(wanted[0])
    early = [output for _ in range(num_before) for output in engine.step()]
    for request in wanted[1:]:
        engine.add(request)
    found: dict[str, list[int]] = {request.request_id: [] for request in wanted}
    for output in early:
        found[output.request_id] += output.token_ids
    for name, rest in run(engine).items():
        found[name] += token_ids(rest)
    engine.check_integrity()
    return found
