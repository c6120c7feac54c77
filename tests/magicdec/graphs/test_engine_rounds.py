"""Whole rounds of the engine by graphs give the tokens that it gives without: prompts join while
others decode, views are refreshed from replayed rounds, drafts are chosen on the device."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from magicdec import runner as runner_module
from magicdec.attention import PagedAttention
from magicdec.batch import Batch, StepResult
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.graphs.forward_graphs import MOST_ROWS
from magicdec.kernels.dispatch import triton_backend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.triton_gumbel import gumbel_argmax
from magicdec.types import Request, SamplingParams
from tests.conftest import FAMILIES, EngineFactory, engine_config, save_model
from tests.generation import random_prompts, run, token_ids
from tests.magicdec.graphs.captured_region import tensors_of
from tests.magicdec.graphs.eager_capturer import EagerCapturer

if torch.cuda.is_available():
    pytest.skip("a GPU captures graphs itself", allow_module_level=True)

SAMPLED = SamplingParams(temperature=0.8, seed=5, max_tokens=6, ignore_eos=True)
GREEDY = SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True)
NUCLEUS = SamplingParams(temperature=0.8, top_p=0.8, seed=6, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One KV head: triton's interpreter takes 30 ms a program."""
    config = FAMILIES["llama"]()
    config.num_hidden_layers = config.num_key_value_heads = 1
    return save_model(tmp_path_factory.mktemp("small"), config)


class Watched:
    """What an engine by graphs does, and the step that it is at."""

    def __init__(self, engine: Engine, capturer: EagerCapturer) -> None:
        assert isinstance(engine._executor, LocalExecutor)
        model_runner = engine._executor._runner
        capturer.static = tensors_of(model_runner._model, model_runner._pages)
        self.engine, self.capturer = engine, capturer
        self.launched: list[PagedLayout] = []  # in one step
        self.mixed_steps = self.observed_rounds = 0
        self._execute = model_runner.execute
        engine._executor.execute = self.execute  # type: ignore[method-assign]

    def execute(self, batch: Batch) -> StepResult:
        """Every sequence of few rows is replayed, in one graph; every longer one is not."""
        self.launched = []
        before = self.capturer.replays["StaticForward"]
        assert_nothing_read_is_written(batch)
        result = self._execute(batch)
        rows = [
            len(share.token_ids) + outcome.num_draft_tokens
            for share, outcome in zip(batch.sequences, result.sequences, strict=True)
        ]
        short, long = [n for n in rows if n <= MOST_ROWS], [n for n in rows if n > MOST_ROWS]
        assert self.capturer.replays["StaticForward"] - before == (len(short) > 0)
        assert [n for layout in self.launched for n in layout.query_lens] == long
        decodes = any(share.is_decode_row for share in batch.sequences)
        self.mixed_steps += len(long) > 0 and decodes
        self.observed_rounds += not long and result.num_observed > 0
        return result


def assert_nothing_read_is_written(batch: Batch) -> None:
    """No sequence's context holds a block that another one of the step writes to."""
    read, written = [], []
    for share in batch.sequences:
        assert share.draft is not None
        size, start = 8, share.num_computed_tokens
        stop = share.num_tokens + share.draft_length
        read.append(set(share.block_table[: -(-start // size)].tolist()))
        written.append(set(share.block_table[start // size : -(-stop // size)].tolist()))
    for i, blocks in enumerate(written):
        others = [r for j, r in enumerate(read) if j != i]
        assert not blocks & set().union(*others)


@pytest.fixture
def by_graphs(monkeypatch: pytest.MonkeyPatch, make_engine: EngineFactory) -> Callable[..., Any]:
    """An engine whose kernels are triton's, interpreted, and whose graphs run step by step."""

    def make(config: Any) -> Watched:
        capturers: list[EagerCapturer] = []

        def capturer(device: torch.device) -> EagerCapturer:
            capturers.append(EagerCapturer(device))
            return capturers[-1]

        with monkeypatch.context() as patched:
            patched.setattr(runner_module, "select_backend", lambda *_: triton_backend())
            patched.setattr(runner_module, "select_gumbel_argmax", lambda _: gumbel_argmax)
            patched.setattr(runner_module, "Capturer", capturer)
            watched = Watched(make_engine(config), *capturers)

        def attention(cache: Any, layout: PagedLayout, *rest: Any) -> Any:
            watched.launched.append(layout)
            return PagedAttention(cache, layout, *rest)

        monkeypatch.setattr("magicdec.target_forward.PagedAttention", attention)
        return watched

    return make


def requests(sampling: list[SamplingParams]) -> list[Request]:
    """The second prompt begins as the first one does."""
    first, *others = random_prompts([44, 12, 30])
    prompts = [first, first[:40] + others[0], others[1]]
    return [Request(str(i), tuple(prompts[i]), s) for i, s in enumerate(sampling)]


def staggered(engine: Engine, wanted: list[Request]) -> dict[str, list[int]]:
    """One arrives at the beginning, the others while it decodes."""
    engine.add(wanted[0])
    outputs: dict[str, list[int]] = {request.request_id: [] for request in wanted}
    for request in [None, None, *wanted[1:]]:
        if request is not None:
            engine.add(request)
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
    for name, rest in run(engine).items():
        outputs[name] += token_ids(rest)
    return outputs


@pytest.mark.parametrize(
    "sampling", [[SAMPLED, GREEDY, SAMPLED], [GREEDY, SAMPLED, NUCLEUS]], ids=["device", "host"]
)
def test_rounds_by_graphs_give_the_tokens_of_rounds_without(
    folder: Path,
    sampling: list[SamplingParams],
    make_engine: EngineFactory,
    by_graphs: Callable[..., Watched],
) -> None:
    """`recycled` observes each prompt's end and, here, some sequence's rows in every round."""
    config = engine_config(
        folder, draft_length=2, drafter="recycled", draft_budget=24, max_batch_tokens=48
    )
    plain = make_engine(config)
    expected = staggered(plain, requests(sampling))
    watched = by_graphs(config)
    assert staggered(watched.engine, requests(sampling)) == expected
    assert [len(tokens) for tokens in expected.values()] == [s.max_tokens for s in sampling]
    stats = watched.engine.stats
    assert stats == replace(
        plain.stats, draft_seconds=stats.draft_seconds, verify_seconds=stats.verify_seconds
    )
    assert watched.mixed_steps >= 2 and watched.observed_rounds >= 2
    assert watched.capturer.replays["StaticDraftStep"] >= 3 * 2
    assert stats.num_cached_tokens > 0 and stats.num_accepted_tokens > 0
