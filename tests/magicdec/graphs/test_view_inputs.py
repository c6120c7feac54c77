"""Views that a device lists hold the positions that an eager round's do."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.config import SelectionConfig
from magicdec.draft_attention import DraftAttention
from magicdec.draft_views import DraftViews
from magicdec.graphs.view_inputs import ViewInputs
from magicdec.kernels import selection_reference
from magicdec.kernels.dispatch import REFERENCE, triton_backend
from magicdec.kernels.view_columns import ListColumns
from magicdec.kv_cache import LayerSpec, PagedKVCache
from magicdec.sparse_kv import Selection
from tests.kernels.layouts import make_layout
from tests.magicdec.graphs.eager_capturer import EagerCapturer
from tests.magicdec.graphs.host_copies import HostCopies

if torch.cuda.is_available():
    pytest.skip("copies are counted where host and device are one", allow_module_level=True)

DEVICE = torch.device("cpu")
HEADS, BLOCK_SIZE, MAX_LEN, WIDTH, BUCKET = (2, 1, 2), 8, 200, 256, 4
SINK, RECENT = 4, 6


class Share(NamedTuple):
    """One sequence's."""

    context_len: int
    budget: int
    grown: int | None  # tokens since its selection; None: it has none
    most: int  # positions that a layer's selection has


def views_of(
    shares: list[Share], draft_length: int, num_first_layers: int, seed: int
) -> tuple[PagedKVCache, DraftViews]:
    """Selections of other positions in every layer and head, in some layers of fewer."""
    random = np.random.default_rng(seed)
    contexts = [share.context_len for share in shares]
    layout, num_blocks = make_layout(contexts, [9] * len(shares), BLOCK_SIZE, False, seed)
    layers = tuple(LayerSpec(2 * heads, heads, 8, None) for heads in HEADS)
    cache = PagedKVCache(layers, BLOCK_SIZE, num_blocks, torch.float32, DEVICE)
    selections: list[Selection | None] = []
    for share in shares:
        selection = None if share.grown is None else Selection(share.context_len - share.grown)
        selections.append(selection)
        if selection is None:
            continue
        candidates = np.arange(SINK, max(selection.observed_len - RECENT, SINK))
        for layer, num_heads in enumerate(HEADS):
            count = max(share.most - layer, min(share.most, 1))
            rows = [random.permutation(candidates)[:count] for _ in range(num_heads)]
            ranked = torch.from_numpy(np.stack(rows))
            selection.add((layer,), ranked[None], [ranked.shape[1]])
    config = SelectionConfig(
        num_sink_tokens=SINK, num_recent_tokens=RECENT, num_first_layers=num_first_layers
    )
    budgets = [share.budget for share in shares]
    return cache, DraftViews(layout, config, draft_length, budgets, selections)


def listed(
    cache: PagedKVCache,
    views: DraftViews,
    inputs: ViewInputs,
    list_columns: ListColumns,
    accepted: list[int] | None = None,
) -> tuple[list[set[int]], int]:
    """Slots that each layer, head and sequence sees, and how many the widest view may have; where
    the device says by how much contexts are longer."""
    slots = torch.zeros(len(HEADS), max(HEADS), BUCKET, WIDTH, dtype=torch.int64)
    masks = torch.zeros(len(HEADS), BUCKET, WIDTH + 1)
    widest = inputs.write(views)
    columns, batch = inputs.send(views), len(views.selections)
    if accepted is not None:
        columns.sequences[:batch, 2] += torch.tensor(accepted)
    list_columns(slots, masks, columns)
    assert torch.isinf(masks[:, batch:, :WIDTH]).all()
    seen = masks[:, :, :WIDTH] == 0
    found = [
        slots[layer, head, i][seen[layer, i]].tolist()
        for layer, heads in enumerate(HEADS)
        for head in range(heads)
        for i in range(batch)
    ]
    assert max(map(len, found)) <= widest
    assert all(len(set(own)) == len(own) for own in found)
    return [set(own) for own in found], widest


