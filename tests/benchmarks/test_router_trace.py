"""The router benchmark's trace, records and tables; none of it needs Ray or a model."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdec.simulation.trace import PoissonTraffic, TraceError, TraceRequest, read_trace
from tests.benchmarks.bench_router_client import Answer, parse_event
from tests.benchmarks.bench_router_records import (
    ARMS,
    ROUTER,
    SERVE,
    Record,
    Repetition,
    Results,
    begin,
    make_records,
    makespan_s,
    quantile,
)
from tests.benchmarks.bench_router_report import class_table, render, verdict
from tests.benchmarks.bench_router_trace import (
    cut_prompts,
    make_trace,
    sample,
    scale_arrivals,
    write_trace,
)

TRAFFIC = PoissonTraffic(80, 1.0, prefix_share=0.3, seed=3)
RUN = {
    "command": "make bench BENCH=router",
    "machine": "a machine",
    "torch": "2",
    "ray": "2",
    "model": "tiny",
    "dtype": "float32",
    "replicas": 2,
    "threads": 1,
    "requests": 2,
    "prompt_tokens": [100, 4000],
    "output_tokens": 32,
    "prefix_tokens": 1000,
    "prefix_share": 0.3,
    "load": 0.8,
    "capacity": 400.0,
    "seeds": [0],
    "repeat": 1,
}


def request(
    num_prompt_tokens: int, prefix: str | None = None, prefix_tokens: int = 0
) -> TraceRequest:
    return TraceRequest(0.0, num_prompt_tokens, 32, 32, prefix, prefix_tokens)


def record(arm: str, number: int, num_prompt_tokens: int, ttft_s: float | None) -> Record:
    answer = Answer(
        due=10.0,
        sent=10.0,
        first=None if ttft_s is None else 10.0 + ttft_s,
        done=20.0,
        num_output_tokens=32,
        cached_tokens=64,
        error=None if ttft_s is not None else "500: it broke",
    )
    arrivals = {0: ("replica", 10.5)}
    repetition = Repetition(0, 0)
    made = make_records(arm, repetition, [request(num_prompt_tokens)], [answer], arrivals)
    return replace(made[0], request=number)


def test_lengths_stay_in_their_bounds_and_prompts_go_on_after_the_prefix() -> None:
    requests = make_trace(TRAFFIC)
    shared = [r for r in requests if r.prefix_id is not None]
    plain = [r for r in requests if r.prefix_id is None]
    assert 12 <= len(shared) <= 36  # 24 expected
    assert all(1100 <= r.num_prompt_tokens <= 4000 for r in shared)
    assert all(r.num_prefix_tokens == 1000 for r in shared)
    assert all(100 <= r.num_prompt_tokens <= 4000 for r in plain)
    assert (
        min(r.num_prompt_tokens for r in plain)
        < 200
        < 2000
        < max(r.num_prompt_tokens for r in plain)
    )
    assert requests == make_trace(TRAFFIC) != make_trace(replace(TRAFFIC, seed=4))


def test_a_prefix_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(TraceError, match=r"must reach 1100 .* got 1000"):
        make_trace(replace(TRAFFIC, prompt_tokens=(100, 1000)))


def test_the_simulator_reads_the_same_trace(tmp_path: Path) -> None:
    requests = scale_arrivals(make_trace(TRAFFIC), 2.0)
    write_trace(tmp_path / "trace.jsonl", requests)
    keyless = [replace(r, key="") for r in requests]
    assert read_trace(tmp_path / "trace.jsonl") == keyless
    assert requests[-1].arrival_s == 2.0 * make_trace(TRAFFIC)[-1].arrival_s


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.lists(st.booleans(), min_size=12))
def test_prompts_share_their_prefix_and_nothing_else(
    lengths: list[int], shares: list[bool]
) -> None:
    requests = [
        request(10 + length, "p", 10) if share else request(length)
        for length, share in zip(lengths, shares, strict=False)
    ]
    needed = sum(lengths) + 10 * any(r.prefix_id for r in requests)
    prompts = cut_prompts(requests, range(needed))
    assert [len(p) for p in prompts] == [r.num_prompt_tokens for r in requests]
    own = [p[r.num_prefix_tokens :] for p, r in zip(prompts, requests, strict=True)]
    assert len({p[:10] for p, r in zip(prompts, requests, strict=True) if r.prefix_id}) <= 1
    assert len({t for ids in own for t in ids}) == sum(lengths)  # no token is in two of them
    with pytest.raises(ValueError, match=f"holds {needed - 1} tokens, the prompts need {needed}"):
        cut_prompts(requests, range(needed - 1))


def test_a_sample_stands_for_the_trace() -> None:
    requests = make_trace(TRAFFIC)
    chosen = sample(requests, 20)
    lengths = [requests[i].num_prompt_tokens for i in chosen]
    assert lengths == sorted(lengths, reverse=True) and len(set(chosen)) == 20
    assert mean(lengths) == pytest.approx(mean(r.num_prompt_tokens for r in requests), rel=0.1)
    shared = sum(requests[i].prefix_id is not None for i in chosen)
    assert abs(shared - sum(r.prefix_id is not None for r in requests) / 4) <= 1
    assert sorted(sample(requests, 500)) == list(range(80))


def test_the_last_chunk_has_the_usage_and_only_tokens_count_as_first() -> None:
    assert parse_event(": keep-alive") is None and parse_event("data: [DONE]") is None
    held_back = parse_event('data: {"choices": [{"text": "", "token_ids": []}]}')
    assert held_back is not None and not held_back.has_tokens
    some = parse_event('data: {"choices": [{"text": "", "token_ids": [5]}]}')
    assert some is not None and some.has_tokens and some.usage is None
    last = parse_event(
        'data: {"choices": [], "usage": {"completion_tokens": 32, '
        '"prompt_tokens_details": {"cached_tokens": 960}}}'
    )
    assert last is not None and last.usage == (32, 960) and not last.has_tokens
    failed = parse_event('data: {"error": {"message": "it broke"}}')
    assert failed is not None and failed.error == "it broke"


def test_a_quantile_is_a_measured_value_and_what_never_came_is_last() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile(list(map(float, range(1, 11))), 0.9) == 9.0
    assert quantile([1.0, math.inf], 0.9) == math.inf


def test_records_survive_the_file_and_are_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "router.jsonl"
    results = begin(path, RUN)
    results.append(path, [record(ROUTER, 0, 300, 0.5)], {"arm": ROUTER, "num_chosen": 1})
    again = Results.read(path)
    assert (again.run, again.records, again.stats) == (RUN, results.records, results.stats)
    assert again.records[0].ttft_s == 0.5 and again.records[0].admitted_s == 0.5
    assert makespan_s(again.records) == 10.0
    with pytest.raises(FileExistsError):
        begin(path, RUN)
    path.write_text('{"arm": "router"}\n')
    with pytest.raises(ValueError, match="line 1: not a result"):
        Results.read(path)


def test_the_verdict_is_by_length_class_and_a_lost_request_loses() -> None:
    records = [record(arm, 0, 300, 1.0 if arm == ROUTER else 2.0) for arm in ARMS]
    records += [record(arm, 1, 3000, None if arm == ROUTER else 9.0) for arm in ARMS]
    assert verdict(records).startswith("p90 better in 1 of 2 length classes; tokens/s 1.000")
    table = class_table(records).splitlines()
    assert table[2].startswith("| to 511 | 1 | 1.00 | 2.00 | 0.50 |")
    assert table[3].startswith("| 2048 to 4095 | 1 | inf | 9.00 | inf |")
    stats = [{"arm": arm, "num_chosen": 2 * (arm == ROUTER)} for arm in ARMS]
    text = render(Results(RUN, records, stats))
    assert "2 of 2" in text and "0 of 2" in text and "router: 500: it broke" in text
    assert "One arm only" in verdict([r for r in records if r.arm == SERVE])
