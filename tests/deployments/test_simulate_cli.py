"""`magicdec simulate`: what it prints, what it takes, and one line for what people can mend."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from magicdec.cost_model import VERIFY, StepCost, draft_kind
from magicdec.deployments.cli import app
from magicdec.profiling.profile_cache import ProfileKey, config_digest
from magicdec.profiling.step_profile import PREFILL
from magicdec.simulation.policies import POLICIES

RUNNER = CliRunner()
FIGURES = ["--bandwidth", "3000", "--flops", "600", "--memory", "70", "--overhead-ms", "1"]
TRAFFIC = ["--rate", "20", "--requests", "60", "--output-tokens", "5:40"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the config of an 8B model, and no weights."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(folder)
    return str(folder)


def simulate(*arguments: str) -> str:
    result = RUNNER.invoke(app, ["simulate", *arguments], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""  # no progress bar without a terminal
    return result.stdout


def document(*arguments: str) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(simulate(*arguments, "--json"))
    return runs


def test_it_has_help() -> None:
    assert "--replicas" in simulate("--help")


def test_a_table_of_every_policy_and_draft_fits_100_columns(model: str) -> None:
    text = simulate(model, *FIGURES, *TRAFFIC, "--draft", "adaptive", "--draft", "4")
    lines = text.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert "…" not in text
    assert lines[0].startswith("60 requests, 2 replicas of ")
    for policy in POLICIES:
        at = lines.index(policy)
        assert [lines[at + n].split()[0] for n in (1, 2)] == ["adaptive", "4"]
    assert "up to 511" in text and "2,048-4,095" in text


def test_json_holds_what_the_table_does(model: str) -> None:
    policy = "kv-aware+prefix+classes"
    (run,) = document(model, *FIGURES, *TRAFFIC, "--policy", policy, "--prefix-share", "0.5")
    assert run["policy"] == policy and run["drafts"] == "adaptive"
    assert run["num_finished"] == 60 and run["num_refused"] == run["num_preemptions"] == 0
    assert run["first_token"]["p50"] <= run["first_token"]["p90"] <= run["first_token"]["p99"]
    assert sum(c["num_requests"] for c in run["first_token_by_class"]) == 60
    assert 0.0 < run["cached_share"] < 0.7 and 0.0 < run["busy_share"] <= 1.0
    assert run["mean_draft_length"] >= 0.0 and run["simulator_s"] > 0.0


def test_a_seed_gives_one_result(model: str) -> None:
    def runs(seed: str) -> list[dict[str, Any]]:
        arguments = [model, *FIGURES, *TRAFFIC, "--policy", "kv-aware", "--seed", seed]
        return [{**run, "simulator_s": 0.0} for run in document(*arguments)]

    assert runs("3") == runs("3") != runs("4")


def profile_of(model: str, folder: Path, settings: str = "", **changes: Any) -> str:
    key = ProfileKey(
        model=config_digest(model),
        dtype="bfloat16",
        draft_model="",
        device="a machine",
        backend="torch",
        tensor_parallel_size=1,
        num_threads=2,
        settings=settings or json.dumps({"max_num_seqs": 5, "max_batch_tokens": 300}),
        versions="",
    )
    cost = asdict(StepCost(1e-2, 5e-2, 1e-3, 1e-10, 1e-8, 1e-3))
    kinds = (VERIFY, PREFILL, draft_kind("recycled"))
    content = {
        "format": 2,
        "key": asdict(key),
        "costs": dict.fromkeys(kinds, cost),
        "row_seconds": [[1, 1e-3], [8, -1e-3]],
        "num_shapes": 40,
    }
    path = folder / "profile.json"
    path.write_text(json.dumps({**content, **changes}))
    return str(path)


def test_a_trace_is_replayed_on_a_machine_s_own_costs(model: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"arrival_s": 0.5, "num_prompt_tokens": 900, "max_tokens": 32, "prefix_id": "p"}\n'
        '{"arrival_s": 1.5, "num_prompt_tokens": 100, "max_tokens": 32}\n'
    )
    arguments = [model, "--profile", profile_of(model, tmp_path), "--trace", str(trace)]
    text = simulate(*arguments)
    assert "2 requests, 2 replicas of 16,384 KV tokens, 5 sequences and 300 rows a step" in text
    assert "profile of a machine, 2 threads" in text
    (run,) = document(*arguments, "--policy", "least-requests", "--draft", "0")
    assert run["num_finished"] == 2
    # By hand: three chunks of 300 rows that compute, over 300, 600 and 900 positions.
    first = 3 * 1e-2 + 900 * 1e-3 + 300 * 1800 * 1e-8
    assert run["first_token"]["p99"] == pytest.approx(first + 0.005, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --trace FILE or --rate REQUESTS_PER_SECOND"),
        (["--rate", "0"], "requests_per_s must be above 0, got 0.0"),
        (["--rate", "1", "--requests", "0"], "num_requests must be at least 1, got 0"),
        (["--rate", "1", "--prompt-tokens", "9:5"], "prompt_tokens must be bounds from 1 upwards"),
        (["--rate", "1", "--prompt-tokens", "few"], "prompt_tokens must be LOW:HIGH or one number"),
        (["--rate", "1", "--prefix-share", "2"], "prefix_share must be between 0 and 1, got 2.0"),
        (["--rate", "1", "--policy", "best"], "policy must be one of least-requests, kv-aware"),
        (["--rate", "1", "--draft", "17"], "draft_length must be at most 16, got 17"),
        (["--rate", "1", "--draft", "-1"], "draft must be adaptive or a draft length, got '-1'"),
        (["--rate", "1", "--acceptance", "1.5"], "acceptance must be between 0 and 1, got 1.5"),
        (["--rate", "1", "--replicas", "0"], "num_replicas must be at least 1, got 0"),
        (["--rate", "1", "--max-num-seqs", "0"], "max_num_seqs must be at least 1, got 0"),
        (["--rate", "1", "--max-batch-tokens", "9"], "max_batch_tokens must be at least 48, got 9"),
        (["--rate", "1", "--inter-token-target", "0"], "inter_token_target_s must be above 0"),
        (["--rate", "1", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["--rate", "1", "--gpu", "h1000"], "h100"),
        (["--rate", "1", "--kv-tokens", "9"], "KV tokens, a replica has 9"),
        (["--rate", "1", "--tp", "33"], "tensor_parallel_size must be between 1 and 32"),
        (["--rate", "1", "--drafter", "ngram"], "drafter must be one of streaming, snapkv"),
        (["--rate", "1", "--profile", "p.json"], "give profile or bandwidth, not both"),
        (["--trace", "/no/such/trace"], "cannot read /no/such/trace"),
    ],
)
def test_mistakes_are_one_line(model: str, arguments: list[str], message: str) -> None:
    check_one_line([model, *FIGURES, *arguments], message)


def test_a_line_of_a_trace_is_named(model: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"arrival_s": 0, "num_prompt_tokens": 9, "max_tokens": 1}\n{"arrival_s": 0}\n'
    )
    message = f"{trace}:2: num_prompt_tokens must be a whole number from 1, got None"
    check_one_line([model, *FIGURES, "--trace", str(trace)], message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": {}}, "it is no profile: it has no key"),
        ({"costs": {}}, "it has no cost of draft:recycled, prefill, verify"),
        ({"format": 0}, "its format is 0"),
        ({"settings": "[1]"}, "its settings are [1]"),
    ],
)
def test_a_profile_that_cannot_be_used_is_named(
    model: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = profile_of(model, tmp_path, **changes)
    check_one_line([model, "--rate", "1", "--profile", path], message)


def test_the_profile_of_another_model_is_refused(model: str, tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    path = profile_of(model, tmp_path)
    check_one_line([str(tmp_path), "--rate", "1", "--profile", path], "it is another model's than")
    missing = [model, "--rate", "1", "--profile", "/no/such/profile"]
    check_one_line(missing, "cannot read profile /no/such/profile")


def check_one_line(arguments: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["simulate", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("magicdec: ") and message in result.stderr
    assert result.stderr.count("\n") == 1
