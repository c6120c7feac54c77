"""Batches built by hand, on real ranks: they do what they are built for, without a prefill."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from magicdec.batch import StepResult
from magicdec.config import EngineConfig, ModelConfig, SchedulerConfig
from magicdec.executor import LocalExecutor
from magicdec.profiling.profile_plan import Aspect, MeasurementPlan
from magicdec.profiling.profile_probes import MAX_ADVANCE, Probe, ProbePool
from magicdec.types import SamplingParams
from tests.conftest import engine_config

MAX_MODEL_LEN = 512
CONFIG = EngineConfig(ModelConfig("none"), scheduler=SchedulerConfig(16, 512))


@pytest.fixture(scope="module")
def executor(tiny_model_dir: Path) -> LocalExecutor:
    return LocalExecutor(engine_config(tiny_model_dir, num_blocks=100, refresh_rounds=3))


def steps(executor: LocalExecutor, *probes: Probe) -> Iterator[StepResult]:
    """Rounds of the same sequences, each a little further on."""
    pool = ProbePool(executor._runner._config, executor.num_blocks, MAX_MODEL_LEN)
    ids = range(probes[0].batch_size)
    for i, probe in enumerate(probes):
        yield executor.execute(pool.batch(probe, ids, SamplingParams(), 2 * i))
    yield executor.execute(pool.batch(Probe(1, 1), [99], SamplingParams(), 0, tuple(ids)))


@pytest.mark.parametrize("length", [1, 4, 16])
def test_ngram_drafts_as_many_rows_as_a_probe_asks_for(
    executor: LocalExecutor, length: int
) -> None:
    probe = Probe(3, 100, drafter="ngram", draft_length=length)
    for result in list(steps(executor, probe, probe))[:-1]:
        assert [s.num_draft_tokens for s in result.sequences] == [length] * 3


@pytest.mark.parametrize(
    ("drafter", "observes"), [("streaming", 0), ("snapkv", 2), ("recycled", 2)]
)
def test_a_result_says_how_many_prompts_were_observed(
    executor: LocalExecutor, drafter: str, observes: int
) -> None:
    prompt = Probe(2, 100, num_rows=32, ends_prompt=True, drafter=drafter, draft_budget=24)
    middle = Probe(2, 100, num_rows=32, drafter=drafter, draft_budget=24)
    found = [result.num_observed for result in steps(executor, prompt, middle)]
    assert found == [observes, 0, 0]


@pytest.mark.parametrize(
    ("drafter", "observed"),
    [("streaming", [0] * 7), ("snapkv", [0] * 7), ("recycled", [2, 0, 0, 1, 1, 0, 1])],
)
def test_a_result_says_how_many_rounds_were_observed(
    executor: LocalExecutor, drafter: str, observed: list[int]
) -> None:
    """Sequences without a view are observed at once, then every third round, one at a time."""
    probe = Probe(2, 100, drafter=drafter, draft_length=2, draft_budget=24)
    found = [result.num_observed for result in steps(executor, *[probe] * 7)]
    assert found == [*observed, 0]


def test_a_chunk_before_the_end_of_its_prompt_samples_nothing(executor: LocalExecutor) -> None:
    result = next(steps(executor, Probe(1, 64, num_rows=32)))
    assert result.sequences[0].token_ids == ()


@pytest.mark.parametrize(
    ("probe", "advance"),
    [
        (Probe(1, 640), 0),  # 10 blocks and the room to move on
        (Probe(2, 300), 0),
        (Probe(17, 1), 0),
        (Probe(16, 1, drafter="ngram", draft_length=17), 0),
        (Probe(1, 0), 0),
        (Probe(1, 8), MAX_ADVANCE + 1),
    ],
)
def test_a_probe_that_does_not_fit_is_refused(probe: Probe, advance: int) -> None:
    pool = ProbePool(CONFIG, 10, 1000)
    with pytest.raises(ValueError, match=r"Probe\(batch_size=.* does not fit"):
        pool.batch(probe, range(probe.batch_size), SamplingParams(), advance)


def test_every_queue_begins_at_a_corner_and_goes_to_the_opposite_one() -> None:
    queues = MeasurementPlan(ProbePool(CONFIG, 4000, 8192)).queues()
    first, second = queues[0][0].timed[0], queues[3][0].timed[0]
    assert (first.batch_size, first.context_len, first.rows) == (1, 64, 1)
    assert second.batch_size == 16 and second.context_len > 8000 and second.rows == 17
    assert {m.aspect for queue in queues for m in queue} == set(Aspect)


def test_no_shape_is_timed_twice_in_a_queue() -> None:
    for queue in MeasurementPlan(ProbePool(CONFIG, 4000, 8192)).queues():
        assert len(queue) == len(set(queue))
