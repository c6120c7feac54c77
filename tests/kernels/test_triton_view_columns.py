"""Triton lists a round's draft views as its oracle does, on a GPU or interpreted."""

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magicdec.kernels import selection_reference, triton_view_columns
from magicdec.kernels.view_columns import ViewColumns

NUM_SINK, NUM_RECENT, NUM_OWN, NUM_SLOTS = 3, 5, 2, 1000
GENERATED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Share = tuple[int, int, list[tuple[int, int | None, int]]]
SEQUENCES = st.lists(
    st.tuples(
        st.integers(0, 300),  # context_len
        st.integers(0, 40),  # tokens since the selection
        # Of each layer: columns at most, positions that it takes of the selection and that it has.
        st.lists(
            st.tuples(st.integers(8, 250), st.none() | st.integers(0, 60), st.integers(0, 60)),
            min_size=2,
            max_size=2,
        ),
    ),
    min_size=1,
    max_size=3,
)


def made_up(
    sequences: list[Share],
    heads: list[int],
    block_size: int,
    device: torch.device,
    seed: int,
) -> ViewColumns:
    """The last sequence is not there. Not every layer has as many heads as the widest."""
    random = np.random.default_rng(seed)
    about = np.zeros((len(sequences) + 1, 5), dtype=np.int64)
    layers = np.zeros((len(sequences) + 1, len(heads), 4), dtype=np.int32)
    tables, selected, start = [], [], 0
    for i, (context_len, grown, kinds) in enumerate(sequences):
        first = 0
        for layer, (num_keys, wanted, held) in enumerate(kinds):
            held = held if context_len > 0 else 0
            layers[i, layer] = -1 if wanted is None else min(wanted, held), num_keys, first, held
            first += heads[layer] * held
        selected.append(torch.from_numpy(random.integers(0, max(context_len, 1), first)).to(device))
        tables.append(random.permutation(-(-context_len // block_size) + 1))
        observed_len = max(context_len - grown, 0)
        about[i] = selected[-1].data_ptr(), first, context_len, start, observed_len
        start += len(tables[-1])
    return ViewColumns(
        sequences=torch.from_numpy(about).to(device),
        layers=torch.from_numpy(layers).to(device),
        block_tables=torch.from_numpy(np.concatenate(tables).astype(np.int32)).to(device),
        selected=tuple(selected),
        num_sink_tokens=NUM_SINK,
        num_recent_tokens=NUM_RECENT,
        num_slots=NUM_SLOTS,
        block_size=block_size,
    )


@settings(GENERATED, max_examples=30)
@given(
    sequences=SEQUENCES,
    heads=st.sampled_from([[1, 1], [2, 2], [1, 3], [3, 1], [2, 0]]),
    block_size=st.sampled_from([1, 16, 24]),
    num_columns=st.sampled_from([260, 512]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
def test_the_same_slots_are_listed(
    device: torch.device,
    sequences: list[Share],
    heads: list[int],
    block_size: int,
    num_columns: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Over what an earlier round left; masks of the round's own columns stay."""
    columns = made_up(sequences, heads, block_size, device, seed)
    batch, most = len(sequences) + 1, max(heads)
    found = []
    for list_columns in (triton_view_columns.list_columns, selection_reference.list_columns):
        slots = torch.full((2, most, batch, num_columns), 77, device=device)
        masks = torch.full((2, batch, num_columns + NUM_OWN), 7.0, dtype=dtype, device=device)
        list_columns(slots, masks, columns)
        found.append((slots, masks))
    (slots, masks), (expected_slots, expected_masks) = found
    assert torch.equal(masks, expected_masks)
    for layer, num_heads in enumerate(heads):
        assert torch.equal(slots[layer, :num_heads], expected_slots[layer, :num_heads])
    assert int(slots.min()) >= 0 and int(slots.max()) < most * NUM_SLOTS
