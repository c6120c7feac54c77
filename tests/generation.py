"""Driving an engine to the end, and the answer it must give."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from magicdec.engine import Engine
from magicdec.types import Request, RequestOutput, SamplingParams
from tests.conftest import VOCAB_SIZE

Outputs = dict[str, list[RequestOutput]]


def run(engine: Engine, requests: Iterable[Request] = ()) -> Outputs:
    """Adds the requests, steps until the engine is idle, checks its integrity at every step."""
    for request in requests:
        engine.add(request)
    outputs: Outputs = {}
    for _ in range(20_000):
        if not engine.has_unfinished():
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    raise AssertionError("the engine does not come to rest")


def token_ids(outputs: Iterable[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text(outputs: Iterable[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def requests_of(
    prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
) -> list[Request]:
    """Requests named "0", "1", ..."""
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
    return [
        Request(str(i), tuple(p), s) for i, (p, s) in enumerate(zip(prompts, each, strict=True))
    ]


def run_short_answers(engine: Engine, max_tokens: int) -> None:
    """Answers of one token under that limit. Admission then expects others to be short, so it lets
    in more than the pool holds, and somebody has to be preempted."""
    any_token = tuple(range(VOCAB_SIZE))
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop_token_ids=any_token)
    run(engine, [Request(f"short {i}", (1,), sampling) for i in range(60)])


def random_prompts(lengths: Iterable[int], vocab_size: int = 256, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def generate_reference(path: Path, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """transformers' own greedy continuation, eager attention, fp32, one prompt at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    prompt_ids = torch.tensor([list(prompt)])
    output = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    continuation: list[int] = output[0, len(prompt) :].tolist()
    return continuation