def seen_eagerly(cache: PagedKVCache, views: DraftViews) -> list[set[int]]:
    attention = DraftAttention(cache, REFERENCE, views)
    attention.begin_step(-1)  # before anything is drafted
    found = []
    for layer, heads in enumerate(HEADS):
        columns = attention._columns_of(layer, None)
        index, masks = columns.index(layer), attention._mask(columns)
        slots = columns.slots[index]
        seen = masks[index if len(masks) > 1 else 0][:, : slots.shape[2]] == 0
        for head in range(heads):
            found += [set(slots[head, i][seen[i]].tolist()) for i in range(len(seen))]
    return found


SHARES = st.builds(
    Share,
    context_len=st.integers(1, MAX_LEN),
    budget=st.integers(16, 100),
    grown=st.none() | st.integers(0, 30),
    most=st.sampled_from([0, 1, 2, 20, 90]),
)


@settings(deadline=None, max_examples=60)
@given(
    rounds=st.lists(st.lists(SHARES, min_size=1, max_size=BUCKET), min_size=1, max_size=2),
    draft_length=st.integers(1, 6),
    num_first_layers=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_a_device_lists_what_eager_rounds_see(
    rounds: list[list[Share]], draft_length: int, num_first_layers: int, seed: int
) -> None:
    """Round after round, over what the last one left."""
    for shares in rounds:
        cache, views = views_of(shares, draft_length, num_first_layers, seed)
        inputs = ViewInputs(cache, EagerCapturer(DEVICE), BUCKET, MAX_LEN // BLOCK_SIZE + 2)
        expected = seen_eagerly(cache, views)
        for _ in range(2):
            found, widest = listed(cache, views, inputs, selection_reference.list_columns)
            assert found == expected and widest == max(map(len, found))


@settings(deadline=None, max_examples=60)
@given(
    shares=st.lists(SHARES, min_size=1, max_size=BUCKET),
    accepted=st.lists(st.integers(0, 6), min_size=BUCKET, max_size=BUCKET),
    num_ahead=st.integers(0, 6),
    draft_length=st.integers(1, 6),
    num_first_layers=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_a_device_lists_them_where_contexts_are_longer_than_the_host_knows(
    shares: list[Share],
    accepted: list[int],
    num_ahead: int,
    draft_length: int,
    num_first_layers: int,
    seed: int,
) -> None:
    cache, views = views_of(shares, draft_length, num_first_layers, seed)
    lens = views.layout.context_lens
    by = [min(n, num_ahead, length) for n, length in zip(accepted, lens, strict=False)]
    known = tuple(length - n for length, n in zip(lens, by, strict=True))
    layout = replace(views.layout, context_lens=known)
    before = replace(views, layout=layout, num_ahead=num_ahead)
    inputs = ViewInputs(cache, EagerCapturer(DEVICE), BUCKET, MAX_LEN // BLOCK_SIZE + 2)
    list_columns = selection_reference.list_columns
    assert listed(cache, before, inputs, list_columns, by)[0] == seen_eagerly(cache, views)


SOME = [Share(150, 60, 3, 20), Share(9, 24, None, 0), Share(90, 40, 12, 5)]


def test_so_does_the_kernel_that_graphs_use() -> None:
    cache, views = views_of(SOME, 3, 1, 0)
    inputs = ViewInputs(cache, EagerCapturer(DEVICE), BUCKET, MAX_LEN // BLOCK_SIZE + 2)
    list_columns = triton_backend().columns_on_device
    assert list_columns is not None
    assert listed(cache, views, inputs, list_columns)[0] == seen_eagerly(cache, views)


def test_a_rounds_views_are_one_copy() -> None:
    """Selections that lie on the device are read there: nothing of them is sent."""
    cache, views = views_of(SOME, 3, 1, 0)
    inputs = ViewInputs(cache, EagerCapturer(DEVICE), BUCKET, MAX_LEN // BLOCK_SIZE + 2)
    selected = [t for s in views.selections if s is not None for t in s.positions.values()]
    with HostCopies([inputs.words, *selected]) as copies:
        for _ in range(2):
            inputs.write(views)
            inputs.send(views)
    assert (copies.to_device, copies.to_host) == (["copy_"] * 2, [])
