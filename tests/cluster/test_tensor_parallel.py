"""Two real ranks over gloo against the unsharded model, and against what the preflight foretold."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from magicdec.cluster.preflight import preflight
from magicdec.cluster.tensor_parallel import ShardError, slice_bounds
from magicdec.sampler import Sampler
from tests.cluster.rank_process import rows_of_every_kind, sample_ids, wide_logits
from tests.cluster.shard_models import SHARDABLE
from tests.conftest import VOCAB_SIZE, save_model

NUM_RANKS = 2
BF16 = ("llama", "gemma3", "qwen3_moe")  # the last is loaded whole, then split
ROOT = Path(__file__).parents[2]
Ranks = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shards")
    return {name: save_model(root / name, config()) for name, config in SHARDABLE.items()}


def run_ranks(root: Path, models: list[str]) -> Ranks:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    outputs = [root / f"{rank}.pt" for rank in range(NUM_RANKS)]
    command = [sys.executable, "-m", "tests.cluster.rank_process"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(NUM_RANKS), port, str(output), *models], cwd=ROOT
        )
        for rank, output in enumerate(outputs)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * NUM_RANKS
    return [torch.load(output) for output in outputs]


@pytest.fixture(scope="module")
def ranks(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    models = [f"float32={folder}" for folder in folders.values()]
    models += [f"bfloat16={folders[name]}" for name in BF16]
    return run_ranks(tmp_path_factory.mktemp("ranks"), models)


@pytest.mark.parametrize("name", SHARDABLE)
def test_logits_are_the_unsharded_models_and_equal_on_all_ranks(
    name: str, folders: dict[str, Path], ranks: Ranks
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    with torch.inference_mode():
        expected = whole(input_ids=sample_ids(), use_cache=False).logits
    torch.testing.assert_close(
        ranks[0][f"{name} float32"]["logits"], expected, rtol=1e-4, atol=3e-4
    )
    assert torch.equal(ranks[0][f"{name} float32"]["logits"], ranks[1][f"{name} float32"]["logits"])


@pytest.mark.parametrize("name", SHARDABLE)
def test_token_ids_are_the_unsharded_models_and_equal_on_all_ranks(
    name: str, folders: dict[str, Path], ranks: Ranks
) -> None:
    """Greedy, and sampled with top-k, top-p, min-p, penalties and a bias."""
    whole = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    with torch.inference_mode():
        logits = whole(input_ids=sample_ids(), use_cache=False).logits[0]
    expected = Sampler([]).sample(logits, rows_of_every_kind(len(logits)))
    assert [rank[f"{name} float32"]["token_ids"] for rank in ranks] == [expected] * NUM_RANKS


def test_what_ranks_do_not_send_changes_no_token(ranks: Ranks) -> None:
    """Of 1,501 scores a rank sends 256 first."""
    logits = wide_logits()
    expected = Sampler([]).sample(logits, rows_of_every_kind(len(logits)))
    assert len(set(expected)) > 20
    assert [rank["wide"]["token_ids"] for rank in ranks] == [expected] * NUM_RANKS


@pytest.mark.parametrize("name", SHARDABLE)
def test_a_rank_has_its_rows_of_the_head_alone_and_a_tied_one_takes_nothing(
    name: str, ranks: Ranks
) -> None:
    config = SHARDABLE[name]()
    rows = VOCAB_SIZE // NUM_RANKS
    for rank in ranks:
        found = rank[f"{name} float32"]
        assert found["share"] == (sample_ids().shape[1], rows)
        expected = 0 if config.tie_word_embeddings else rows * config.hidden_size * 4
        assert found["head_bytes"] == expected


@pytest.mark.parametrize("name", SHARDABLE)
def test_preflight_foretells_every_shape(name: str, folders: dict[str, Path], ranks: Ranks) -> None:
    found = [rank[f"{name} float32"]["shapes"] for rank in ranks]
    foretold = preflight(str(folders[name]), NUM_RANKS).shapes
    assert {key: tuple(f[key] for f in found) for key in found[0]} == foretold


@pytest.mark.parametrize("name", BF16)
def test_bf16_keeps_rotary_frequencies_in_fp32(
    name: str, folders: dict[str, Path], ranks: Ranks
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.bfloat16)
    expected = dict(whole.named_buffers())
    assert any(buffer.dtype == torch.float32 for buffer in expected.values())
    for rank in ranks:
        buffers = rank[f"{name} bfloat16"]["buffers"]
        assert buffers.keys() == expected.keys()
        for key, buffer in expected.items():
            assert buffers[key].dtype == buffer.dtype
            assert torch.equal(buffers[key], buffer)


def test_slices_tile_the_cut_axis_in_rank_order() -> None:
    shapes: list[tuple[int, ...]] = [(4, 8), (2, 8), (0, 8)]
    assert slice_bounds("w", shapes, (6, 8), 0) == [(0, 4), (0, 8)]
    assert slice_bounds("w", shapes, (6, 8), 1) == [(4, 6), (0, 8)]
    assert slice_bounds("w", shapes, (6, 8), 2) == [(6, 6), (0, 8)]


@pytest.mark.parametrize(
    ("shapes", "full"),
    [([(4, 8), (4, 8)], (6, 8)), ([(3, 4), (3, 4)], (6, 8)), ([(6,), (6,)], (6, 8))],
)
def test_shards_that_do_not_tile_are_refused_by_name(
    shapes: list[tuple[int, ...]], full: tuple[int, ...]
) -> None:
    with pytest.raises(ShardError, match=r"^layer\.weight: "):
        slice_bounds("layer.weight", shapes, full, 0)
