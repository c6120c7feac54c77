"""Plain rounds by graphs begin the next step before the host has their tokens, and nothing but time
depends on it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from magicdec.batch import Plan
from magicdec.control.round_policy import FixedPolicy
from magicdec.types import Request, SamplingParams
from tests.conftest import EngineFactory, engine_config
from tests.magicdec.graphs.arrivals import answers, requests_of
from tests.magicdec.graphs.conftest import MakeWatched

if torch.cuda.is_available():
    pytest.skip("a GPU captures graphs itself", allow_module_level=True)

GREEDY = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, seed=5, max_tokens=17, ignore_eos=True)
PENALISED = replace(GREEDY, presence_penalty=0.5, max_tokens=11)
NUM_BEFORE = 5  # steps before the others arrive


def requests(*sampling: SamplingParams) -> list[Request]:
    return requests_of([20, 13, 9], sampling)


def test_plain_rounds_begin_the_next_step_and_emit_the_same_tokens(
    folder: Path, make_engine: EngineFactory, by_graphs: MakeWatched
) -> None:
    """Rows that the host chooses from, prompts that join, and answers that end one by one."""
    config = engine_config(folder, draft_length=0)
    wanted = requests(GREEDY, SAMPLED, PENALISED)
    expected = answers(make_engine(config), wanted, NUM_BEFORE)
    watched = by_graphs(config)
    assert answers(watched.engine, wanted, NUM_BEFORE) == expected
    assert watched.found >= 8
    # Not asked for: where a prompt's end joined the rows.
    assert watched.begun - watched.found <= 2


def test_who_stops_unforeseen_leaves_the_others_their_step(
    folder: Path, make_engine: EngineFactory, by_graphs: MakeWatched
) -> None:
    config = engine_config(folder, draft_length=0)
    tokens = answers(make_engine(config), requests(GREEDY, SAMPLED), NUM_BEFORE)["1"]
    stop = next(i for i, token in enumerate(tokens) if i >= 5 and token not in tokens[:i])
    stopping = replace(SAMPLED, stop_token_ids=(tokens[stop],))
    wanted = requests(replace(GREEDY, max_tokens=25), stopping)
    expected = answers(make_engine(config), wanted, NUM_BEFORE)
    assert len(expected["1"]) == stop + 1
    watched = by_graphs(config)
    assert answers(watched.engine, wanted, NUM_BEFORE) == expected
    assert watched.found >= 14
    assert watched.begun - watched.found <= 2


def test_a_step_that_nobody_asks_for_changes_nothing(
    folder: Path, make_engine: EngineFactory, by_graphs: MakeWatched
) -> None:
    """Drafted rounds between plain ones that had said they would go on."""
    config = engine_config(folder, draft_length=2, drafter="streaming", draft_budget=16)
    wanted = requests(replace(GREEDY, max_tokens=24), replace(SAMPLED, max_tokens=24))
    expected = answers(make_engine(config), wanted, NUM_BEFORE)
    watched = by_graphs(config)
    plain, drafted = Plan("streaming", 0, 16, stands=True), Plan("streaming", 2, 16)

    class Turns(FixedPolicy):
        """Two plain rounds, then a drafted one."""

        num_rounds = 0

        def choose(self, load: object) -> Plan:
            self.num_rounds += 1
            return drafted if self.num_rounds % 3 == 0 else plain

    watched.engine.policy = Turns(plain)
    assert answers(watched.engine, wanted, NUM_BEFORE) == expected
    assert watched.begun - watched.found >= 3 and watched.found >= 3
    assert watched.engine.stats.num_accepted_tokens > 0


def test_a_plan_that_does_not_stand_begins_nothing(folder: Path, by_graphs: MakeWatched) -> None:
    watched = by_graphs(engine_config(folder, draft_length=0))
    watched.engine.policy = FixedPolicy(Plan("streaming", 0, 16))
    answers(watched.engine, requests(GREEDY, SAMPLED), NUM_BEFORE)
    assert watched.begun == 0
