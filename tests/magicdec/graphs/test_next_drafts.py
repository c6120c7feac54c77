"""Drafted rounds by graphs begin the next round's drafts before the host has their tokens, and
nothing but time depends on it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from magicdec.batch import Batch, Plan, ScheduledSequence, StepResult
from magicdec.control.round_policy import FixedPolicy
from magicdec.drafters.self_draft import SelfDrafter
from magicdec.drafts import Draft
from magicdec.engine import Engine
from magicdec.types import Request, SamplingParams
from tests.conftest import EngineFactory, engine_config
from tests.magicdec.graphs.arrivals import answers, requests_of
from tests.magicdec.graphs.conftest import MakeWatched, Watched

if torch.cuda.is_available():
    pytest.skip("a GPU captures graphs itself", allow_module_level=True)

GREEDY = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, seed=5, max_tokens=16, ignore_eos=True)
NUM_DRAFTS = 2
NUM_BEFORE = 4  # steps before the others arrive


def requests(*sampling: SamplingParams) -> list[Request]:
    return requests_of([40, 13, 9], sampling)


class Begun:
    """How many rounds began the next one's drafts, and how many found theirs begun."""

    def __init__(self, watched: Watched) -> None:
        self._drafters, self._execute = watched.runner._drafters, watched._execute
        watched._execute = self.execute
        drafter = self._drafters.by_name["streaming"]
        assert isinstance(drafter, SelfDrafter)
        self._propose = drafter.propose
        drafter.propose = self.propose  # type: ignore[method-assign]
        self.begun = self.found = self._num_proposed = 0

    def propose(self, sequences: list[ScheduledSequence]) -> Sequence[Draft]:
        self._num_proposed += 1
        return self._propose(sequences)

    def execute(self, batch: Batch) -> StepResult:
        before, was_begun = self._num_proposed, self._drafters._next is not None
        result = self._execute(batch)
        self.begun += self._drafters._next is not None
        asks = any(s.draft is not None and s.draft.draft_length > 0 for s in batch.sequences)
        is_found = asks and self._num_proposed == before
        self.found += is_found and was_begun
        return result


def engines(
    folder: Path, make_engine: EngineFactory, by_graphs: MakeWatched, drafter: str = "streaming"
) -> tuple[Engine, Watched]:
    config = engine_config(folder, draft_length=NUM_DRAFTS, drafter=drafter, draft_budget=24)
    return make_engine(config), by_graphs(config)


def test_drafted_rounds_begin_the_next_drafts_and_accept_as_many(
    folder: Path, make_engine: EngineFactory, by_graphs: MakeWatched
) -> None:
    """Views that are chosen again, prompts that join, and answers that end one by one."""
    plain, watched = engines(folder, make_engine, by_graphs, "recycled")
    wanted = requests(GREEDY, SAMPLED, replace(SAMPLED, seed=6, max_tokens=9))
    expected = answers(plain, wanted, NUM_BEFORE)
    begun = Begun(watched)
    assert answers(watched.engine, wanted, NUM_BEFORE) == expected
    stats = watched.engine.stats
    assert stats == replace(
        plain.stats, draft_seconds=stats.draft_seconds, verify_seconds=stats.verify_seconds
    )
    assert stats.num_accepted_tokens > 0
    assert begun.found >= 4
    assert begun.begun - begun.found <= 2


def test_who_stops_unforeseen_leaves_the_others_their_drafts(
    folder: Path, make_engine: EngineFactory, by_graphs: MakeWatched
) -> None:
    plain, watched = engines(folder, make_engine, by_graphs)
    tokens = answers(plain, requests(GREEDY, SAMPLED), NUM_BEFORE)["1"]
    stop = next(i for i, token in enumerate(tokens) if i >= 5 and token not in tokens[:i])
    stopping = replace(SAMPLED, stop_token_ids=(tokens[stop],))
    wanted = requests(replace(GREEDY, max_tokens=18), stopping)
    expected = answers(plain, wanted, NUM_BEFORE)
    assert len(expected["1"]) == stop + 1
    begun = Begun(watched)
    assert answers(watched.engine, wanted, NUM_BEFORE) == expected
    assert begun.found >= 5
    assert begun.begun - begun.found <= 2


def in_turns(plans: list[Plan]) -> FixedPolicy:
    class Turns(FixedPolicy):
        num_rounds = 0

        def choose(self, load: object) -> Plan:
            self.num_rounds += 1
            return plans[self.num_rounds % len(plans)]

    return Turns(plans[0])


DRAFTED = Plan("streaming", NUM_DRAFTS, 24, stands=True)


def test_drafts_that_nobody_asks_for_change_nothing(
    folder: Path, make_engine: EngineFactory, by_graphs: MakeWatched
) -> None:
    """Another budget, another drafter, none: after rounds that had said they would go on."""
    plain, watched = engines(folder, make_engine, by_graphs)
    wanted = requests(replace(GREEDY, max_tokens=22), replace(SAMPLED, max_tokens=18))
    others = [
        replace(DRAFTED, draft_budget=32),
        replace(DRAFTED, drafter="ngram"),
        replace(DRAFTED, draft_length=0),
    ]
    plans = [plan for other in others for plan in (DRAFTED, DRAFTED, other)]
    plain.policy, watched.engine.policy = in_turns(plans), in_turns(plans)
    begun = Begun(watched)
    assert answers(watched.engine, wanted, NUM_BEFORE) == answers(plain, wanted, NUM_BEFORE)
    assert begun.begun - begun.found >= 2 and begun.found >= 2


def test_shorter_drafts_are_the_first_of_those_that_were_begun(
    folder: Path, make_engine: EngineFactory, by_graphs: MakeWatched
) -> None:
    plain, watched = engines(folder, make_engine, by_graphs)
    wanted = requests(replace(GREEDY, max_tokens=14), replace(SAMPLED, max_tokens=14))
    plans = [replace(DRAFTED, draft_length=1, stands=False), DRAFTED]
    plain.policy, watched.engine.policy = in_turns(plans), in_turns(plans)
    begun = Begun(watched)
    assert answers(watched.engine, wanted, NUM_BEFORE) == answers(plain, wanted, NUM_BEFORE)
    assert watched.engine.stats.num_accepted_tokens == plain.stats.num_accepted_tokens
    assert begun.found >= 2 and begun.begun - begun.found <= 1


def test_a_plan_that_does_not_stand_begins_nothing(
    folder: Path, make_engine: EngineFactory, by_graphs: MakeWatched
) -> None:
    _, watched = engines(folder, make_engine, by_graphs)
    watched.engine.policy = FixedPolicy(replace(DRAFTED, stands=False))
    begun = Begun(watched)
    answers(watched.engine, requests(replace(GREEDY, max_tokens=6)), NUM_BEFORE)
    assert begun.begun == 0 and watched.engine.stats.num_draft_tokens > 0
