"""Who gets KV blocks: drafts take what is free, admission leaves room, the cheapest makes way."""

from dataclasses import replace
from pathlib import Path
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.batch import Batch, Plan
from magicdec.config import EngineConfig
from magicdec.scheduler import Scheduler
from magicdec.sequence import Sequence
from magicdec.types import Request, SamplingParams, SpeculationParams
from tests.conftest import engine_config
from tests.scheduling import SimulatedRank

PLAIN, DRAFTING = Plan("streaming", 0, 512), Plan("streaming", 8, 512)
BLOCK = 8
MAX_MODEL_LEN = 2048


def config_of(num_blocks: int, max_num_seqs: int = 8) -> EngineConfig:
    config = engine_config(
        Path("unused"),
        block_size=BLOCK,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=600,
    )
    return replace(config, cache=replace(config.cache, prefix_caching=False))


class Steps:
    """A scheduler and its simulated rank."""

    def __init__(self, num_blocks: int, seed: int = 0) -> None:
        config = config_of(num_blocks)
        self.scheduler = Scheduler(config, num_blocks, MAX_MODEL_LEN)
        self.rank = SimulatedRank(config, num_blocks, Random(seed))
        self.num_added = 0

    def add(self, num_prompt: int, max_tokens: int, name: str | None = None) -> Sequence:
        prompt = tuple((self.num_added + i) % 5 for i in range(num_prompt))
        sampling = SamplingParams(max_tokens=max_tokens)
        request = Request(name or str(self.num_added), prompt, sampling)
        sequence = Sequence(request, self.num_added, list(prompt))
        self.num_added += 1
        self.scheduler.add(sequence)
        return sequence

    def learn(self, max_tokens: int, num_output: int) -> None:
        """Answers of that length under that limit."""
        for _ in range(100):
            sequence = self.add(1, max_tokens)
            sequence.token_ids += [0] * num_output
            self.scheduler.finish(sequence)

    def step(self, plan: Plan) -> None:
        self.scheduler.begin_step()
        self.finish_step(self.scheduler.schedule(plan))

    def finish_step(self, batch: Batch) -> None:
        result = self.rank.execute(batch)
        for sequence, emitted in self.scheduler.update(batch, result):
            left = sequence.request.sampling.max_tokens - sequence.num_output_tokens
            sequence.token_ids += emitted[:left]
            if emitted and sequence.num_output_tokens >= sequence.request.sampling.max_tokens:
                self.scheduler.finish(sequence)
            elif emitted:
                self.scheduler.release_lookahead(sequence)
        self.scheduler.check_integrity()


def test_a_newcomer_waits_until_the_expected_answers_have_room() -> None:
    """64 blocks of 8: two prompts of 100 with answers of 100 take 50, a third does not fit."""
    steps = Steps(num_blocks=64)
    first, second, third = (steps.add(100, 100) for _ in range(3))
    for _ in range(3):
        steps.step(PLAIN)
    assert steps.scheduler.running == [first, second]
    assert list(steps.scheduler.waiting) == [third]


def test_what_answers_were_shorter_than_their_limit_lets_more_in() -> None:
    steps = Steps(num_blocks=64)
    steps.learn(max_tokens=100, num_output=8)
    sequences = [steps.add(100, 100) for _ in range(3)]
    for _ in range(3):
        steps.step(PLAIN)
    assert steps.scheduler.running == sequences


def test_alone_it_is_admitted_however_long_its_answer_may_be() -> None:
    steps = Steps(num_blocks=64)
    only = steps.add(100, 10_000)
    steps.step(PLAIN)
    assert steps.scheduler.running == [only]


def test_the_cheapest_to_compute_again_is_preempted_and_never_the_oldest() -> None:
    steps = Steps(num_blocks=64)
    steps.learn(max_tokens=300, num_output=2)
    oldest, long, short, middle = (steps.add(n, 300) for n in (20, 200, 40, 120))
    while steps.scheduler.num_preemptions == 0:
        steps.step(PLAIN)
    assert list(steps.scheduler.waiting) == [short]
    assert steps.scheduler.running == [oldest, long, middle]


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 120), min_size=2, max_size=6),
    spare_blocks=st.integers(0, 40),
    num_steps=st.integers(1, 60),
    seed=st.integers(0, 2**32),
)
def test_drafts_preempt_nobody_whom_plain_decoding_would_not(
    prompts: list[int], spare_blocks: int, num_steps: int, seed: int
) -> None:
    """At every state that is reached with drafts: the next step's preemptions are decided before
    its draft lengths are asked for, and every plain row has its block whatever is drafted."""
    steps = Steps(num_blocks=64 + spare_blocks, seed=seed)
    steps.learn(max_tokens=200, num_output=2)
    for num_prompt in prompts:
        steps.add(num_prompt, 200)
    scheduler = steps.scheduler
    for _ in range(num_steps):
        load = scheduler.begin_step()
        before = scheduler.num_preemptions
        rows = [s for s in scheduler.running if s.decodes]
        for sequence in rows:
            assert len(sequence.block_table) * BLOCK >= len(sequence.token_ids)
        batch = scheduler.schedule(DRAFTING)
        assert scheduler.num_preemptions == before
        assert sum(s.is_decode_row for s in batch.sequences) == len(load.context_lens) == len(rows)
        result = steps.rank.execute(batch)
        for sequence, emitted in scheduler.update(batch, result):
            left = 200 - sequence.num_output_tokens
            sequence.token_ids += emitted[:left]
            if emitted and sequence.num_output_tokens >= 200:
                scheduler.finish(sequence)
            elif emitted:
                scheduler.release_lookahead(sequence)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 120), min_size=1, max_size=6),
    spare_blocks=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)
