"""The acceptance benchmark's arithmetic and bookkeeping; none of it needs the corpus."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdec.config import SelectionConfig
from magicdec.model_loader import load_tokenizer
from magicdec.types import RequestOutput, Usage
from tests.benchmarks.acceptance_cells import (
    DRAFTERS,
    VIEW_DRAFTERS,
    Block,
    Configuration,
    ResultsFile,
    plain_configuration,
)
from tests.benchmarks.acceptance_report import render
from tests.benchmarks.acceptance_rounds import Acceptance, Stream, distinct_4grams
from tests.benchmarks.acceptance_runs import Target, run_block
from tests.benchmarks.acceptance_tasks import Prompt, Window, read_windows, window_ids
from tests.benchmarks.needle import NUM_FACTS, answer_length, build_context
from tests.conftest import byte_tokenizer
from tests.generation import random_prompts

ROUNDS = st.lists(
    st.integers(0, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=12
)  # (drafted, accepted) of each
SELECTION = SelectionConfig(num_sink_tokens=4, num_recent_tokens=8)


def stream_of(rounds: list[tuple[int, int]]) -> Stream:
    """As an engine reports them: token i of the output is i, the first comes from the prefill."""
    stream = Stream()
    stream.append(RequestOutput("0", (0,), "", Usage(9, 1)))
    drafted = accepted = 0
    for i, (num_draft, num_accepted) in enumerate(rounds, 1):
        drafted, accepted = drafted + num_draft, accepted + num_accepted
        start = len(stream.token_ids)
        tokens = tuple(range(start, start + num_accepted + 1))
        usage = Usage(9, start + len(tokens), 0, i, drafted, accepted)
        stream.append(RequestOutput("0", tokens, "", usage))
    return stream


@given(ROUNDS)
def test_examined_drafts_are_the_accepted_and_one_more_a_rejection(
    rounds: list[tuple[int, int]],
) -> None:
    stream = stream_of(rounds)
    total = Acceptance(bucket=4)
    total.add(stream, stream.token_ids, len(stream.token_ids))
    assert total.accepted == sum(accepted for _, accepted in rounds)
    assert total.examined == total.accepted + sum(a < d for d, a in rounds)
    assert total.drafted >= total.examined
    assert [sum(column) for column in zip(*total.by_position, strict=True)] == (
        [total.accepted, total.examined] if total.examined else []
    )


@given(ROUNDS)
def test_a_position_is_examined_once_or_is_a_bonus_token(rounds: list[tuple[int, int]]) -> None:
    stream = stream_of(rounds)
    examined = [position for done in stream.rounds for position, _ in done.examined]
    bonus = [r.stop - 1 for r in stream.rounds if r.num_accepted_tokens == r.num_draft_tokens]
    assert sorted(examined + bonus) == list(range(1, len(stream.token_ids)))


def test_a_stream_counts_up_to_where_it_leaves_the_plain_one() -> None:
    stream = stream_of([(4, 4), (4, 2), (4, 1)])  # tokens 1-5, 6-8, 9-10
    total = Acceptance(bucket=4)
    total.add(stream, [*range(7), 99, *range(8, 11)], 11)
    assert (total.rounds, total.accepted, total.examined) == (1, 4, 4)
    assert (total.streams, total.diverged, total.compared) == (1, 1, 8)


def test_only_the_answer_counts() -> None:
    stream = stream_of([(4, 2), (4, 4)])  # tokens 1-3, 4-8; the rejected draft is at 3
    total = Acceptance(bucket=128)
    total.add(stream, stream.token_ids, 6)
    assert (total.accepted, total.examined, total.drafted) == (4, 5, 6)


def test_two_rounds_in_one_output_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rounds in one output"):
        Stream().append(RequestOutput("0", (1, 2), "", Usage(9, 2, num_rounds=2)))


def test_a_loop_has_few_distinct_4grams() -> None:
    assert distinct_4grams([list(range(8))]) == 1.0
    assert distinct_4grams([[1, 2] * 10]) == pytest.approx(2 / 17)


def test_committed_windows_are_enough_and_differ() -> None:
    windows = read_windows()
    counts = {task: sum(w.task == task for w in windows) for task in {w.task for w in windows}}
    assert counts == {"novel": 8, "code": 8, "technical": 8, "summary": 8, "needle": 10, "long": 6}
    assert len({(w.source, w.offset) for w in windows}) == len({w.seed for w in windows}) == 48


def test_a_document_that_ends_early_is_refused() -> None:
    with pytest.raises(ValueError, match="5 tokens after offset 2: 6 are needed"):
        window_ids(byte_tokenizer(), "1234567", 2, 6)


def test_a_needle_context_holds_each_fact_and_fits() -> None:
    tokenizer = byte_tokenizer()
    window = Window("needle", "document", 0, 7)
    needle = build_context(window, "a line of the text\n" * 300, tokenizer, 3000, "needle-0")
    text = str(tokenizer.decode(list(needle.token_ids)))
    places = [text.index(fact.sentence) for fact in needle.facts]
    assert places == sorted(places) and len(places) == NUM_FACTS
    assert max(len(needle.prompt(i)) for i in range(NUM_FACTS)) == 3000
    assert len({fact.code for fact in needle.facts}) == NUM_FACTS
    for fact, question in zip(needle.facts, needle.questions, strict=True):
        assert text.count(str(tokenizer.decode(list(question)))) == 1
        answer = tokenizer(f" {fact.code}.")["input_ids"]
        assert answer_length(fact.code, answer, tokenizer) == len(answer) - 1
        assert answer_length(fact.code, answer[:-2], tokenizer) is None


def test_a_line_that_an_interrupted_run_left_half_written_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = ResultsFile(path)
    results.append({"task": "novel"}, {"accepted": 1})
    whole = path.read_text()
    path.write_text(whole + '{"cell": {"ta')
    again = ResultsFile(path)
    assert again.get({"task": "novel"}) == {"accepted": 1} and again.get({"task": "code"}) is None
    assert path.read_text() == whole
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1: not a result"):
        ResultsFile(path)


@pytest.fixture
def block() -> Block:
    prompts = [
        Prompt("novel", f"novel-{i}", tuple(ids), i)
        for i, ids in enumerate(random_prompts([90, 120]))
    ]
    warm_up = [p.token_ids for p in prompts]
    return Block("sampled", 120, 12, 0.8, {"novel": prompts}, warm_up)


def test_a_block_runs_every_cell_once_and_the_report_shows_it(
    block: Block, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tiny_model_dir)
    target = Target("tiny", folder, "float32", 4, load_tokenizer(folder))
    drafts = [Configuration(d, 3, 32, SELECTION) for d in VIEW_DRAFTERS]
    drafts.append(Configuration("ngram", 3, None, SELECTION))
    path = tmp_path / "results.jsonl"
    assert run_block(block, drafts, target, ResultsFile(path), SELECTION)
    first = path.read_text()
    monkeypatch.delattr("tests.benchmarks.acceptance_runs.build_engine")
    again = ResultsFile(path)
    assert run_block(block, drafts, target, again, SELECTION)  # nothing is left to run
    assert path.read_text() == first

    plain = again.get(block.cell("novel", plain_configuration(SELECTION), target.settings))
    assert plain is not None and [len(ids) for ids in plain["token_ids"].values()] == [12, 12]
    for draft in drafts:
        result = again.get(block.cell("novel", draft, target.settings))
        assert result is not None
        assert result["diverged"] == 0 and result["compared"] == 24
        assert result["rounds"] + result["accepted"] == 22  # all but the prefill's tokens
    text = render(again)
    assert "| `ngram` | - | " in text
    other = "(sink tokens 4, recent tokens 8)"  # a row says what is not the default
    assert all(f"| `{drafter}` {other} | 32 | " in text for drafter in VIEW_DRAFTERS)


def test_too_few_answers_stop_a_block_before_its_drafts(
    block: Block, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = str(tiny_model_dir)
    target = Target("tiny", folder, "float32", 4, load_tokenizer(folder))
    codes = {p.name: "123456" for p in block.prompts["novel"]}
    needle = Block("needle", 120, 6, 0.0, block.prompts, block.warm_up, codes)
    results = ResultsFile(tmp_path / "results.jsonl")
    drafts = [Configuration("streaming", 3, 32, SELECTION)]
    for _ in range(2):  # when plain has just run, and when it is in the file
        assert not run_block(needle, drafts, target, results, SELECTION, least_answered=0.3)
        assert [cell["drafter"] for cell, _ in results.cells] == ["plain"]


def test_a_cell_is_known_by_what_its_drafter_reads() -> None:
    other = SelectionConfig(num_sink_tokens=4, num_recent_tokens=8, refresh_rounds=9)
    for drafter in DRAFTERS:
        budget = 64 if drafter in VIEW_DRAFTERS else None
        same = [Configuration(drafter, 4, budget, s).settings() for s in (SELECTION, other)]
        assert (same[0] == same[1]) == (drafter != "recycled")
        assert json.loads(json.dumps(same[0])) == same[0]
