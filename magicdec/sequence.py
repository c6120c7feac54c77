"""A request being served, as the engine and the scheduler know it."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from magicdec.types import Request, Usage


class SequenceStatus(Enum):
    WAITING = "waiting"  # holds no block
    RUNNING = "running"
    FINISHED = "finished"  # holds no block


@dataclass(slots=True, eq=False)
class Sequence:
    """A request being served: its tokens, its place in the KV pool, its counters.

        token_ids   |<---- prompt ---->|<---- output ---->|
        KV          |<-- num_computed_tokens -->|  still to be computed: 1 for a decode row

    Blocks in `block_table` cover at least the computed tokens; a preempted sequence has none and
    num_computed_tokens 0, so resuming, preemption and chunked prefill are one path. Other
    sequences may hold blocks below num_computed_tokens too (prefix_cache.py).

    Tokens are only ever appended, and blocks changed by the methods alone: the arrays that ranks
    are given are brought up to date from there, not copied each round.
    """

    request: Request
    arrival: int  # admission order; the oldest is never preempted
    token_ids: list[int]
    sequence_id: int = 0  # of this stay in the running set
    num_computed_tokens: int = 0
    block_table: "array[int]" = field(default_factory=lambda: array("q"))
    block_hashes: list[bytes] = field(default_factory=list)  # of its first full blocks
    num_registered_blocks: int = 0  # of block_table, known to the prefix cache
    num_cached_tokens: int | None = None  # of the prompt, found when it was first admitted
    status: SequenceStatus = SequenceStatus.WAITING
    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    drafter: str | None = None  # who drafted for it last
    # Of the request: each is read in every round.
    num_prompt_tokens: int = field(init=False)
    most_tokens: int = field(init=False)  # prompt and output, at max_tokens
    follows_plan: bool = field(init=False)  # it has no wish of its own for its drafts
    has_penalties: bool = field(init=False)
    _table: NDArray[np.int64] | None = field(init=False, default=None)  # until the blocks change
    _ids: NDArray[np.int64] | None = field(init=False, default=None)  # room for the history
    _num_ids: int = field(init=False, default=0)  # of token_ids that are in it

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.most_tokens = self.num_prompt_tokens + sampling.max_tokens
        self.follows_plan = self.request.speculation.leaves_all
        self.has_penalties = sampling.has_penalties

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def decodes(self) -> bool:
        """Its last token, an output token, is all that is not computed."""
        num_tokens = len(self.token_ids)
        return num_tokens - self.num_computed_tokens == 1 and num_tokens > self.num_prompt_tokens

    def useful_draft_length(self, max_model_len: int) -> int:
        """Tokens past the end of the request or of the context would be thrown away."""
        most = self.most_tokens if self.most_tokens < max_model_len else max_model_len
        length = most - len(self.token_ids) - 1
        return length if length > 0 else 0

    def draft_limit(self, max_model_len: int) -> int:
        """The same for a plan; 0 where the request has a wish of its own, and goes by that."""
        return self.useful_draft_length(max_model_len) if self.follows_plan else 0

    def hold_blocks(self, blocks: Iterable[int]) -> None:
        """In place of those that it held."""
        self.block_table, self._table = array("q", blocks), None

    def add_blocks(self, blocks: Iterable[int]) -> None:
        """After those that it holds."""
        self.block_table.extend(blocks)
        self._table = None

    def cut_blocks(self, count: int) -> "array[int]":
        """Keeps the first so many; returns the others."""
        cut = self.block_table[count:]
        del self.block_table[count:]
        self._table = None
        return cut

    def table_array(self) -> NDArray[np.int64]:
        """[num_blocks]. The same array, never written to, until a block comes or goes."""
        if self._table is None:
            self._table = np.array(self.block_table, dtype=np.int64)
        return self._table

    def next_token_ids(self, count: int) -> NDArray[np.int64]:
        """[count], from the first that is not computed on."""
        start = self.num_computed_tokens
        return np.array(self.token_ids[start : start + count], dtype=np.int64)

    def history(self) -> NDArray[np.int64]:
        """Prompt and output, [num_tokens]: a view that later tokens leave as it is."""
        num_tokens = len(self.token_ids)
        if self._ids is None or num_tokens > len(self._ids):
            self._ids = np.empty(2 * num_tokens, dtype=np.int64)
            self._num_ids = 0
        self._ids[self._num_ids : num_tokens] = self.token_ids[self._num_ids :]
        self._num_ids = num_tokens
        return self._ids[:num_tokens]

    def usage(self) -> Usage:
        return Usage(
            self.num_prompt_tokens,
            len(self.token_ids) - self.num_prompt_tokens,
            self.num_cached_tokens or 0,
            self.num_rounds,
            self.num_draft_tokens,
            self.num_accepted_tokens,
            self.drafter,
        )
