"""What `snapkv` and `recycled` read: the keys that attention weighed most, a layer and head."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdec.batch import Plan
from magicdec.config import OBSERVATION_WINDOW, SelectionConfig
from magicdec.control.round_policy import FixedPolicy
from magicdec.draft_attention import DraftAttention
from magicdec.draft_views import DraftViews
from magicdec.drafters.self_draft import POLICIES
from magicdec.engine import Engine
from magicdec.kernels import selection_reference
from magicdec.kernels.dispatch import REFERENCE
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import LayerSpec, PagedKVCache
from magicdec.observation import Observation, SelectionObserver
from magicdec.sparse_kv import Selection
from magicdec.types import SamplingParams
from tests.conftest import EngineFactory, engine_config
from tests.generation import random_prompts, requests_of, run, token_ids

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=9, max_tokens=24, ignore_eos=True)
CONFIG = SelectionConfig(num_sink_tokens=4, num_recent_tokens=6)


def self_drafter(engine: Engine) -> Any:
    return engine._executor._runner._drafters.by_name["snapkv"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("drafter", [*POLICIES, "top_k"])
@pytest.mark.parametrize("draft_budget", [13, 40, 400])
def test_every_policy_and_budget_gives_the_plain_tokens(
    drafter: str, draft_budget: int, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    requests = requests_of(random_prompts([1, 5, 31, 32, 33, 64, 100, 230]), [GREEDY, SAMPLED] * 4)
    answers = []
    for draft_length in (0, 4):
        config = engine_config(
            tiny_model_dir, draft_length=draft_length, draft_budget=draft_budget, num_blocks=200
        )
        engine = make_engine(config)
        engine.policy = FixedPolicy(Plan(drafter, draft_length, draft_budget))
        outputs = run(engine, requests)
        answers.append([token_ids(outputs[r.request_id]) for r in requests])
        assert (engine.stats.num_draft_tokens > 0) == (draft_length > 0)
        if draft_budget == 400 and draft_length > 0:
            assert engine.stats.num_accepted_tokens == engine.stats.num_draft_tokens
    assert answers[0] == answers[1]


@settings(max_examples=40, deadline=None)
@given(
    context_lens=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    num_rows=st.integers(1, 40),
    draft_budget=st.integers(16, 120),
    draft_length=st.integers(1, 5),
    growth=st.integers(0, 30),
    num_first_layers=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_a_view_holds_sink_recent_window_and_the_heaviest_keys_within_its_budget(
    context_lens: list[int],
    num_rows: int,
    draft_budget: int,
    draft_length: int,
    growth: int,
    num_first_layers: int,
    seed: int,
) -> None:
    config = SelectionConfig(
        num_sink_tokens=4, num_recent_tokens=6, num_first_layers=num_first_layers
    )
    layers = (LayerSpec(4, 2, 8, None),) * 3
    block_size, num_blocks = 8, 100
    cache = PagedKVCache(layers, block_size, num_blocks, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for k in cache.k:
        k.copy_(torch.randn(k.shape, generator=generator))
    order = torch.randperm(num_blocks, generator=generator).numpy()
    rows = [min(num_rows, c) for c in context_lens]
    tables = tuple(order[30 * i : 30 * (i + 1)] for i in range(len(context_lens)))
    before = tuple(c - r for c, r in zip(context_lens, rows, strict=True))
    observed = PagedLayout(tuple(rows), before, tables, block_size)
    observations = [
        Observation(i, r, draft_budget, 5, 1, 1.0, Selection(c))
        for i, (c, r) in enumerate(zip(context_lens, rows, strict=True))
    ]
    observer = SelectionObserver(observations, observed, config, REFERENCE)
    query = torch.randn(4, sum(rows), 8, generator=generator) * 0.01
    for layer in range(3):
        show(observer, layer, query, cache.k[layer], observed, scaling=0.3)
    observer.finish()
    now = tuple(c + growth for c in context_lens)
    layout = PagedLayout((1,) * len(now), now, tables, block_size)
    selections = [o.selection for o in observations]
    views = DraftViews(layout, config, draft_length, [draft_budget] * len(now), selections)
    attention = DraftAttention(cache, REFERENCE, views)
    attention.begin_step(-1)  # before anything is drafted
    for layer in range(3):
        view, visible = columns_of(attention, layer)
        num_keys = draft_budget * (2 if layer < num_first_layers else 1) - draft_length
        row_start = 0
        for i, context_len in enumerate(now):
            mass = selection_reference.attention_mass(
                query[:, row_start : row_start + rows[i]], cache.k[layer], observed, i, 0.3
            )
            row_start += rows[i]
            for head in range(2):
                first = head * cache.k[layer].shape[1]
                slots = (view[head, i] - first)[visible[i, : view.shape[2]]].tolist()
                check_view(slots, layout, i, mass[head], context_len, num_keys, config, growth)


def test_an_observer_of_a_part_of_a_step_chooses_as_in_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = tuple(torch.randperm(12, generator=generator).view(3, 4).numpy())
    whole = PagedLayout((2, 40, 3), (30, 0, 50), tables, 16)
    query = torch.randn(4, 45, 8, generator=generator)
    pages = torch.randn(2, 12 * 16, 8, generator=generator)
    config = SelectionConfig(num_sink_tokens=2, num_recent_tokens=4)

    def observer() -> tuple[SelectionObserver, list[Selection]]:
        selections = [Selection(40), Selection(53)]
        observations = [
            Observation(i, num_rows, 20, 1, 1, 1.0, selection)
            for i, num_rows, selection in zip((1, 2), (32, 3), selections, strict=True)
        ]
        return SelectionObserver(observations, whole, config, REFERENCE), selections

    seen, expected = observer()
    show(seen, 0, query, pages, whole, scaling=0.4)
    seen.finish()
    apart, selections = observer()
    for part, rows in (((1,), slice(2, 42)), ((0, 2), [0, 1, 42, 43, 44])):
        layout = PagedLayout(
            tuple(whole.query_lens[i] for i in part),
            tuple(whole.context_lens[i] for i in part),
            tuple(tables[i] for i in part),
            16,
        )
        one = apart.over(part, layout)
        assert one.num_sequences == 1
        show(one, 0, query[:, rows], pages, layout, scaling=0.4)
        one.finish()
    for found, wanted in zip(selections, expected, strict=True):
        assert torch.equal(found.positions[0], wanted.positions[0])
    assert apart.over((0,), whole).num_sequences == 0


def show(
    observer: SelectionObserver,
    layer: int,
    query: torch.Tensor,  # of the layout's rows
    pages: torch.Tensor,
    layout: PagedLayout,
    scaling: float,
) -> None:
    starts = np.cumsum((0, *layout.query_lens[:-1])).tolist()
    queries = [query[:, rows] for rows in observer.rows(starts)]
    observer.observe(layer, queries, pages, scaling=scaling, sliding_window=None, softcap=None)


def columns_of(attention: DraftAttention, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's slots, [num_kv_heads, batch, num_listed], and which columns its rows see."""
    columns = attention._columns_of(layer, None)
    index, masks = columns.index(layer), attention._mask(columns)
    return columns.slots[index], masks[index if len(masks) > 1 else 0] == 0


