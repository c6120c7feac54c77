"""What a round's draft views list, as a kernel reads it on a device."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ViewColumns:
    """Of each sequence, layer and KV head, the columns of a view.

        column    0 .. num_selected-1 | ................ num_selected+num_window-1 | the rest
        holds     selected positions  | the first positions, then the most recent  | nothing

    Columns of a layer are as many for each of its heads. A sequence that is not there has none.
    How many there are follows from context_len (divide_columns), which may be the device's alone.
    """

    sequences: torch.Tensor  # int64 [batch, 5]: where its selected positions are in the device's
    # memory and how many, its context_len, where its block table begins, and its context_len when
    # the positions were selected
    layers: torch.Tensor  # int32 [batch, num_layers, 4]: positions that the layer takes of its
    # selection, -1 where it has none, and columns at most; where its selected positions begin, and
    # how many lie there of each of its heads, best first
    block_tables: torch.Tensor  # int32, end to end
    # What the addresses point to, int64, layer by layer and head by head. A launch may read them
    # after this is gone: memory that is freed goes to later work of the same stream.
    selected: tuple[torch.Tensor, ...]
    num_sink_tokens: int
    num_recent_tokens: int
    num_slots: int
    block_size: int


def divide_columns(
    context_lens: NDArray[np.int64],  # [batch]
    num_keys: NDArray[np.int64],  # [batch], columns at most
    observed_lens: NDArray[np.int64],  # [batch], context_lens at the selection; -1: there is none
    num_sink_tokens: int,
    num_recent_tokens: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys of sink and recent window, and most of the selection's: [batch] each.

    The recent window grows by the tokens since the selection, up to half of what the sink leaves.
    A context that fits is listed whole.
    """
    grown = num_recent_tokens + context_lens - observed_lens
    most = (num_keys - num_sink_tokens) // 2
    num_recent = np.maximum(np.minimum(grown, most), num_recent_tokens)
    selects = (observed_lens >= 0) & (context_lens > num_keys)
    num_window = np.where(selects, num_sink_tokens + num_recent, num_keys)
    return num_window, np.maximum(num_keys - num_window, 0)


class ListColumns(Protocol):
    """Slots and masks of all columns at once, in one launch that waits for nothing."""

    def __call__(
        self,
        slots: torch.Tensor,  # int64 [num_layers, most KV heads of a layer, batch, num_columns]
        masks: torch.Tensor,  # additive [num_layers, batch, num_columns and more]
        columns: ViewColumns,
    ) -> None:
        """Writes head * num_slots + slot, and 0; for a column that holds nothing 0, and -inf.

        Masks of further columns stay. A head that a layer does not have gets slots, too, of no
        meaning.
        """
        ...
