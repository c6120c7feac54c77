"""What a step drafts, and whose time that is."""

import time

import torch

from magicdec.device_span import DeviceSpan
from magicdec.drafters.rank_drafters import Drafted

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
