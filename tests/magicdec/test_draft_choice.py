"""What rows of one step draft: alike where they are asked alike, each as its request wishes."""

from dataclasses import replace

import pytest

from magicdec.batch import Plan
from magicdec.config import SpeculativeConfig
from magicdec.draft_choice import DraftChoices
from magicdec.sequence import Sequence
from magicdec.types import Request, SpeculationParams

CONFIG = SpeculativeConfig()
PLAN = Plan("recycled", 4, 512)
ASKS_NOTHING = Request("r", (0,))


def asking(**wish: object) -> Request:
    return replace(ASKS_NOTHING, speculation=SpeculationParams(**wish))  # type: ignore[arg-type]


def test_rows_that_are_alike_share_a_choice() -> None:
    choices = DraftChoices(PLAN, CONFIG)
    first = choices.choose(ASKS_NOTHING, 4000)
    assert first is not None
    assert (first.drafter, first.draft_length, first.draft_budget) == ("recycled", 4, 512)
    assert choices.choose(ASKS_NOTHING, 8000) is first
    shorter = choices.with_length(first, 2)
    assert shorter == replace(first, draft_length=2)
    assert choices.with_length(first, 2) is shorter and choices.with_length(first, 4) is first


def test_a_view_of_too_much_of_the_context_is_not_drafted_over() -> None:
    choice = DraftChoices(PLAN, CONFIG).choose(ASKS_NOTHING, 1000)
    assert choice is not None and choice.draft_length == 0 and choice.draft_budget == 512


@pytest.mark.parametrize(
    ("num_tokens", "max_model_len", "goes_on"),
    [
        (4000, 8000, True),
        (7991, 8000, True),  # of 7,996 tokens then, the last drafted one's position is 7,999
        (7992, 8000, False),
    ],
)
def test_drafts_go_on_where_the_next_ones_fit_the_context(
    num_tokens: int, max_model_len: int, goes_on: bool
) -> None:
    choices, sequence = DraftChoices(PLAN, CONFIG), Sequence(ASKS_NOTHING, 0, [0] * num_tokens)
    choice = choices.choose(ASKS_NOTHING, num_tokens)
    assert choice is not None
    assert choices.goes_on(choice, sequence, max_model_len) is goes_on
    assert choices.goes_on(choices.with_length(choice, 3), sequence, max_model_len)


@pytest.mark.parametrize(("num_tokens", "goes_on"), [(8324, True), (8325, False)])
def test_drafts_do_not_go_on_where_a_share_of_the_context_may_become_more(
    num_tokens: int, goes_on: bool
) -> None:
    """Of 8,330 tokens it is 833 positions, which is more than 13 steps of 64."""
    request = asking(draft_budget=0.1)
    choices, sequence = DraftChoices(PLAN, CONFIG), Sequence(request, 0, [0] * num_tokens)
    choice = choices.choose(request, num_tokens)
    assert choice is not None and choice.draft_budget == 832
    assert choices.goes_on(choice, sequence, 10_000) is goes_on


def test_a_request_goes_by_its_own_wish() -> None:
    choices = DraftChoices(replace(PLAN, draft_lengths={"r": 1}), CONFIG)
    planned = choices.choose(ASKS_NOTHING, 4000)
    assert planned is not None and planned.draft_length == 1
    assert choices.choose(asking(enabled=False), 4000) is None
    wished = choices.choose(asking(drafter="ngram", draft_length=6), 100)
    assert wished is not None and wished.needs_history
    assert (wished.drafter, wished.draft_length) == ("ngram", 6)
    wide = choices.choose(asking(draft_budget=0.1), 8000)
    assert wide is not None and wide.draft_budget == 832  # 0.1 of it, in steps of 64