def test_a_step_that_goes_on_has_room_and_preempts_nobody_for_it(
    prompts: list[int], spare_blocks: int, seed: int
) -> None:
    """Beside the same requests under a plan that does not stand, up to the first preemption."""
    standing, other = Steps(48 + spare_blocks, seed), Steps(48 + spare_blocks, seed)
    for steps in (standing, other):
        for num_prompt in prompts:
            steps.add(num_prompt, 60)
    num_going_on = 0
    for _ in range(70):
        load = standing.scheduler.begin_step()
        batch = standing.scheduler.schedule(replace(PLAIN, stands=True))
        num_going_on += batch.goes_on
        if batch.goes_on:
            assert load.num_prefill_rows == 0
            for share in batch.sequences:
                assert len(share.block_table) * BLOCK > share.num_tokens
        standing.finish_step(batch)
        other.step(PLAIN)
        assert standing.scheduler.num_preemptions == other.scheduler.num_preemptions
    assert num_going_on > 0 or standing.scheduler.num_preemptions > 0


def test_a_step_of_prompts_or_without_a_free_block_does_not_go_on() -> None:
    stands, steps = replace(PLAIN, stands=True), Steps(num_blocks=2)
    steps.add(13, 40)
    found = []
    for plan in (stands, stands, replace(DRAFTING, stands=True), stands):
        steps.scheduler.begin_step()
        batch = steps.scheduler.schedule(plan)
        found.append((batch.goes_on, batch.sequences[0].num_tokens))
        if batch.sequences[0].draft_length > 0:
            batch = replace(batch, sequences=(batch.sequences[0]._replace(draft=None),))
        steps.finish_step(batch)
    # The prompt; room for a 15th token; a draft; no room for a 17th.
    assert found == [(False, 13), (True, 14), (True, 15), (False, 16)]


def test_single_requests_may_draft_other_lengths_and_prefill_may_be_bounded() -> None:
    steps = Steps(num_blocks=300)
    first, second = steps.add(40, 100, "first"), steps.add(40, 100, "second")
    steps.step(PLAIN)
    newcomer = steps.add(400, 100, "newcomer")
    load = steps.scheduler.begin_step()
    assert load.request_keys == ("first", "second")
    assert load.num_prefill_rows == 400
    plan = Plan("ngram", 4, 24, {"second": 2}, max_prefill_rows=100, prompt_drafter="snapkv")
    batch = steps.scheduler.schedule(plan)
    assert [s.draft_length for s in batch.sequences if s.is_decode_row] == [4, 2]
    (chunk,) = (s for s in batch.sequences if not s.is_decode_row)
    assert len(chunk.token_ids) == 100
    assert chunk.draft is not None and chunk.draft.drafter == "snapkv"
    assert (first.decodes, second.decodes, newcomer.decodes) == (True, True, False)


def test_a_short_prompt_is_computed_beside_a_long_one_that_came_before() -> None:
    steps = Steps(num_blocks=300)
    long, short = steps.add(1500, 10), steps.add(50, 10)
    steps.step(PLAIN)
    assert (long.num_computed_tokens, short.num_output_tokens) == (550, 1)


def test_a_request_with_a_wish_of_its_own_is_not_the_controller_s() -> None:
    steps = Steps(num_blocks=300)
    for name, wish in (
        ("plain", SpeculationParams()),
        ("auto", SpeculationParams(drafter="auto")),
        ("off", SpeculationParams(enabled=False)),
        ("length", SpeculationParams(draft_length=3)),
        ("named", SpeculationParams(drafter="ngram")),
    ):
        request = Request(name, (1, 2, 3), SamplingParams(max_tokens=50), speculation=wish)
        steps.scheduler.add(Sequence(request, len(steps.scheduler.waiting), [1, 2, 3]))
    steps.step(PLAIN)
    load = steps.scheduler.begin_step()
    limits = dict(zip(load.request_keys, load.draft_limits, strict=True))
    assert limits == {"plain": 48, "auto": 48, "off": 0, "length": 0, "named": 0}
