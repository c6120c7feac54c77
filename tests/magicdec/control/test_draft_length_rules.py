"""The controller's rules one by one, on costs made to order."""

import math
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.acceptance.model import AcceptanceModel
from magicdec.acceptance.prior import AcceptanceAxes
from magicdec.config import ConfigError
from magicdec.control.draft_length import ControllerConfig, DraftController
from magicdec.control.round_choice import RowOutcome
from magicdec.control.round_costs import RoundLoad
from tests.magicdec.control.controller_world import AXES, LONG, Machine, World, controller
from tests.timing import work_units

LOAD = RoundLoad((7000,) * 4)


@dataclass
class Costs:
    """One second a plain round; `gains` of drafts over plain decoding, as the model expects."""

    acceptance: AcceptanceModel
    gains: dict[tuple[str, int, float], float]  # by drafter, draft length, budget
    loads: list[RoundLoad] = field(default_factory=list)

    def seconds(
        self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
    ) -> float:
        self.loads.append(load)
        gain = self.gains.get((drafter, draft_length, draft_budget), -0.9)
        tokens = self.acceptance.expected_tokens(drafter, draft_budget, 7000, draft_length)
        return 1.0 if draft_length == 0 else tokens / (1.0 + gain)


def controlled(gains: dict[tuple[str, int, float], float]) -> tuple[DraftController, Costs]:
    acceptance = AcceptanceModel(AXES)
    costs = Costs(acceptance, gains)
    return DraftController(acceptance, costs, ControllerConfig(exploration_share=0.0)), costs


def test_in_short_rounds_a_choice_stands_and_all_that_it_showed_is_learnt_after_it() -> None:
    """Rounds below 10 ms: weighed and learnt from once in eight, unless the requests change."""
    machine = Machine(0.004, 2e-5, 1e-6, 2e-8, 1e-10, draft_step=5e-5, draft_per_sequence=1e-6)
    subject = controller(machine, exploration_share=0.0)
    load = LONG.load()
    first = subject.choose(load)
    assert first.plan.draft_length > 0 and first.predicted_seconds < 0.012
    rows = [RowOutcome(first.plan.draft_length, 1)] * len(load.context_lens)
    for _ in range(7):
        subject.observe(load, first, rows, 0.01)
        assert subject.choose(load) is first and subject.hurries
    assert subject.acceptance.num_rounds("long0") == 0
    subject.observe(load, first, rows, 0.01)
    assert subject.acceptance.num_rounds("long0") == 8
    second = subject.choose(load)
    assert not subject.hurries, "what it takes is looked at"
    assert second.plan.draft_length < first.plan.draft_length
    subject.observe(load, second, rows, 0.01)
    assert subject.choose(load) is second and subject.hurries
    assert subject.choose(RoundLoad(())) and not subject.hurries, "a prompt alone"
    fewer = replace(LONG, contexts=LONG.contexts[1:]).load()
    assert subject.choose(fewer) is not second and not subject.hurries
    assert subject.acceptance.num_rounds("long0") == 9


def test_in_long_rounds_every_one_is_weighed_and_learnt_from() -> None:
    subject = controller(exploration_share=0.0)
    load = LONG.load()
    choice = subject.choose(load)
    rows = [RowOutcome(choice.plan.draft_length, 1)] * len(load.context_lens)
    subject.observe(load, choice, rows, choice.predicted_seconds)
    assert subject.acceptance.num_rounds("long0") == 1
    assert subject.choose(load) is not choice and not subject.hurries


def test_plain_is_left_for_more_than_the_margin_alone() -> None:
    subject, costs = controlled({("snapkv", 3, 512): 0.029})
    assert subject.choose(LOAD).plan.draft_length == 0
    costs.gains["snapkv", 3, 512] = 0.031
    subject, costs = controlled(costs.gains)
    plan = subject.choose(LOAD).plan
    assert (plan.drafter, plan.draft_length, plan.draft_budget) == ("snapkv", 3, 512)


def test_drafts_change_for_a_smaller_margin_and_end_where_they_lose() -> None:
    first, second = ("snapkv", 3, 512), ("recycled", 5, 1024)
    subject, costs = controlled({first: 0.2})
    assert subject.choose(LOAD).plan.drafter == "snapkv"
    load = replace(LOAD, num_prefill_rows=64)  # another table
    costs.gains[second] = 0.209
    assert subject.choose(load).plan.drafter == "snapkv"
    load = replace(LOAD, num_prefill_rows=256)
    costs.gains[second] = 0.215
    assert subject.choose(load).plan.drafter == "recycled"
    costs.gains.update({first: -0.1, second: 0.01})
    assert subject.choose(LOAD).plan.draft_length > 0  # what is left is left for a gain
    load = replace(LOAD, num_prefill_rows=512)
    costs.gains[second] = -0.001
    for _ in range(2):
        assert subject.choose(load).plan.draft_length == 5  # one bad round is no proof
    plan = subject.choose(load).plan
    assert (plan.drafter, plan.draft_length) == ("recycled", 0)  # it prepares the likeliest


