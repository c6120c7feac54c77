"""The roofline: geometry against real modules, closed forms against the tables they were first
worked out for and against the step model itself."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, LlamaConfig, MixtralConfig

from magicdec.config import ModelConfig
from magicdec.cost_model import StepCost, best_draft_length, expected_tokens, speedup
from magicdec.kv_cache import bytes_per_token
from magicdec.model_loader import load_model
from magicdec.roofline import (
    Device,
    ModelGeometry,
    context_where_kv_overtakes,
    critical_context,
    kv_weight_ratio,
    roofline_cost,
)
from tests.conftest import FAMILIES

GEOMETRIES = {
    "llama-2-7b": ModelGeometry(32, 4096, 32, 32, 128, 11008, 32000),
    "qwen3-8b": ModelGeometry(36, 4096, 32, 8, 128, 12288, 151936),
    "llama-3.1-8b": ModelGeometry(32, 4096, 32, 8, 128, 14336, 128256),
    "qwen3-14b": ModelGeometry(40, 5120, 40, 8, 128, 17408, 151936),
    "qwen3-32b": ModelGeometry(64, 5120, 64, 8, 128, 25600, 151936),
}
LLAMA = GEOMETRIES["llama-3.1-8b"]
SLIDING = replace(LLAMA, sliding_windows=(4096, None) * 16)
ALL_SLIDING = replace(LLAMA, sliding_windows=(4096, 1024) * 16)


def device(bandwidth: float, arithmetic: float) -> Device:
    """80 % of the data sheet's bandwidth, 60 % of its bf16 arithmetic, 1 ms a forward."""
    return Device(0.8 * bandwidth, 0.6 * arithmetic, 80 << 30, 1e-3)


DEVICES = {
    "A100": device(2.039e12, 312e12),
    "H100": device(3.35e12, 989e12),
    "H200": device(4.8e12, 989e12),
    "L40": device(0.864e12, 181e12),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_of_a_config_is_that_of_its_module(
    family: str, model_dirs: Callable[[str], Path]
) -> None:
    path = model_dirs(family)
    geometry = ModelGeometry.from_config(AutoConfig.from_pretrained(path), kv_element_bytes=4)
    model = load_model(ModelConfig(str(path), "float32"), torch.device("cpu"))
    linears = [m for m in model.module.modules() if isinstance(m, nn.Linear)]
    assert geometry.num_weights == sum(m.weight.numel() for m in linears)
    assert geometry.weight_bytes == 2 * geometry.num_weights
    assert geometry.kv_bytes_per_token == bytes_per_token(model.layers, torch.float32)
    windows = tuple(layer.sliding_window for layer in model.layers)
    assert (geometry.sliding_windows or (None,) * geometry.num_layers) == windows
    assert geometry.vocab_size == model.vocab_size


def test_head_counts_that_a_config_leaves_out_are_derived() -> None:
    geometry = ModelGeometry.from_config(LlamaConfig(hidden_size=512, num_attention_heads=8))
    assert (geometry.num_kv_heads, geometry.head_dim) == (8, 64)


def test_a_mixture_of_experts_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="num_local_experts is 8: experts are not modelled"):
        ModelGeometry.from_config(MixtralConfig())


def test_windows_of_too_few_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="sliding_windows must name 32 layers, got 2"):
        replace(LLAMA, sliding_windows=(4096, None))


@given(st.sampled_from([LLAMA, SLIDING]), st.floats(1.0, 1e7))
def test_context_reading_inverts_kv_bytes_read(geometry: ModelGeometry, context: float) -> None:
    kv_bytes = geometry.kv_bytes_read(context)
    assert geometry.context_reading(kv_bytes) == pytest.approx(context, rel=1e-9)


def test_a_window_bounds_what_its_layers_read() -> None:
    assert SLIDING.kv_bytes_read(4096) == LLAMA.kv_bytes_read(4096)
    assert SLIDING.kv_bytes_read(8192) == LLAMA.kv_bytes_read(6144)
    assert SLIDING.mean_context(8192) == 6144
    assert ALL_SLIDING.kv_bytes_read(10**6) == ALL_SLIDING.kv_bytes_read(4096)
    assert ALL_SLIDING.context_reading(ALL_SLIDING.kv_bytes_read(2048)) == pytest.approx(2048)
    assert math.isinf(ALL_SLIDING.context_reading(1.01 * ALL_SLIDING.kv_bytes_read(4096)))


# Contexts from which self-speculation gains with batch: gamma 3, K 512, acceptance 0.8.
CRITICAL = {
    "llama-2-7b": (1242, 1022, 1124, 1119),
    "qwen3-8b": (2643, 1748, 2163, 2142),
    "llama-3.1-8b": (2856, 1858, 2321, 2297),
    "qwen3-14b": (3877, 2386, 3078, 3043),
    "qwen3-32b": (5201, 3071, 4060, 4009),
}


@pytest.mark.parametrize("name", CRITICAL)
def test_critical_contexts_of_known_models_and_gpus(name: str) -> None:
    found = [
        critical_context(GEOMETRIES[name], gpu, acceptance=0.8, draft_length=3, draft_budget=512)
        for gpu in DEVICES.values()
    ]
    assert found == pytest.approx(CRITICAL[name], rel=0.002)


