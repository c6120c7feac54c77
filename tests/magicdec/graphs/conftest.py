"""Engines whose rounds are those of a GPU: triton's kernels, interpreted, and graphs that run anew
at each replay."""

from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from magicdec import runner as runner_module
from magicdec.attention import PagedAttention
from magicdec.batch import Batch, StepResult
from magicdec.config import EngineConfig
from magicdec.engine import Engine
from magicdec.executor import LocalExecutor
from magicdec.graphs.forward_inputs import MOST_ROWS
from magicdec.graphs.next_step import NextStep
from magicdec.kernels.dispatch import triton_backend
from magicdec.kernels.gumbel import GumbelArgmax
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.triton_gumbel import gumbel_argmax
from tests.conftest import FAMILIES, EngineFactory, save_model
from tests.magicdec.graphs.captured_region import tensors_of
from tests.magicdec.graphs.eager_capturer import EagerCapturer


@pytest.fixture(scope="session")
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
        self.begun = self.found = (
            0  # steps that were launched with the one before, and were asked for
        )
        self.drafted: list[list[int]] = []  # of each step, the lengths
        self.runner, self._execute = model_runner, model_runner.execute
        engine._executor.execute = self.execute  # type: ignore[method-assign]

    def execute(self, batch: Batch) -> StepResult:
        """Every sequence of few rows is replayed, in one graph; every longer one is not."""
        self.launched = []
        before = self.capturer.replays["StaticForward"]
        assert_nothing_read_is_written(batch)
        begun = self.next_step()
        result = self._execute(batch)
        rows = [
            len(share.token_ids) + outcome.num_draft_tokens
            for share, outcome in zip(batch.sequences, result.sequences, strict=True)
        ]
        short, long = [n for n in rows if n <= MOST_ROWS], [n for n in rows if n > MOST_ROWS]
        replayed = self.capturer.replays["StaticForward"] - before
        begins = self.next_step() is not None
        found = begun is not None and len(short) > 0 and replayed == begins
        assert replayed == begins + (len(short) > 0) - found
        self.begun += begins
        self.found += found
        assert [n for layout in self.launched for n in layout.query_lens] == long
        decodes = any(share.is_decode_row for share in batch.sequences)
        self.mixed_steps += len(long) > 0 and decodes
        self.observed_rounds += not long and result.num_observed > 0
        self.drafted.append([outcome.num_draft_tokens for outcome in result.sequences])
        return result

    def next_step(self) -> NextStep | None:
        assert self.runner._target_forward is not None
        return self.runner._target_forward._next


def assert_nothing_read_is_written(batch: Batch) -> None:
    """No sequence's context holds a block that another one of the step writes to."""
    read, written = [], []
    for share in batch.sequences:
        size, start = 8, share.num_computed_tokens
        stop = share.num_tokens + share.draft_length
        read.append(set(share.block_table[: -(-start // size)].tolist()))
        written.append(set(share.block_table[start // size : -(-stop // size)].tolist()))
    for i, blocks in enumerate(written):
        others = [r for j, r in enumerate(read) if j != i]
        assert not blocks & set().union(*others)


class MakeWatched(Protocol):
    def __call__(self, config: EngineConfig, choose: GumbelArgmax = gumbel_argmax) -> Watched: ...


@pytest.fixture
def by_graphs(monkeypatch: pytest.MonkeyPatch, make_engine: EngineFactory) -> MakeWatched:
    """An engine whose kernels are triton's, interpreted, and whose graphs run step by step."""

    def make(config: EngineConfig, choose: GumbelArgmax = gumbel_argmax) -> Watched:
        capturers: list[EagerCapturer] = []

        def capturer(device: torch.device) -> EagerCapturer:
            capturers.append(EagerCapturer(device))
            return capturers[-1]

        with monkeypatch.context() as patched:
            patched.setattr(runner_module, "select_backend", lambda *_: triton_backend())
            patched.setattr(runner_module, "select_gumbel_argmax", lambda _: choose)
            patched.setattr(runner_module, "Capturer", capturer)
            watched = Watched(make_engine(config), *capturers)

        def attention(cache: Any, layout: PagedLayout, *rest: Any) -> Any:
            watched.launched.append(layout)
            return PagedAttention(cache, layout, *rest)

        monkeypatch.setattr("magicdec.target_forward.PagedAttention", attention)
        return watched

    return make
