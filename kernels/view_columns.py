"""What a round's draft views list, as a kernel reads it on a device."""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class ViewColumns:
    """Of each sequence, layer and KV head, the columns of a view.

        column    0 .. num_selected-1 | ................ num_selected+num_window-1 | the rest
        holds     selected positions  | the first positions, then the most recent  | nothing

    Columns of a layer are as many for each of its heads. A sequence that is not there has none.
    """

    sequences: torch.Tensor  # int64 [batch, 4]: where its selected positions are in the device's
    # memory and how many, its context_len, and where its block table begins
    layers: torch.Tensor  # int32 [batch, num_layers, 4]: num_selected, num_window, where the
    # layer's selected positions begin, and how many lie there of each of its heads, best first
    block_tables: torch.Tensor  # int32, end to end
    # What the addresses point to, int64, layer by layer and head by head. A launch may read them
    # after this is gone: memory that is freed goes to later work of the same stream.
    selected: tuple[torch.Tensor, ...]
    num_sink_tokens: int
    num_slots: int
    block_size: int


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
