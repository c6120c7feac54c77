"""The attention function that transformers models call, and the two contexts it may run in."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.heads import Heads, RotatedHeads
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kernels.transfer import send
from magicdec.kv_cache import PagedKVCache

ATTENTION_NAME = "magicdec"


class UnsupportedModel(ValueError):
    """A model whose attention cannot be served from our pages; the message says why."""


class AttentionContext(Protocol):
    """Where one forward reads and writes K/V."""

    def attend(
        self,
        layer: int,
        heads: Heads,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Stores the rows' K/V and returns their attention, shaped like their query."""
        ...


class AttentionObserver(Protocol):
    """Is shown some rows of each layer of a verify forward, and looks at their keys after it."""

    @property
    def num_sequences(self) -> int:
        """How many of the forward's it looks at."""
        ...

    def over(self, sequences: Sequence[int], layout: PagedLayout) -> "AttentionObserver":
        """Of these sequences alone, for a forward that has no others, in this layout."""
        ...

    def rows(self, starts: Sequence[int]) -> list[slice]:
        """Which rows it is shown, where those of each of the forward's sequences begin there."""
        ...

    def observe(
        self,
        layer: int,
        queries: Sequence[torch.Tensor],  # rows() of it: [num_query_heads, num_rows, head_dim]
        k_cache: torch.Tensor,  # [num_kv_heads, num_slots, head_dim], after rotary, as queries are
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> None:
        """Keeps them: they and the rows' K/V in the pages stay as they are until finish()."""
        ...

    def finish(self) -> None:
        """After the last layer."""
        ...


def register_attention() -> None:
    AttentionInterface.register(ATTENTION_NAME, attention_forward)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # [1, num_query_heads, num_rows, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_rows, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    attention_context: AttentionContext | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **ignored: object,
) -> tuple[torch.Tensor, None]:
    """transformers' signature. Masks never come: none is built for our name.

    Raises UnsupportedModel for attention sinks, for bidirectional layers, and where the context
    does not arrive.
    """
    if attention_context is None:
        raise UnsupportedModel(
            f"{type(module).__name__} is not given the keyword arguments of the model's forward"
        )
    if s_aux is not None:
        raise UnsupportedModel("attention sinks (s_aux) are not supported")
    if vars(module).get("is_causal") is False:
        raise UnsupportedModel("bidirectional attention is not supported")
    assert isinstance(module.layer_idx, int)
    output = attention_context.attend(
        module.layer_idx,
        RotatedHeads(query[0], key[0], value[0]),
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return output.transpose(0, 1)[None], None


class PagedAttention:
    """Prefill, plain decoding and verification: every row over all of its sequence's pages."""

    def __init__(
        self,
        cache: PagedKVCache,
        layout: PagedLayout,
        backend: AttentionBackend,
        observers: Sequence[AttentionObserver] = (),
    ) -> None:
        self._cache = cache
        self._layout = layout
        self._backend = backend
        self._observers = observers
        self._row_starts = np.cumsum((0, *layout.query_lens[:-1])).tolist()
        device = cache.k[0].device
        self._slot_mapping = send(torch.from_numpy(layout.slot_mapping()), device)

    def attend(
        self,
        layer: int,
        heads: Heads,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        k_cache, v_cache = self._cache.k[layer], self._cache.v[layer]
        query = heads.stored(self._backend.store, k_cache, v_cache, self._slot_mapping)
        output = self._backend.paged(
            query, k_cache, v_cache, self._layout, scaling, sliding_window, softcap
        )
        for observer in self._observers:
            # Of the step's many rows only these outlive the layer.
            observer.observe(
                layer,
                [query[:, rows].clone() for rows in observer.rows(self._row_starts)],
                k_cache,
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
            )
        return output


def row_positions(layout: PagedLayout) -> torch.Tensor:
    """Absolute position of every packed row, [num_rows]."""
    spans = zip(layout.context_lens, layout.query_lens, strict=True)
    return torch.from_numpy(np.concatenate([np.arange(c, c + n) for c, n in spans]))
