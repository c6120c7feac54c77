"""Norms of single heads, before they rotate."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms over head_dim, of a weight for each head that rotates."""

    weights: torch.Tensor  # contiguous, [num_heads, head_dim]
    epsilon: float
