"""What a captured draft step reads at fixed places, and moves on for the next step by itself.

    token_ids, positions   of the rows
    last                   the position where a row whose own draft is done stays
    temperatures           0: greedy
    keys                   of the noise at the position that is chosen (gumbel.draw_keys)
    step                   the column of the rows' own K/V, and of their choices

Choices whose scores take more than a division by temperature (penalties, bias, min_tokens, top-k,
top-p, min-p) are not made here: a nucleus may hold any number of entries, and penalties look at
the draft's own tokens.
"""

import numpy as np
import torch

from magicdec.drafts import AcceptedDrafts
from magicdec.kernels.gumbel import draw_keys
from magicdec.sampler import SamplerRow, shared_draw

_ROW_WORDS = (1, 1, 1, 1, 5)


class DraftInputs:
    """One buffer of 64-bit words, on the host or the device: a round sends all of it at once."""

    def __init__(self, words: torch.Tensor) -> None:  # int64 [num_words(bucket)]
        bucket = len(words) // sum(_ROW_WORDS)
        self.words = words
        sizes = [bucket * n for n in _ROW_WORDS]
        self.token_ids, self.positions, self.last, temperatures, keys, step = (
            words.split_with_sizes([*sizes, 1])
        )
        self.temperatures = temperatures.view(torch.float64)  # [bucket], as the rest
        self.keys = keys.view(bucket, 5)
        self.step = step.view(torch.int32)[:1]  # [1], the word's lower half

    @staticmethod
    def num_words(bucket: int) -> int:
        return bucket * sum(_ROW_WORDS) + 1

    def write(
        self, token_ids: list[int], positions: list[int], last: list[int], rows: list[SamplerRow]
    ) -> None:
        """A round's first step, on the host. A row that is not there is at position 0."""
        batch = len(rows)
        self.words.zero_()
        self.token_ids.numpy()[:batch] = token_ids
        self.positions.numpy()[:batch] = positions
        self.last.numpy()[:batch] = last
        self.temperatures.numpy()[:batch] = [row.sampling.temperature for row in rows]
        keys = draw_keys([shared_draw(row) for row in rows])
        self.keys.numpy()[:batch] = keys.view(np.int64)

    def write_step(self, step: int, token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        """A step whose choice the host makes; what the step itself chooses is not looked at."""
        batch = len(token_ids)
        self.words.zero_()
        self.token_ids[:batch], self.positions[:batch] = token_ids, positions
        self.step.fill_(step)

    def move(self, accepted: AcceptedDrafts) -> None:
        """From where nothing was accepted to where the device says, before the first step."""
        batch, count = len(accepted.token_ids), accepted.counts
        self.token_ids[:batch].copy_(accepted.token_ids)
        self.positions[:batch].add_(count)
        self.last[:batch].add_(count)
        self.keys[:batch, 1].add_(count)

    def advance(self, chosen: torch.Tensor) -> None:
        """To the next step, on the device; `chosen` is -1 where nothing could be: [bucket]."""
        self.token_ids.copy_(chosen.clamp(min=0))
        self.positions.copy_(torch.minimum(self.positions + 1, self.last))
        self.keys.select(1, 1).add_(1)
        self.step.add_(1)
