"""Scores to choose tokens from, and what the noise of their rows is a function of."""

import torch
from hypothesis import strategies as st

from magicdec.kernels.gumbel import Draw, Role

DRAWS = st.lists(
    st.none()
    | st.builds(
        Draw,
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**40),
        st.sampled_from(Role),
        st.integers(0, 16),
    ),
    min_size=1,
    max_size=4,
)


def made_up_scores(
    num_rows: int, num_entries: int, spread: float, removed: float, seed: int
) -> torch.Tensor:
    """A share of them removed, one of each row never. A spread of 0 makes all the others equal."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_rows, num_entries, generator=generator) * spread
    hidden = torch.rand(scores.shape, generator=generator) < removed
    hidden[:, seed % num_entries] = False
    scores[hidden] = float("-inf")
    return scores
