"""Triton's steps between linears and its sampler agree with their oracles."""

from functools import partial

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magicdec.kernels import gumbel, reference, triton_gumbel, triton_steps
from magicdec.kernels.gumbel import Draw, Role
from tests.kernels.choices import DRAWS, made_up_scores

GENERATED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@triton.jit
def philox_words(output, keys, BLOCKS: tl.constexpr):
    blocks = tl.arange(0, BLOCKS)
    zeros = tl.zeros([BLOCKS], tl.uint64)
    words = triton_gumbel.philox(
        blocks.to(tl.uint64) + 1,
        zeros + tl.load(keys + 1).to(tl.uint64, bitcast=True),
        zeros + tl.load(keys + 2).to(tl.uint64, bitcast=True),
        zeros + tl.load(keys + 3).to(tl.uint64, bitcast=True),
        zeros + tl.load(keys).to(tl.uint64, bitcast=True),
    )
    for i in tl.static_range(4):
        tl.store(output + blocks * 4 + i, words[i].to(tl.int64, bitcast=True))


@settings(GENERATED, max_examples=10)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(2**33, 2**40),
    role=st.sampled_from(Role),
    step=st.integers(0, 16),
)
def test_words_equal_the_reference_bit_for_bit(
    device: torch.device, seed: int, position: int, role: Role, step: int
) -> None:
    keys = triton_gumbel.draw_keys([Draw(seed, position, role, step)])
    output = torch.empty(32, dtype=torch.int64, device=device)
    philox_words[(1,)](output, keys.to(device), BLOCKS=8)
    words = output.cpu().numpy().view(np.uint32)
    np.testing.assert_array_equal(words, reference.random_words(seed, position, 64, role, step))


@settings(GENERATED, max_examples=25)
@given(
    num_entries=st.sampled_from([1, 7, 8, 300, 1024, 1025, 2500]),
    spread=st.floats(0.0, 40.0),
    removed=st.floats(0.0, 0.9),
    draws=DRAWS,
    seed=st.integers(0, 10_000),
    first_block=st.sampled_from([0, 1, 6000]),
)
def test_the_same_entries_are_chosen(
    device: torch.device,
    num_entries: int,
    spread: float,
    removed: float,
    draws: list[Draw | None],
    seed: int,
    first_block: int,
) -> None:
    """Ties among them: a spread of 0 makes all scores equal. Of any part of the vocabulary."""
    scores = made_up_scores(len(draws), num_entries, spread, removed, seed)
    actual = triton_gumbel.gumbel_argmax(scores.to(device), draws, 8 * first_block)
    expected = gumbel.gumbel_argmax(scores, draws, 8 * first_block)
    assert actual.token_ids() == expected.token_ids()
    torch.testing.assert_close(actual.values.cpu(), expected.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_scores_that_order_nothing_are_refused(device: torch.device, bad: float) -> None:
    scores = torch.zeros(3, 41, device=device)
    scores[1] = bad
    for draw in (None, Draw(1, 2)):
        with pytest.raises(ValueError, match="row 1 of the scores holds a NaN, or nothing above"):
            triton_gumbel.gumbel_argmax(scores, [None, draw, None]).token_ids()
    with pytest.raises(ValueError, match=r"draws must be one a row \(3\), got 2"):
        triton_gumbel.gumbel_argmax(scores, [None, None])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_dims", [64, 576, 1000])
def test_norms_and_gates_agree_with_the_reference(
    device: torch.device, dtype: torch.dtype, num_dims: int
) -> None:
    rows = torch.randn(3, num_dims, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    weight = torch.linspace(0.5, 1.5, num_dims).to(dtype).to(device)
    close = partial(torch.testing.assert_close, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    kernels = triton_steps.TritonElementwise(device, dtype)
    actual = kernels.rms_norm(rows, weight, 1e-5)
    close(actual, reference.rms_norm(rows, weight, 1e-5))
    normed, summed = kernels.add_rms_norm(rows, rows.flip(0), weight, 1e-5)
    close(summed, rows + rows.flip(0))  # the interpreter cuts bfloat16 off where a GPU rounds
    assert torch.equal(normed, kernels.rms_norm(summed, weight, 1e-5))
    gated = kernels.silu_product(rows)
    close(gated, reference.silu_product(rows))