def test_drafts_end_at_once_where_even_luck_could_not_make_them_pay() -> None:
    subject, costs = controlled({("recycled", 4, 512): 0.2})
    assert subject.choose(LOAD).plan.draft_length == 4
    costs.gains["recycled", 4, 512] = -0.9
    assert subject.choose(replace(LOAD, num_prefill_rows=64)).plan.draft_length == 0


@pytest.mark.parametrize(
    "later",
    [
        replace(LOAD, request_keys=("a", "b", "c", "e")),
        replace(LOAD, request_keys=tuple("abcd"), num_prefill_rows=64),
        replace(LOAD, context_lens=(7000,) * 3, request_keys=tuple("abc")),
    ],
)
def test_plain_decoding_of_the_same_requests_is_weighed_every_fourth_round(
    later: RoundLoad,
) -> None:
    """Another batch is weighed at once."""
    subject, costs = controlled({})
    load = replace(LOAD, request_keys=tuple("abcd"))
    weighed = []
    for n in range(9):
        costs.loads.clear()
        assert subject.choose(replace(load, context_lens=(7000 + n,) * 4)).plan.draft_length == 0
        weighed.append(bool(costs.loads))
    assert weighed == [n % 4 == 0 for n in range(9)]
    costs.gains["snapkv", 3, 512] = 1.0
    costs.loads.clear()
    subject.choose(later)
    assert costs.loads


def test_moved_costs_are_noticed_for_a_load_that_is_known() -> None:
    """A correction of a drafter's costs by more than 2 %, the same load."""

    class Slowing(Machine):
        factor = 1.0

        def seconds(
            self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
        ) -> float:
            whole = super().seconds(load, drafter, draft_length, draft_budget)
            plain = super().seconds(load, drafter, 0, draft_budget)
            return plain + Slowing.factor * (whole - plain)

    subject = controller(Slowing(), exploration_share=0.0)
    load = LONG.load()
    assert subject.choose(load).plan.draft_length > 0
    Slowing.factor = 5.0
    assert subject.choose(load).plan.draft_length == 0


def test_prefill_chunks_are_part_of_the_cost() -> None:
    """A long chunk takes the same whoever drafts: drafts gain more tokens for it."""
    subject, machine = controller(exploration_share=0.0), Machine()
    short = replace(LONG.load(), context_lens=(3000,) * 8)
    alone = subject.choose(short)
    beside = subject.choose(replace(short, num_prefill_rows=480, prefill_products=480 * 2000.0))
    assert beside.plan.draft_length > alone.plan.draft_length
    predicted = machine.seconds(short, alone.plan.drafter, alone.plan.draft_length, 256)
    assert alone.predicted_seconds == pytest.approx(predicted, rel=0.05)
    assert beside.predicted_seconds > alone.predicted_seconds + 480 * machine.per_row


def test_without_decode_rows_the_plan_is_plain() -> None:
    subject = controller()
    subject.choose(LONG.load())
    choice = subject.choose(RoundLoad((), 512, 512 * 300.0))
    assert choice.plan.draft_length == 0 and not choice.draft_lengths
    assert choice.plan.drafter == subject.choose(LONG.load()).plan.drafter
    subject.observe(RoundLoad(()), choice, [], 0.5)


def test_rows_that_may_not_draft_count_for_nothing() -> None:
    """Speculation off for all rows: no draft is worth its cost; for most: the rest still draft."""
    load = LONG.load()
    assert controller().choose(replace(load, draft_limits=(0,) * 8)).plan.draft_length == 0
    limits = (16,) * 4 + (0,) * 4
    choice = controller(exploration_share=0.0).choose(replace(load, draft_limits=limits))
    assert choice.plan.draft_length > 0
    near_end = controller().choose(replace(load, draft_limits=(1,) * 8))
    assert near_end.plan.draft_length <= 1


def test_views_that_are_too_much_of_the_context_are_not_drafted_over() -> None:
    subject = controller(exploration_share=0.0)
    for context_len in (500, 767, 1600, 3100, 6200):
        plan = subject.choose(RoundLoad((context_len,) * 16)).plan
        assert plan.draft_length == 0 or plan.draft_budget * 3 <= context_len


