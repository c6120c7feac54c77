"""Contenders answer alike, are timed while the whole batch decodes, and may fail by themselves."""

import sys
from pathlib import Path

import pytest

from tests.benchmarks.peers.contender import ContenderFailed, ContenderProcess, Spec, start_all
from tests.benchmarks.peers.contest import Task, Watch
from tests.benchmarks.peers.report import PREFILL, draw, render
from tests.generation import random_prompts

MODULES = "tests.benchmarks.peers"


def task(num_sequences: int, num_tokens: int) -> Task:
    return Task([[1]] * num_sequences, num_tokens, temperature=0.0, top_p=1.0, seed=0)


def test_a_batch_is_timed_from_its_last_first_token_to_its_first_end() -> None:
    watch = Watch(task(2, 4))
    for new in ([(0, [5])], [(1, [6, 7])], [(0, [5, 5]), (1, [6])], [(0, [5, 9]), (1, [6])]):
        watch.add(new)
    answer = watch.answer()
    assert answer.token_ids == [[5, 5, 5, 5], [6, 7, 6, 6]]  # cut to what was asked for
    assert answer.num_tokens == 3 + 3  # sequence 1 began with step 2, sequence 0 ended with step 4
    assert answer.seconds > 0.0


def test_an_answer_that_stopped_early_is_an_error() -> None:
    watch = Watch(task(2, 4))
    watch.add([(0, [5]), (1, [6])])
    with pytest.raises(RuntimeError, match=r"\[1, 1\] tokens"):
        watch.answer()


def test_transformers_and_this_engine_give_the_same_tokens(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Two rounds, so that the prompts' K/V are computed once and kept the second time."""
    model = ("--model", str(tiny_model_dir), "--dtype", "float32")
    room = ("--kv-tokens", "4096", "--max-num-seqs", "2")
    specs = [
        Spec("transformers", (sys.executable, "-m", f"{MODULES}.transformers_contender", *model)),
        Spec("magicdec", (sys.executable, "-m", f"{MODULES}.magicdec_contender", *model, *room)),
    ]
    prompts = random_prompts([60, 60])
    started: dict[str, ContenderProcess | str] = {}
    try:
        start_all(specs, tmp_path, started)
        for adaptive in (False, True):
            asked = Task(prompts, 12, temperature=0.0, top_p=1.0, seed=0, adaptive=adaptive)
            theirs, ours = (p.ask(asked) for p in started.values() if not isinstance(p, str))
            assert ours.token_ids == theirs.token_ids
            assert [len(answer) for answer in ours.token_ids] == [12, 12]
            assert min(theirs.rate, ours.rate) > 0.0
    finally:
        for process in started.values():
            assert isinstance(process, ContenderProcess), process
            process.close()


def test_a_contender_that_cannot_start_is_shown_as_failed(tmp_path: Path) -> None:
    command: tuple[str, ...] = (
        sys.executable,
        "-m",
        f"{MODULES}.vllm_contender",
        "--model",
        "none",
    )
    command += ("--dtype", "float32", "--max-model-len", "100", "--max-num-seqs", "1")
    found: dict[str, ContenderProcess | str] = {}
    start_all([Spec("vllm", command)], tmp_path, found)
    assert "No module named 'vllm'" in str(found["vllm"])
    workload = {"name": "short", "batch_size": 1, "context_len": 10}
    place = {"workload": workload, "round": 0}
    answer = {"seconds": 2.0, "num_tokens": 10, "token_ids": [[1, 2, 3, 4, 5]]}
    begin = {"round": PREFILL, "begin_seconds": 0.1, "seconds": 0.0, "num_tokens": 0}
    begun = {**answer, **place, **begin, "contender": "magicdec plain"}
    longer = {"workload": {**workload, "name": "longer"}}
    records = [
        {**begun, "is_first": True},
        {**begun, **longer, "is_first": False},
        {**place, **longer, "contender": "magicdec plain", **answer},
        {**place, "contender": "vllm", "error": found["vllm"]},
        {**place, "contender": "magicdec plain", **answer},
    ]
    table = render(records)
    assert "| short | vllm | failed: ModuleNotFoundError" in table
    assert "| short | magicdec plain | 5.0 [5.0 .. 5.0] |  | 100% | 100 |" in table
    assert "| longer | magicdec plain | 5.0 [5.0 .. 5.0] |  | 100% |  |" in table, "it was kept"
    draw(records, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 0


def test_a_contender_that_ends_says_so(tmp_path: Path) -> None:
    script = "print('{\"ready\": true}', flush=True); input(); raise SystemExit(3)"
    process = ContenderProcess(Spec("short", (sys.executable, "-c", script)), tmp_path / "log")
    process.wait_until_ready()
    with pytest.raises(ContenderFailed, match="ended with 3"):
        process.ask(task(1, 1))
    process.close()