def check_view(
    slots: list[int],
    layout: PagedLayout,
    sequence: int,
    mass: torch.Tensor,
    context_len: int,
    num_keys: int,
    config: SelectionConfig,
    growth: int,
) -> None:
    where = {int(s): p for p, s in enumerate(layout.slots(sequence, 0, context_len))}
    positions = [where[slot] for slot in slots]
    assert len(set(positions)) == len(positions)
    if context_len <= num_keys:
        assert sorted(positions) == list(range(context_len))
        return
    sink, observed_len = config.num_sink_tokens, context_len - growth
    recent = min(config.num_recent_tokens + growth, (num_keys - sink) // 2)
    recent = max(recent, config.num_recent_tokens)
    assert set(range(sink)) | set(range(context_len - recent, context_len)) <= set(positions)
    chosen = [p for p in positions if sink <= p < context_len - recent]
    candidates = range(sink, max(observed_len - config.num_recent_tokens, sink))
    assert len(chosen) == min(num_keys - sink - recent, len(candidates))
    pooled = torch.nn.functional.avg_pool1d(mass[None], 5, 1, 2)[0]
    best = sorted(candidates, key=lambda p: -float(pooled[p]))[: len(chosen)]
    assert sum(float(pooled[p]) for p in chosen) == pytest.approx(
        sum(float(pooled[p]) for p in best), rel=1e-4
    )


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 96, 97, 128, 200, 255, 256])
def test_every_prompt_length_is_observed_whole_by_its_last_rows(
    length: int, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    """The reference code builds no selection for multiples of its chunk."""
    config = engine_config(tiny_model_dir, draft_length=2, draft_budget=20, drafter="snapkv")
    engine = make_engine(config)
    seen: list[int] = []
    drafter = self_drafter(engine)
    watch = drafter.watch

    def spy(sequences: Any, layout: Any) -> Any:
        observer = watch(sequences, layout)
        if observer is not None:
            seen.extend(o.num_rows for o in observer._observations)
        return observer

    drafter.watch = spy
    request = requests_of(random_prompts([length]), GREEDY)[0]
    engine.add(request)
    while not engine.step():
        pass
    assert seen == [min(length, OBSERVATION_WINDOW)]
    (selection,) = drafter._selections.values()
    assert selection.observed_len == length
    assert sorted(selection.positions) == [0, 1, 2]
    run(engine)
    assert drafter._selections == {} or not engine.has_unfinished()


@pytest.mark.parametrize("refresh_rounds", [1, 3])
def test_recycled_takes_a_selection_in_the_first_round_and_then_every_so_many(
    refresh_rounds: int, tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = engine_config(
        tiny_model_dir,
        draft_length=2,
        draft_budget=20,
        drafter="recycled",
        refresh_rounds=refresh_rounds,
    )
    engine = make_engine(config)
    engine.add(requests_of(random_prompts([100]), GREEDY)[0])
    lengths: list[int] = []
    while engine.has_unfinished():
        engine.step()
        selections = self_drafter(engine)._selections.values()
        lengths += [s.observed_len for s in selections]
    changes = [i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]]
    gaps = {b - a for a, b in pairwise(changes)}
    assert gaps == {refresh_rounds}
    assert changes[0] == 1  # the prompt's selection serves one round


def test_a_round_that_explores_puts_the_refresh_off(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = engine_config(
        tiny_model_dir, draft_length=2, draft_budget=20, drafter="recycled", refresh_rounds=1
    )
    engine = make_engine(config)
    engine.add(requests_of(random_prompts([100]), GREEDY)[0])
    plan = Plan("recycled", 2, 20)
    while not engine.step():
        pass
    seen = []
    for explores in (True, False, True, True, False):  # the first one has the prompt's selection
        engine.policy = FixedPolicy(replace(plan, explores=explores))
        engine.step()
        (selection,) = self_drafter(engine)._selections.values()
        seen.append(selection)
    assert seen[1] is not seen[0]
    assert seen[1] is seen[2] is seen[3]
    assert seen[4] is not seen[3]


def test_refreshes_of_a_batch_are_spread_over_the_rounds(
    tiny_model_dir: Path, make_engine: EngineFactory
) -> None:
    config = engine_config(
        tiny_model_dir,
        draft_length=1,
        draft_budget=20,
        drafter="recycled",
        refresh_rounds=3,
        num_blocks=128,
    )
    engine = make_engine(config)
    sampling = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    for request in requests_of(random_prompts([40] * 6), sampling):
        engine.add(request)
    while engine.load().num_waiting or engine.load().num_prefill_tokens:
        engine.step()
    held: list[dict[int, Selection]] = []
    for _ in range(16):
        engine.step()
        held.append(dict(self_drafter(engine)._selections))
    assert all(len(selections) == 6 for selections in held)
    changed = [
        [key for key in after if after[key] is not before[key]] for before, after in pairwise(held)
    ]
    assert max(map(len, changed[1:])) == 2  # six sequences, every three rounds
    for key in held[0]:
        rounds = [n for n, keys in enumerate(changed) if key in keys]
        assert {b - a for a, b in pairwise(rounds[1:])} == {3}