@pytest.mark.parametrize("broken", [math.nan, math.inf, -1.0, 0.0])
def test_costs_that_cannot_be_are_never_chosen(broken: float) -> None:
    class Broken(Machine):
        def seconds(
            self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
        ) -> float:
            if drafter == "recycled" and draft_length > 0:
                return broken
            return super().seconds(load, drafter, draft_length, draft_budget)

    subject = controller(Broken())
    plan = subject.choose(LONG.load()).plan
    assert plan.drafter == "snapkv" and plan.draft_length > 0
    machine = Machine()
    for _ in range(200):
        load = LONG.load()
        choice = subject.choose(load)
        assert choice.plan.drafter != "recycled" or choice.plan.draft_length == 0
        seconds = machine.seconds(load, "snapkv", choice.plan.draft_length, 512)
        subject.observe(load, choice, [RowOutcome(0, 0)] * 8, seconds)


@given(
    batch=st.integers(1, 16),
    context_len=st.integers(1600, 40_000),
    step=st.floats(0.001, 0.2),
    excess=st.floats(1.0, 2.0),
    seed=st.integers(0, 10),
)
@settings(max_examples=15, deadline=None)
def test_what_cannot_pay_with_every_draft_accepted_is_never_tried(
    batch: int, context_len: int, step: float, excess: float, seed: int
) -> None:
    class Hopeless(Machine):
        def seconds(
            self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
        ) -> float:
            return step * (1.0 + excess * draft_length)

    subject = controller(Hopeless(), exploration_share=0.5)
    keys = tuple(f"{seed}-{i}" for i in range(batch))
    load = RoundLoad((context_len,) * batch, request_keys=keys)
    for _ in range(40):
        choice = subject.choose(load)
        assert choice.plan.draft_length == 0 and not choice.explores
        subject.observe(load, choice, [RowOutcome(0, 0)] * batch, step)


def test_trials_for_new_requests_that_cannot_be_paid_hold_up_no_others() -> None:
    """Of two purses one is spent; what the other holds is used, on any drafter."""
    acceptance = AcceptanceModel(AXES)
    costs = Costs(acceptance, {("recycled", 1, 512): 0.01})
    subject = DraftController(acceptance, costs, ControllerConfig(exploration_share=0.01))
    load = replace(LOAD, request_keys=("a", "b", "c", "d"))
    for _ in range(100):
        subject.exploration.pay_in(1.0, 1.0, is_plain=True)
    subject.exploration.charge(10.0, of_unseen=True)
    choices = []
    for _ in range(16):
        choices.append(subject.choose(load))
        rows = [RowOutcome(choices[-1].plan.draft_length, 0)] * 4
        subject.observe(load, choices[-1], rows, choices[-1].predicted_seconds)
    assert choices[0].plan.draft_length == 0
    tried = [choice for choice in choices if choice.explores]
    assert tried and not any(choice.explores_unseen for choice in tried)


def test_no_share_no_trial() -> None:
    played = World(controller(exploration_share=0.0)).play(LONG, 200)
    assert not any(p.choice.explores for p in played)


def test_a_decision_takes_little_time() -> None:
    """Sixteen rows, 3 drafters x 4 budgets x 16 lengths, trials and lengths of single requests
    included; counted in units of other work (timing.py), since others use the machine too."""
    text = replace(LONG, contexts=tuple(6900 + 13 * i for i in range(16)))
    world = World(controller())
    world.play(text, 20)

    class Quick:
        """The cost model's own time is not the controller's."""

        def seconds(
            self, load: RoundLoad, drafter: str, draft_length: int, draft_budget: float
        ) -> float:
            return 0.5 + (0.1 + 1e-5 * draft_budget) * draft_length

    acceptance = world.controller.acceptance
    subject, load = DraftController(acceptance, Quick()), text.load()
    assert AXES.num_settings * AXES.max_draft_length == 192
    assert subject.choose(load).plan.draft_length > 0
    assert work_units(lambda: subject.choose(load)) < 5.0  # two measured


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"request_keys must be empty or one a decode row \(2\)"):
        RoundLoad((10, 20), request_keys=("a",))
    subject, load = controller(), RoundLoad((7000,) * 2)
    with pytest.raises(ValueError, match=r"outcomes must be one a decode row \(2\), got 1"):
        subject.observe(load, subject.choose(load), [RowOutcome(0, 0)], 1.0)
    with pytest.raises(ConfigError, match="leave_plain_gain must be at least 0"):
        ControllerConfig(leave_plain_gain=-0.1)
    with pytest.raises(ConfigError, match="exploration_share must be at most 1, got 2"):
        controller(exploration_share=2.0)
    assert AcceptanceAxes(("ngram",), (256, 512)).served_settings() == [0]
