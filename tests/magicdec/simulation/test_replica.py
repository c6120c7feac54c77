"""The simulated engine against what can be worked out by hand."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdec.routing.reports import find_flaw
from magicdec.simulation import steps as steps_module
from magicdec.simulation.acceptance_law import AcceptanceLaw
from magicdec.simulation.drafting import Drafts
from magicdec.simulation.jobs import Job
from magicdec.simulation.replica import SimulatedReplica
from magicdec.simulation.steps import EngineShape
from magicdec.simulation.trace import TraceRequest
from tests.magicdec.simulation.clusters import Linear


def replica_of(
    shape: EngineShape, drafts: Drafts | None = None, law: AcceptanceLaw | None = None
) -> SimulatedReplica:
    drafting = (drafts or Drafts(0)).drafting(Linear())
    return SimulatedReplica(shape, Linear(), drafting, law or AcceptanceLaw())


def job(number: int, prompt: int, output: int, prefix: str | None = None, shared: int = 0) -> Job:
    return Job(number, TraceRequest(0.0, prompt, output, output, prefix, shared), 0.0)


def run(replica: SimulatedReplica, arrivals: list[tuple[float, Job]]) -> list[Job]:
    """Everything until it idles; arrivals in order of time."""
    finished: list[Job] = []
    end: float | None = None
    pending = list(arrivals)
    while pending or end is not None:
        if pending and (end is None or pending[0][0] < end):
            at, newcomer = pending.pop(0)
            end = replica.submit(newcomer, at)
        else:
            assert end is not None
            done, _, end = replica.end_rounds(end)
            finished += done
    return finished


def shape(**changes: Any) -> EngineShape:
    fields: dict[str, Any] = {"total_kv_tokens": 10_000, "max_num_seqs": 8, "max_batch_tokens": 500}
    return EngineShape(**{**fields, **changes})


def test_one_request_takes_its_prefill_and_its_rounds() -> None:
    replica = replica_of(shape())
    (done,) = run(replica, [(2.0, job(0, 1200, 11))])
    assert done.first_token_s == pytest.approx(2.0 + 3 * 1e-3 + 1200e-5)
    decode = sum(1e-3 + 1e-6 * (1200 + n) for n in range(1, 11))
    # Rounds taken as one are worked out at the middle of what they add.
    assert done.finished_s - done.first_token_s == pytest.approx(decode, rel=1e-3)
    assert replica.busy_s == pytest.approx(done.finished_s - 2.0)


def test_one_token_is_the_prefill_s() -> None:
    (done,) = run(replica_of(shape()), [(0.0, job(0, 100, 1))])
    assert done.finished_s == done.first_token_s == pytest.approx(2e-3)


def test_a_newcomer_waits_for_the_round_not_for_the_rounds() -> None:
    replica = replica_of(shape())
    first, late = job(0, 400, 400), job(1, 100, 2)
    run(replica, [(0.0, first), (0.1, late)])
    assert 0.1 + 2e-3 < late.first_token_s < 0.1 + 2 * 2.1e-3


def test_drafts_bring_their_tokens() -> None:
    """As far as each token's draft is accepted, and the token after it."""
    law = AcceptanceLaw()
    one = job(0, 2000, 201)
    (done,) = run(replica_of(shape(), Drafts(4), law), [(0.0, one)])
    runs, emitted, expected = law.runs(one.trace, 0), 1, 0.0
    while emitted < 201:
        expected += 1e-3 + 4e-4 + 1e-6 * (2000 + emitted)
        emitted += min(runs[emitted], 4) + 1
    assert done.finished_s - done.first_token_s == pytest.approx(expected, rel=0.01)


def test_a_full_replica_lets_requests_wait() -> None:
    replica = replica_of(shape(max_num_seqs=1))
    first, second = job(0, 100, 50), job(1, 100, 50)
    run(replica, [(0.0, first), (0.0, second)])
    assert second.first_token_s > first.finished_s


def answer(number: int, prompt: int, output: int) -> Job:
    return Job(number, TraceRequest(0.0, prompt, output, 300), 0.0)


def test_a_prompt_waits_for_room_for_all_answers() -> None:
    """Three would fit, their answers would not."""
    replica = replica_of(shape(total_kv_tokens=1300))
    jobs = [answer(i, 300, 300) for i in range(3)]
    run(replica, [(0.0, each) for each in jobs])
    assert replica.num_preemptions == 0
    assert max(jobs[0].first_token_s, jobs[1].first_token_s) < jobs[0].finished_s
    assert jobs[2].first_token_s > jobs[0].finished_s


