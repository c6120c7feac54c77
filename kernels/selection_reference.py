"""Plain torch oracles of what a draft's view is chosen by, written for reading."""

import numpy as np
import torch

from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.view_columns import ViewColumns, divide_columns

_MASK64 = 2**64 - 1


def list_columns(slots: torch.Tensor, masks: torch.Tensor, columns: ViewColumns) -> None:
    """See view_columns.ListColumns."""
    num_layers, num_heads, batch, num_columns = slots.shape
    size, sink = columns.block_size, columns.num_sink_tokens
    slots.zero_()
    masks[:, :, :num_columns] = float("-inf")
    for sequence in range(batch):
        _, most, context_len, start, observed_len = columns.sequences[sequence].tolist()
        table = columns.block_tables[start:].tolist()
        for layer in range(num_layers):
            taken, num_keys, first, stride = columns.layers[sequence, layer].tolist()
            window_keys, selected_keys = divide_columns(
                np.array([context_len]),
                np.array([num_keys]),
                np.array([observed_len if taken >= 0 else -1]),
                sink,
                columns.num_recent_tokens,
            )
            num_window = min(int(window_keys[0]), context_len)
            num_selected = max(min(taken, int(selected_keys[0])), 0)
            skipped = context_len - num_window
            window = [c if c < sink else c + skipped for c in range(num_window)]
            masks[layer, sequence, : num_selected + num_window] = 0
            for head in range(num_heads):
                places = range(first + head * stride, first + head * stride + num_selected)
                chosen = [int(columns.selected[sequence][p]) if p < most else 0 for p in places]
                listed = [
                    head * columns.num_slots + table[p // size] * size + p % size
                    for p in chosen + window
                ]
                slots[layer, head, sequence, : len(listed)] = torch.tensor(
                    listed, device=slots.device
                )


def attention_mass(
    query: torch.Tensor,  # [num_query_heads, num_rows, head_dim]
    k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim]
    layout: PagedLayout,
    sequence: int,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Row by row and head by head: softmax over the keys up to the row, summed a KV head."""
    num_rows = query.shape[1]
    num_keys = layout.context_lens[sequence] + layout.query_lens[sequence]
    keys = k_cache[:, torch.from_numpy(layout.slots(sequence, 0, num_keys))].float()
    mass = torch.zeros(k_cache.shape[0], num_keys)
    for head in range(query.shape[0] if k_cache.shape[0] > 0 else 0):
        kv_head = head * k_cache.shape[0] // query.shape[0]
        for row in range(num_rows):
            visible = num_keys - num_rows + row + 1
            scores = keys[kv_head, :visible] @ query[head, row].float() * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            mass[kv_head, :visible] += torch.softmax(scores, dim=0)
    return mass


def largest_indices(scores: torch.Tensor, count: int) -> torch.Tensor:
    """By sorting Python numbers. Of equal entries, zeros of both signs too, by lower position."""
    chosen = [sorted(range(len(row)), key=lambda i: -row[i])[:count] for row in scores.tolist()]
    return torch.tensor(chosen, dtype=torch.long).reshape(len(scores), count)


def rank_top(
    mass: torch.Tensor,  # fp32 [num_layers, num_kv_heads, num_keys]
    first: int,
    stop: int,
    count: int,
    pool_size: int = 1,
    chunk_size: int = 1,
    coverage: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In Python numbers, by sorting. Ties fall to the lower position."""
    case = (first, stop, count, pool_size, chunk_size, coverage)
    layers = [_rank_layer(rows, *case) for rows in mass.tolist()]
    shape = (*mass.shape[:2], len(layers[0][0][0]) if mass.shape[1] > 0 else 0)
    chosen = torch.tensor([heads for heads, _ in layers], dtype=torch.long).reshape(shape)
    return chosen, torch.tensor([needed for _, needed in layers])


def _rank_layer(
    mass: list[list[float]],
    first: int,
    stop: int,
    count: int,
    pool_size: int,
    chunk_size: int,
    coverage: float,
) -> tuple[list[list[int]], int]:
    chosen: list[list[int]] = []
    needed = 1
    for row in mass:
        half = pool_size // 2
        pooled = [sum(row[max(i - half, 0) : i + half + 1]) / pool_size for i in range(len(row))]
        starts = range(first, stop - chunk_size + 1, chunk_size)
        by_mass = sorted(starts, key=lambda i: -sum(pooled[i : i + chunk_size]))
        best = [i + k for i in by_mass[: max(count, 0) // chunk_size] for k in range(chunk_size)]
        chosen.append(best)
        held = sum(row) - sum(row[first:stop])
        steps = 0
        while steps < len(best) and held < coverage * sum(row):
            held += row[best[steps]]
            steps += 1
        needed = max(needed, steps)
    width = len(chosen[0]) if chosen else 0
    return chosen, min(needed, width) if coverage < 1.0 else width
