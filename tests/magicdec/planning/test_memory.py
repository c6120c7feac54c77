"""What fits: weights on the fullest rank, the KV pool beside them, and what an error offers."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdec.config import ConfigError
from magicdec.planning.devices import known_device
from magicdec.planning.memory import MemoryPlan, PlanModel
from tests.magicdec.planning.plans import LLAMA_31_8B, LLAMA_31_70B, LLAMA_32_1B

H100 = known_device("h100", "bfloat16")
GPUS = st.sampled_from(["h100", "h200", "a100-80g", "b200", "l40s"])


def test_weights_of_known_models() -> None:
    """8.03 and 70.6 billion parameters, 1.24 where the head is the embedding; two bytes each."""
    for model, billions in ((LLAMA_31_8B, 8.03), (LLAMA_31_70B, 70.55), (LLAMA_32_1B, 1.236)):
        assert model.rank_weight_bytes(1) == pytest.approx(2e9 * billions, rel=0.002)


def test_a_rank_holds_its_share_and_the_whole_embedding() -> None:
    embedding = 2 * 4096 * 128256
    rest = LLAMA_31_8B.rank_weight_bytes(1) - embedding
    assert LLAMA_31_8B.rank_weight_bytes(8) == pytest.approx(rest / 8 + embedding)


def test_a_tied_head_takes_no_memory_of_its_own_on_any_number_of_ranks() -> None:
    embedding = 2 * 2048 * 128256
    rest = LLAMA_32_1B.rank_weight_bytes(1) - embedding
    assert LLAMA_32_1B.rank_weight_bytes(2) == pytest.approx(rest / 2 + embedding)


def test_an_uneven_split_is_as_full_as_its_fullest_rank() -> None:
    three, four = (MemoryPlan(LLAMA_31_8B, H100, ranks) for ranks in (3, 4))
    assert three.kv_bytes(1, 1000) == pytest.approx(1000 * 131072 * 3 / 8)
    assert four.kv_bytes(1, 1000) == pytest.approx(1000 * 131072 * 2 / 8)
    assert LLAMA_31_8B.even_degrees == [1, 2, 4, 8]


@given(GPUS, st.integers(1, 8), st.integers(1, 300), st.integers(1, 131072))
def test_capacity_is_all_that_fits_and_no_more(
    gpu: str, ranks: int, batch_size: int, context_len: int
) -> None:
    memory = MemoryPlan(LLAMA_31_8B, known_device(gpu, "bfloat16"), ranks)
    pool = memory.kv_pool_bytes
    assert memory.kv_bytes(1, memory.capacity_tokens) <= pool
    assert memory.kv_bytes(1, memory.capacity_tokens + 1) > pool
    assert memory.kv_bytes(memory.max_batch(context_len), context_len) <= pool
    assert memory.kv_bytes(memory.max_batch(context_len) + 1, context_len) > pool
    assert memory.kv_bytes(batch_size, memory.max_context(batch_size)) <= pool * (1 + 1e-9)
    assert memory.kv_bytes(batch_size, memory.max_context(batch_size) + 1) > pool


@given(st.integers(1, 7))
def test_more_ranks_hold_more(ranks: int) -> None:
    """Of the pool; not of tokens, where the fullest rank stays as full."""
    fewer, more = (MemoryPlan(LLAMA_31_8B, H100, n) for n in (ranks, ranks + 1))
    assert more.kv_pool_bytes > fewer.kv_pool_bytes
    assert more.capacity_tokens > fewer.capacity_tokens


def test_a_draft_model_takes_its_weights_and_windows() -> None:
    alone = MemoryPlan(LLAMA_31_8B, H100, 1)
    beside = MemoryPlan(LLAMA_31_8B, H100, 1, LLAMA_32_1B, 512)
    taken = alone.kv_pool_bytes - beside.kv_pool_bytes
    assert taken == pytest.approx(LLAMA_32_1B.rank_weight_bytes(1))
    window = 512 * LLAMA_32_1B.geometry.kv_bytes_per_token
    assert beside.kv_bytes(3, 100) == pytest.approx(alone.kv_bytes(3, 100) + 3 * window)


def refusal(model: PlanModel, gpu: str, ranks: int, batch_size: int, context_len: int) -> str:
    memory = MemoryPlan(model, known_device(gpu, "bfloat16"), ranks)
    with pytest.raises(ConfigError) as caught:
        memory.check([batch_size], [context_len])
    return str(caught.value)


def test_weights_that_do_not_fit_name_bytes_and_the_degree_that_would() -> None:
    message = refusal(LLAMA_31_70B, "h100", 1, 1, 2048)
    assert "tensor_parallel_size 1: the weights take 141.1 GB a rank" in message
    assert "h100 has 72.0 GB usable; the smallest tensor_parallel_size that fits is 2" in message
    MemoryPlan(LLAMA_31_70B, H100, 2).check([1], [2048])


def test_a_model_too_large_for_every_degree_names_what_a_rank_needs() -> None:
    message = refusal(LLAMA_31_70B, "rtx-4090", 1, 64, 131072)
    assert "no tensor_parallel_size does: at 8, one KV head a rank, a rank needs" in message


def test_kv_that_does_not_fit_offers_contexts_batches_and_degrees_that_do() -> None:
    message = refusal(LLAMA_31_70B, "h100", 2, 1, 131072)
    assert "batch 1 at context 131,072: its KV takes 21.5 GB a rank" in message
    found = re.search(r"contexts up to ([\d,]+) at batch 1; .* that fits is (\d+)", message)
    assert found is not None
    longest, ranks = int(found[1].replace(",", "")), int(found[2])
    MemoryPlan(LLAMA_31_70B, H100, 2).check([1], [longest])
    MemoryPlan(LLAMA_31_70B, H100, ranks).check([1], [131072])
    assert "batches up to 3 at context 131,072" in refusal(LLAMA_31_8B, "h100", 1, 512, 131072)
    MemoryPlan(LLAMA_31_8B, H100, 1).check([3], [131072])


def test_one_point_that_fits_is_enough() -> None:
    MemoryPlan(LLAMA_31_8B, H100, 1).check([512, 1], [131072, 2048])
