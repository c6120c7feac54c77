"""Traffic from a seed and from a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magicdec.routing.prefix_affinity import num_prefix_hashes
from magicdec.simulation.trace import (
    PoissonTraffic,
    TraceError,
    TraceRequest,
    check_fits,
    read_trace,
)


def test_the_same_seed_gives_the_same_traffic() -> None:
    traffic = PoissonTraffic(50, 3.0, prefix_share=0.5, num_keys=4, seed=7)
    assert traffic.requests() == traffic.requests()
    assert traffic.requests() != PoissonTraffic(50, 3.0, seed=8).requests()


def test_arrivals_and_lengths_have_their_law() -> None:
    """20,000 draws; each bound is above four standard errors: once in 10^4 seeds it would fail."""
    traffic = PoissonTraffic(20_000, 5.0, (100, 4000), (10, 1000), prefix_share=0.3, seed=1)
    requests = traffic.requests()
    gaps = np.diff([r.arrival_s for r in requests])
    assert np.mean(gaps) == pytest.approx(0.2, rel=0.03)
    assert np.std(gaps) == pytest.approx(0.2, rel=0.05)
    outputs = np.log([r.num_output_tokens for r in requests])
    assert np.median(outputs) == pytest.approx(np.log(100), rel=0.02)
    shared = [r for r in requests if r.prefix_id is not None]
    assert len(shared) / 20_000 == pytest.approx(0.3, abs=0.015)
    assert all(r.num_prompt_tokens >= r.num_prefix_tokens == 1000 for r in shared)
    assert {r.max_tokens for r in requests} == {1000}


def test_hashes_are_shared_as_far_as_the_prefix_reaches() -> None:
    first = TraceRequest(0.0, 5000, 1, 1, "p", 2048)
    hashes, others = first.prefix_hashes(1), first.prefix_hashes(2)
    shared = num_prefix_hashes(2048)
    assert len(hashes) == num_prefix_hashes(5000)
    assert hashes[:shared] == others[:shared]
    assert not set(hashes[shared:]) & set(others[shared:])
    assert not set(TraceRequest(0.0, 5000, 1, 1).prefix_hashes(1)) & set(others[:shared])


def write(path: Path, *lines: Any) -> Path:
    trace = path / "trace.jsonl"
    trace.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return trace


LINE = {"arrival_s": 1.0, "num_prompt_tokens": 300, "num_output_tokens": 20}


def test_a_file_is_sorted_and_filled_in(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {**LINE, "num_output_tokens": 50, "max_tokens": 100, "key": "k"},
        "",
        {**LINE, "arrival_s": 0, "prefix_id": 5},
    )
    assert read_trace(path) == [
        TraceRequest(0, 300, 20, 50, "5", 300),
        TraceRequest(1.0, 300, 50, 100, key="k"),
    ]


def test_acceptance_is_the_line_s_and_a_limit_alone_was_used_up(tmp_path: Path) -> None:
    line = {"arrival_s": 0, "num_prompt_tokens": 300, "max_tokens": 40, "acceptance": 0.7}
    assert read_trace(write(tmp_path, line)) == [TraceRequest(0, 300, 40, 40, acceptance=0.7)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "trace.jsonl:1 is not JSON"),
        ([1], "must be an object, got [1]"),
        ({**LINE, "arrival": 3}, "arrival is not a field of a trace"),
        ({**LINE, "arrival_s": -1}, "arrival_s must be a number from 0 upwards, got -1"),
        ({**LINE, "arrival_s": None}, "arrival_s must be a number from 0 upwards, got None"),
        ('{"arrival_s": NaN}', "arrival_s must be a number from 0 upwards, got nan"),
        ({**LINE, "num_prompt_tokens": 0}, "num_prompt_tokens must be a whole number from 1"),
        ({**LINE, "num_output_tokens": 2.5}, "num_output_tokens must be a whole number from 1"),
        ({**LINE, "max_tokens": 19}, "max_tokens must be at least num_output_tokens (20), got 19"),
        ({**LINE, "num_prefix_tokens": -1}, "num_prefix_tokens must be a whole number from 0"),
        ({**LINE, "acceptance": 1.2}, "acceptance must be between 0 and 1, got 1.2"),
        ({**LINE, "acceptance": "high"}, "acceptance must be between 0 and 1, got 'high'"),
        ({**LINE, "num_prompt_tokens": True}, "num_prompt_tokens must be a whole number from 1"),
        ({"arrival_s": 1.0}, "num_prompt_tokens must be a whole number from 1, got None"),
        ("", "holds no request"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(TraceError) as caught:
        read_trace(write(tmp_path, line))
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot read .*nowhere"):
        read_trace(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_requests": 0}, "num_requests must be at least 1, got 0"),
        ({"requests_per_s": 0.0}, "requests_per_s must be above 0, got 0.0"),
        ({"requests_per_s": float("nan")}, "requests_per_s must be above 0, got nan"),
        ({"prefix_share": 1.5}, "prefix_share must be between 0 and 1, got 1.5"),
        ({"prompt_tokens": (9, 5)}, "prompt_tokens must be bounds from 1 upwards, got 9, 5"),
        ({"output_tokens": (0, 5)}, "output_tokens must be bounds from 1 upwards, got 0, 5"),
        ({"num_keys": 0}, "num_keys must be at least 1, got 0"),
    ],
)
def test_impossible_traffic_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError) as caught:
        PoissonTraffic(**{"num_requests": 5, "requests_per_s": 1.0, **changes})
    assert str(caught.value) == message


def test_what_fits_no_replica_is_named() -> None:
    with pytest.raises(TraceError, match="request 1 needs 320 KV tokens, a replica has 319"):
        check_fits([TraceRequest(0, 1, 1, 1), TraceRequest(0, 300, 20, 20)], 319)
