"""Reports that cannot be true are named as such."""

import math
from dataclasses import replace
from typing import Any

import pytest

from magicdec.routing.reports import FinishedRequest, LiveRequest, ReplicaReport, find_flaw
from magicdec.stats import EngineLoad
from tests.magicdec.routing.replicas import report


def with_load(**changes: Any) -> ReplicaReport:
    return replace(report(), load=replace(EngineLoad(1, 1, 500, 1000), **changes))


LIVE = LiveRequest("r", 3, 10)
ENDED = FinishedRequest("r", 5, 3, 10)

FLAWS: list[tuple[ReplicaReport, str]] = [
    (with_load(free_kv_tokens=math.nan), "free_kv_tokens must be a whole number from 0 to 1000"),
    (with_load(free_kv_tokens=1001), "got 1001"),
    (with_load(free_kv_tokens=-1), "got -1"),
    (with_load(free_kv_tokens=0.5), "got 0.5"),
    (with_load(total_kv_tokens=math.inf), "total_kv_tokens"),
    (with_load(total_kv_tokens=0, free_kv_tokens=0), "total_kv_tokens"),
    (with_load(num_running=None), "num_running"),
    (with_load(num_waiting=2**30), "num_waiting"),
    (with_load(num_prefill_tokens=-5), "num_prefill_tokens"),
    (with_load(num_waiting_tokens=math.nan), "num_waiting_tokens"),
    (report(number=-1), "number"),
    (report(max_num_seqs=0), "max_num_seqs"),
    (report(max_batch_tokens=0), "max_batch_tokens"),
    (report(live=(replace(LIVE, num_output_tokens=11),)), "num_output_tokens of r is 11"),
    (report(live=(replace(LIVE, max_tokens=0),)), "max_tokens of r is 0"),
    (report(finished=(replace(ENDED, num_output_tokens=-1),)), "num_output_tokens of r is -1"),
    (report(finished=(replace(ENDED, num_prompt_tokens=-1),)), "num_prompt_tokens of r is -1"),
]


@pytest.mark.parametrize(("wrong", "message"), FLAWS, ids=[message for _, message in FLAWS])
def test_what_cannot_be_true_is_named(wrong: ReplicaReport, message: str) -> None:
    assert message in str(find_flaw(wrong))


def test_a_plausible_report_has_no_flaw() -> None:
    assert find_flaw(with_load()) is None
    assert find_flaw(report(free=0, total=1, live=(LIVE,), finished=(ENDED,))) is None