@pytest.mark.parametrize(
    ("name", "thousands"),
    [
        ("llama-2-7b", 25),
        ("qwen3-8b", 103),
        ("llama-3.1-8b", 115),
        ("qwen3-14b", 171),
        ("qwen3-32b", 244),
    ],
)
def test_kv_overtakes_weights_where_the_ratio_is_one(name: str, thousands: int) -> None:
    context = context_where_kv_overtakes(GEOMETRIES[name])
    assert round(context / 1000) == pytest.approx(thousands, abs=1)
    assert kv_weight_ratio(GEOMETRIES[name], 1, context) == pytest.approx(1.0)
    assert context_where_kv_overtakes(GEOMETRIES[name], 8) == pytest.approx(context / 8)


def self_speculation(cost: StepCost, batch: int, context: int, acceptance: float) -> float:
    """Speedup at draft length 3 and budget 512."""
    plain, verify, draft = (
        cost.seconds(LLAMA.step_shape([rows] * batch, [positions] * batch))
        for rows, positions in ((1, context), (4, context), (1, 512))
    )
    return speedup(expected_tokens(acceptance, 3), 3, draft / plain, verify / plain)


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("acceptance", [0.6, 0.8, 0.95])
def test_speedup_at_a_huge_batch_crosses_one_at_the_critical_context(
    gpu: str, acceptance: float
) -> None:
    """The closed form leaves the arithmetic of attention out, so the step model does here too."""
    cost = replace(roofline_cost(LLAMA, DEVICES[gpu]), per_row_product=0.0)
    critical = critical_context(
        LLAMA, DEVICES[gpu], acceptance=acceptance, draft_length=3, draft_budget=512
    )
    above, below = int(critical * 1.1), int(critical * 0.9)
    assert self_speculation(cost, 10**4, above, acceptance) > 1.0
    assert self_speculation(cost, 10**4, below, acceptance) < 1.0


def test_no_context_is_critical_without_acceptance_or_behind_windows() -> None:
    gpu = DEVICES["H100"]
    assert math.isinf(
        critical_context(LLAMA, gpu, acceptance=0.0, draft_length=3, draft_budget=512)
    )
    narrow = replace(LLAMA, sliding_windows=(512,) * 32)
    assert math.isinf(
        critical_context(narrow, gpu, acceptance=0.8, draft_length=3, draft_budget=512)
    )


# One H100: plain milliseconds, then speedup and draft length with streaming-512 at acceptance 0.80
# and snapkv-2K at 0.88, worked out separately, without the arithmetic of attention.
EXPECTED = [
    ("llama-3.1-8b", 8192, 1, 7.0, (1.00, 0), (1.00, 0)),
    ("llama-3.1-8b", 8192, 32, 19.4, (1.38, 2), (1.33, 3)),
    ("llama-3.1-8b", 32768, 1, 8.2, (1.00, 0), (1.03, 1)),
    ("llama-3.1-8b", 32768, 4, 13.0, (1.20, 2), (1.28, 2)),
    ("llama-3.1-8b", 32768, 12, 25.8, (1.64, 3), (1.78, 4)),
    ("llama-3.1-8b", 65536, 1, 9.8, (1.07, 1), (1.12, 2)),
    ("llama-3.1-8b", 65536, 4, 19.4, (1.45, 3), (1.61, 4)),
    ("qwen3-8b", 32768, 8, 21.1, (1.49, 3), (1.62, 4)),
]


@pytest.mark.parametrize(("name", "context", "batch", "plain_ms", "streaming", "snapkv"), EXPECTED)
def test_prior_gives_the_plain_times_and_gains_of_one_h100(
    name: str,
    context: int,
    batch: int,
    plain_ms: float,
    streaming: tuple[float, int],
    snapkv: tuple[float, int],
) -> None:
    geometry = GEOMETRIES[name]
    cost = roofline_cost(geometry, DEVICES["H100"])
    verify = [
        cost.seconds(geometry.step_shape([n + 1] * batch, [context] * batch)) for n in range(17)
    ]
    assert verify[0] * 1e3 == pytest.approx(plain_ms, rel=0.02)
    for (gain, length), acceptance, budget in ((streaming, 0.80, 512), (snapkv, 0.88, 2048)):
        draft = cost.seconds(geometry.step_shape([1] * batch, [budget] * batch))
        best = best_draft_length(acceptance, draft, verify)
        found = speedup(
            expected_tokens(acceptance, best), best, draft / verify[0], verify[best] / verify[0]
        )
        assert best == length
        assert found == pytest.approx(gain, rel=0.03)


def test_ranks_share_all_but_the_fixed_time_and_wait_for_the_most_heads() -> None:
    one, four, eleven = (roofline_cost(LLAMA, DEVICES["H100"], n) for n in (1, 4, 11))
    assert four.fixed == one.fixed
    assert four.weights == pytest.approx(one.weights / 4)
    assert four.per_row == pytest.approx(one.per_row / 4)
    assert four.per_kv_byte == pytest.approx(one.per_kv_byte / 4)
    assert eleven.per_kv_byte == pytest.approx(one.per_kv_byte / 8), "one KV head of eight"


@pytest.mark.parametrize("ranks", [0, 33])
def test_a_degree_without_heads_for_every_rank_is_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 32 .* got {ranks}"):
        roofline_cost(LLAMA, DEVICES["H100"], ranks)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_cannot_be_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"Device.bandwidth must be .* got {value}"):
        replace(DEVICES["H100"], bandwidth=value)
