"""What rows of one step draft: alike where they are asked alike, each as its request wishes."""

from dataclasses import replace

from magicdec.batch import Plan
from magicdec.config import SpeculativeConfig
from magicdec.draft_choice import DraftChoices
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
