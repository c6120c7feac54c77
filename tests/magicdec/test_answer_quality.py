"""T12: speculation answers as well as plain decoding, and as long, where tokens need not be equal.

bf16 lets near-ties fall either way and optimal coupling draws other tokens, so what is compared is
the share of needle questions answered and the lengths of the answers, at a 0.1 % false-alarm rate
each; the seeds are fixed.
"""

import inspect
import math
import os
import turtle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME, resolve_model
from magicdec.drafts import Draft
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.model_loader import load_tokenizer, read_model_facts
from magicdec.sampler import SamplerRow
from magicdec.types import Request, SamplingParams
from magicdec.verification import Meanwhile, OptimalCoupling, VerificationRule
from tests.benchmarks.acceptance_tasks import Window
from tests.benchmarks.needle import NeedleContext, build_context
from tests.conftest import engine_config
from tests.generation import run, text, token_ids

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CONTEXT = 1500
BUDGET = 128  # holds few of the twenty facts: a draft that is believed answers wrongly
MAX_TOKENS = 32  # after the code the text goes on as Python, up to its first parenthesis
Z = 3.29  # two-sided 0.1 % of the normal law
KOLMOGOROV = 1.95  # 0.1 % of the two-sample statistic


class Credulous(OptimalCoupling):
    """The planted fault: every drafted token stands."""

    def verify(
        self,
        logits: torch.Tensor,
        rows: list[SamplerRow],
        drafts: Sequence[Draft],
        meanwhile: Meanwhile | None = None,
    ) -> list[tuple[int, ...]]:
        judged = super().verify(logits, rows, drafts)
        return [
            (*(p.token_id for p in draft), tokens[-1])
            for draft, tokens in zip(drafts, judged, strict=True)
        ]


@dataclass(frozen=True)
class Answers:
    """Of every question under every seed."""

    correct: list[bool]
    lengths: list[int]

    def agrees(self, plain: "Answers") -> bool:
        n = len(self.correct)
        p, q = sum(self.correct) / n, sum(plain.correct) / n
        pooled = (p + q) / 2
        score = abs(p - q) <= Z * math.sqrt(2 * pooled * (1 - pooled) / n)
        longest = range(max(*self.lengths, *plain.lengths) + 1)
        mine, theirs = (np.searchsorted(sorted(a.lengths), longest, "right") for a in (self, plain))
        return score and np.abs(mine - theirs).max() / n <= KOLMOGOROV * math.sqrt(2 / n)


@pytest.fixture(autouse=True)
def every_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def contexts() -> list[NeedleContext]:
    tokenizer = load_tokenizer(resolve_model(EMBEDDED_MODEL_NAME))
    windows = [Window("needle", "turtle", 9000 * i, seed=i) for i in range(2)]
    source = inspect.getsource(turtle)
    return [build_context(w, source, tokenizer, CONTEXT, str(w.seed)) for w in windows]


def answers(
    contexts: list[NeedleContext],
    draft_length: int,
    drafter: str = "streaming",
    verification: str = "shared_gumbel",
    rule: type[OptimalCoupling] | None = None,
) -> Answers:
    path = resolve_model(EMBEDDED_MODEL_NAME)
    config = engine_config(
        Path(path),
        drafter=drafter,
        draft_length=draft_length,
        draft_budget=BUDGET,
        block_size=64,
        num_blocks=400,
        max_batch_tokens=512,
        max_num_seqs=16,
        dtype="bfloat16",
        verification=verification,
    )
    tokenizer, facts = load_tokenizer(path), read_model_facts(path)
    executor = LocalExecutor(config)
    if rule is not None:
        runner = executor._runner
        judge: VerificationRule = rule(runner._rule._sampler)  # type: ignore[attr-defined]
        runner._rule = judge
    engine = Engine(config, executor, tokenizer, facts)
    correct, lengths = [], []
    for context in contexts:
        requests = [
            Request(
                str(i),
                context.prompt(i),
                SamplingParams(temperature=0.7, seed=i, max_tokens=MAX_TOKENS, stop=("(",)),
            )
            for i in range(len(context.facts))
        ]
        outputs = run(engine, requests)
        for i, fact in enumerate(context.facts):
            correct.append(fact.code in text(outputs[str(i)]))
            lengths.append(len(token_ids(outputs[str(i)])))
    name = rule.__name__ if rule else verification
    print(f"{name}, {drafter} {draft_length}: {sum(correct)} of {len(correct)} answered")
    return Answers(correct, lengths)


def test_answers_are_as_good_and_as_long_as_plain_ones(contexts: list[NeedleContext]) -> None:
    plain = answers(contexts, draft_length=0)
    assert sum(plain.correct) > 0.3 * len(plain.correct), "the model must know the answers"
    assert len(set(plain.lengths)) > 3
    for drafter in ("streaming", "snapkv", "recycled", "ngram"):
        assert answers(contexts, 4, drafter).agrees(plain), drafter
    for drafter in ("streaming", "recycled"):
        coupled = answers(contexts, 4, drafter, "optimal_coupling")
        assert coupled.agrees(plain), f"{drafter}, optimal coupling"
    believed = answers(contexts, 4, "streaming", "optimal_coupling", Credulous)
    assert not believed.agrees(plain), "a rule that believes its draft must be found out"