def test_who_is_cheapest_to_compute_again_is_preempted_but_never_the_oldest() -> None:
    """Short answers under the limit let three long ones in."""
    replica = replica_of(shape(total_kv_tokens=1000))
    short = [answer(i, 10, 1) for i in range(40)]
    run(replica, [(0.0, each) for each in short])
    oldest, cheap, dear = answer(40, 100, 300), answer(41, 150, 300), answer(42, 350, 300)
    finished = run(replica, [(9.0, oldest), (9.0, cheap), (9.0, dear)])
    assert replica.num_preemptions > 0
    assert finished == [oldest, dear, cheap]


def test_a_short_prompt_has_its_rows_beside_a_long_one() -> None:
    replica = replica_of(shape())
    long, short = job(0, 5000, 2), job(1, 240, 2)
    run(replica, [(0.0, long), (0.001, short)])
    assert short.first_token_s == pytest.approx(2 * (1e-3 + 500e-5))  # its whole prompt: a half
    assert long.first_token_s > 10 * (1e-3 + 500e-5)


@pytest.mark.parametrize(("target_s", "rows"), [(1.0, 499), (3.5e-3, 219), (1e-4, 64)])
def test_prompts_leave_the_round_within_the_inter_token_target(target_s: float, rows: int) -> None:
    """A round of the row over 301 tokens takes 1.301 ms and 10 us a row of the prompt."""
    replica = replica_of(shape(inter_token_target_s=target_s))
    replica.submit(job(0, 300, 200), 0.0)
    end = replica.submit(job(1, 5000, 2), 0.001)
    _, _, after = replica.end_rounds(end)
    assert after is not None
    assert after - end == pytest.approx(1.301e-3 + rows * 1e-5)


def test_a_prefix_is_computed_once() -> None:
    replica = replica_of(shape())
    first, second = job(0, 1200, 5, "p", 1000), job(1, 1200, 5, "p", 1000)
    run(replica, [(0.0, first), (1.0, second)])
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 1000)
    assert second.first_token_s - 1.0 == pytest.approx(1e-3 + 200e-5)


def test_a_hit_leaves_the_observation_window_to_be_computed() -> None:
    replica = replica_of(shape())
    first, second = job(0, 1000, 2, "p", 1000), job(1, 1000, 2, "p", 1000)
    run(replica, [(0.0, first), (1.0, second)])
    assert second.num_cached_tokens == 1000 - 32


def test_a_prefix_is_given_up_when_the_pool_is_needed() -> None:
    replica = replica_of(shape(total_kv_tokens=3000))
    prefixed = [job(2 * i, 1000, 2, "p", 1000) for i in range(2)]
    run(replica, [(0.0, prefixed[0]), (1.0, job(1, 2900, 2)), (2.0, prefixed[1])])
    assert prefixed[1].num_cached_tokens == 0


JOBS = st.lists(
    st.tuples(st.floats(0, 2), st.integers(1, 700), st.integers(1, 200), st.booleans()),
    min_size=1,
    max_size=12,
)


@given(JOBS, st.integers(1, 4))
def test_everyone_finishes_and_reports_are_true(
    jobs: list[tuple[float, int, int, bool]], seats: int
) -> None:
    replica = replica_of(shape(total_kv_tokens=1000, max_num_seqs=seats))
    arrivals = [
        (at, job(i, prompt, output, "p" if shared else None, prompt // 2 if shared else 0))
        for i, (at, prompt, output, shared) in enumerate(sorted(jobs))
    ]
    pending, end, finished = list(arrivals), None, []
    while pending or end is not None:
        if pending and (end is None or pending[0][0] < end):
            now, newcomer = pending.pop(0)
            end = replica.submit(newcomer, now)
        else:
            assert end is not None
            now = end
            done, _, end = replica.end_rounds(now)
            finished += done
        report = replica.report(now)
        assert find_flaw(report) is None
        assert len(report.live) == report.load.num_running + report.load.num_waiting
        assert report.load.num_running <= seats
        assert end is None or end > now
    assert len(finished) == len(jobs)
    assert report.load.free_kv_tokens == 1000 and report.load.num_prefill_tokens == 0
    for each in finished:
        assert each.arrived_s <= each.first_token_s <= each.finished_s


@given(JOBS)
def test_rounds_taken_as_one_end_where_single_ones_do(
    jobs: list[tuple[float, int, int, bool]],
) -> None:
    """With costs linear in the context, so that the middle of some rounds is their mean."""

    def times() -> list[float]:
        arrivals = [(at, job(i, p, o)) for i, (at, p, o, _) in enumerate(sorted(jobs))]
        finished = run(replica_of(shape()), arrivals)
        return [each.finished_s for each in sorted(finished, key=lambda each: each.number)]

    together = times()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_module, "_MAX_GROWTH", 0.0)
        one_by_one = times()
    assert together == pytest.approx(one_by_one, rel=0.02, abs=0.005)
