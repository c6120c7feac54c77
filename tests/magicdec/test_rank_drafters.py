"""What a step drafts, and whose time that is."""

import time

import numpy as np
import pytest
import torch

from magicdec.batch import DraftChoice, ScheduledSequence
from magicdec.device_span import DeviceSpan
from magicdec.drafters.next_drafts import NextDrafts
from magicdec.drafters.ngram import NgramDrafter
from magicdec.drafters.rank_drafters import Drafted, RankDrafters
from magicdec.types import SamplingParams

HOST = torch.device("cpu")


def span_of(seconds: float) -> DeviceSpan:
    span = DeviceSpan(HOST)
    time.sleep(seconds)
    span.end()
    return span


def test_what_a_step_drafted_itself_is_part_of_its_time() -> None:
    spans = [span_of(0.01), span_of(0.02)]
    drafting, rest = Drafted((), spans).divide(0.5)
    assert drafting == spans[0].seconds() + spans[1].seconds() >= 0.03
    assert rest == 0.5 - drafting


def test_what_was_drafted_before_a_step_is_not() -> None:
    """It may have taken longer than the step that verifies it."""
    drafting, verifying = span_of(0.03), span_of(0.01)
    divided = Drafted((), [drafting], verifying).divide(0.02)
    assert divided == (drafting.seconds(), verifying.seconds())


@pytest.mark.parametrize("draft_length", [0, 2])
def test_a_step_has_verifications_own_time_where_others_drafts_are_in_its_way(
    draft_length: int,
) -> None:
    """Begun before it, and not asked for."""
    sampling, history = SamplingParams(max_tokens=9), np.array([4, 5, 6, 4, 5])
    choice = DraftChoice("ngram", draft_length, 0, needs_history=True)
    row = ScheduledSequence(
        0,
        history[-1:],
        4,
        np.arange(1),
        sampling,
        num_prompt_tokens=3,
        history=history,
        draft=choice,
    )
    drafters = RankDrafters({"ngram": NgramDrafter()}, HOST)
    assert drafters.propose([row]).verifying is None
    drafters._next = NextDrafts({}, span_of(0.0))
    drafted = drafters.propose([row])
    assert drafted.verifying is not None and len(drafted.drafts[0]) == draft_length
    assert len(drafted.spans) == (draft_length > 0)
    assert drafters.propose([row]).verifying is None
