"""The target drafts for itself over a small part of its KV cache (MagicDec, arXiv 2408.11049)."""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from magicdec.attention import AttentionContext, AttentionObserver
from magicdec.batch import ScheduledSequence
from magicdec.config import SelectionConfig
from magicdec.device_span import DeviceSpan
from magicdec.draft_attention import DraftAttention
from magicdec.draft_views import DraftViews
from magicdec.drafters.base import Forward, Propose
from magicdec.drafters.next_drafts import NextDrafts
from magicdec.drafts import AcceptedDrafts, DeviceDraft, Draft
from magicdec.graphs.draft_graphs import DraftGraphs, DraftRound
from magicdec.kernels.dispatch import AttentionBackend
from magicdec.kernels.paged_layout import PagedLayout
from magicdec.kv_cache import PagedKVCache
from magicdec.observation import (
    Observation,
    SelectionObserver,
    observe_prompt,
    observe_round,
)
from magicdec.sampler import Proposal, SamplerRow
from magicdec.sparse_kv import Selection


@dataclass(frozen=True, slots=True)
class SelectionPolicy:
    """Where a view's selection comes from; with neither it is sink and recent window."""

    observes_prompt: bool
    observes_rounds: bool


POLICIES = {
    "streaming": SelectionPolicy(observes_prompt=False, observes_rounds=False),
    "snapkv": SelectionPolicy(observes_prompt=True, observes_rounds=False),
    "recycled": SelectionPolicy(observes_prompt=True, observes_rounds=True),
}


class DraftContext(AttentionContext, Protocol):
    """An attention context for single-row steps."""

    def begin_step(self, step: int) -> torch.Tensor:
        """Moves to draft step 0, 1, ...; returns the rows' absolute positions, [batch]."""
        ...


class SelfDrafter:
    """Autoregressive draft steps of the same weights, one row a sequence.

    The policies differ in their views alone, so sequences of all of them share a step. Keeps a
    Selection a sequence; one without (it was never observed) drafts over the streaming view.
    """

    def __init__(
        self,
        forward: Forward,
        propose: Propose,
        cache: PagedKVCache,
        backend: AttentionBackend,
        config: SelectionConfig,
        selection_budget: int = 0,
        graphs: DraftGraphs | None = None,
    ) -> None:
        """`selection_budget`: selections are made for so many positions at least, of which a
        smaller view takes the best. `graphs` take the place of `forward` where they can."""
        self._forward = forward
        self._propose = propose
        self._cache = cache
        self._backend = backend
        self._config = config
        self._selection_budget = selection_budget
        self._graphs = graphs
        self._selections: dict[int, Selection] = {}
        self._rounds_since: dict[int, float] = {}  # verify passes since one was taken of a round

    def propose(self, sequences: list[ScheduledSequence]) -> Sequence[Draft]:
        """See Drafter.propose."""
        views = self._views(sequences)
        attention = DraftAttention(self._cache, self._backend, views)
        if self._graphs is None:
            return draft_steps(sequences, attention, self._forward, self._propose)
        first_rows = [SamplerRow.after(s, ()) for s in sequences]
        replayed = self._graphs.begin(views, first_rows)
        if replayed is not None and replayed.chooses:
            return replay_steps(sequences, first_rows, replayed)
        return draft_steps(sequences, attention, replayed or self._forward, self._propose)

    def begin_next(
        self,
        sequences: Sequence[ScheduledSequence],
        drafts: Sequence[Draft],  # of this round, a sequence
        starts: Sequence[int],  # where each draft's choices begin, one more than its tokens
        chosen: torch.Tensor,  # int64 [num_choices] on the device, see VerificationRule.verify
    ) -> NextDrafts | None:
        """Launches the drafts that follow on this round's choices, for the same sequences and over
        the views that they have by now. None: not without the host."""
        accepted = AcceptedDrafts.of(drafts, starts, chosen)
        if self._graphs is None or accepted is None:
            return None
        span = DeviceSpan(chosen.device)
        # As if nothing had been accepted: the device adds what was.
        following = [s._replace(num_computed_tokens=s.num_tokens) for s in sequences]
        views = self._views(following, num_ahead=max(map(len, drafts)))
        first_rows = [SamplerRow.after(s, ()) for s in following]
        replayed = self._graphs.begin(views, first_rows, accepted)
        if replayed is None or not replayed.chooses:
            return None
        begun = replay_steps(following, first_rows, replayed)
        span.end()
        pairs = zip(following, begun, strict=True)
        return NextDrafts({s.sequence_id: (s.draft, draft) for s, draft in pairs}, span)

    def _views(self, sequences: Sequence[ScheduledSequence], num_ahead: int = 0) -> DraftViews:
        return DraftViews(
            draft_layout(sequences, self._cache.block_size),
            self._config,
            max(s.draft_length for s in sequences),
            [s.draft.draft_budget for s in sequences if s.draft is not None],
            [self._selection(s) for s in sequences],
            num_ahead,
        )

    def watch(
        self, sequences: tuple[ScheduledSequence, ...], layout: PagedLayout
    ) -> AttentionObserver | None:
        """See Drafter.watch. The observed selections serve from the next round on."""
        observations: list[Observation] = []
        due = self._due(sequences)
        for i, sequence in enumerate(sequences):
            observation = self._observation(i, sequence, layout.query_lens[i], due)
            if observation is not None:
                budget = max(observation.draft_budget, self._selection_budget)
                observations.append(replace(observation, draft_budget=budget))
                self._selections[sequence.sequence_id] = observation.selection
                # The prompt's rows are a guess at what the answer needs: its first round corrects.
                age = 0.0 if sequence.is_decode_row else math.inf
                self._rounds_since[sequence.sequence_id] = age
        if not observations:
            return None
        return SelectionObserver(observations, layout, self._config, self._backend)

    def release(self, sequence_ids: Sequence[int]) -> None:
        """See Drafter.release."""
        for sequence_id in sequence_ids:
            self._selections.pop(sequence_id, None)
            self._rounds_since.pop(sequence_id, None)

    def _selection(self, sequence: ScheduledSequence) -> Selection | None:
        assert sequence.draft is not None
        if not POLICIES[sequence.draft.drafter].observes_prompt:
            return None
        return self._selections.get(sequence.sequence_id)

    def _observation(
        self, index: int, sequence: ScheduledSequence, num_rows: int, due: Set[int]
    ) -> Observation | None:
        """What this verify forward is to show of one sequence, if anything."""
        policy = _policy_of(sequence)
        if policy is None or not policy.observes_prompt or sequence.sampling is None:
            return None
        if not sequence.is_decode_row:
            return observe_prompt(index, sequence)
        if sequence.sequence_id not in due:
            return None
        return observe_round(index, sequence, num_rows, self._config)

    def _due(self, sequences: Sequence[ScheduledSequence]) -> set[int]:
        """Ids of the decode rows whose view is chosen again.

        The oldest of them, so many a round as share the batch out over refresh_rounds: all at once
        would be a stall. One that has its prompt's selection, or none, does not wait.
        """
        drafting = [s for s in sequences if s.draft_length > 0 and s.is_decode_row]
        refreshed = [s for s in drafting if (p := _policy_of(s)) is not None and p.observes_rounds]
        ages: list[tuple[float, int]] = []
        for sequence in refreshed:
            age = self._rounds_since.get(sequence.sequence_id, math.inf) + 1
            self._rounds_since[sequence.sequence_id] = age
            may_refresh = sequence.draft is not None and sequence.draft.may_refresh
            if age >= self._config.refresh_rounds and may_refresh:
                ages.append((age, sequence.sequence_id))
        share = -(-len(refreshed) // self._config.refresh_rounds)
        oldest = sorted(ages, reverse=True)
        return {key for n, (age, key) in enumerate(oldest) if n < share or age == math.inf}


def _policy_of(sequence: ScheduledSequence) -> SelectionPolicy | None:
    return None if sequence.draft is None else POLICIES.get(sequence.draft.drafter)


def draft_layout(sequences: Sequence[ScheduledSequence], block_size: int) -> PagedLayout:
    """One row a sequence: its last token, the only one not computed."""
    return PagedLayout(
        query_lens=(1,) * len(sequences),
        context_lens=tuple(s.num_computed_tokens for s in sequences),
        block_tables=tuple(s.block_table for s in sequences),
        block_size=block_size,
    )


def draft_steps(
    sequences: list[ScheduledSequence],
    attention: DraftContext,
    forward: Forward,
    propose: Propose,
) -> list[tuple[Proposal, ...]]:
    """One forward a drafted token. Rows with a shorter draft run along and are cut."""
    drafts: list[tuple[Proposal, ...]] = [() for _ in sequences]
    token_ids = torch.tensor([int(s.token_ids[0]) for s in sequences])
    last = torch.tensor([s.num_computed_tokens + s.draft_length for s in sequences])
    for step in range(max(s.draft_length for s in sequences)):
        # A row whose own draft is done stays where its context still has positions.
        positions = torch.minimum(attention.begin_step(step), last)
        rows = [
            SamplerRow.after(s, tuple(p.token_id for p in d))
            for s, d in zip(sequences, drafts, strict=True)
        ]
        chosen = propose(forward(token_ids, positions, attention), rows)
        drafts = [(*d, proposal) for d, proposal in zip(drafts, chosen, strict=True)]
        token_ids = torch.tensor([proposal.token_id for proposal in chosen])
    return [d[: s.draft_length] for d, s in zip(drafts, sequences, strict=True)]


def replay_steps(
    sequences: list[ScheduledSequence], first_rows: list[SamplerRow], replayed: DraftRound
) -> list[DeviceDraft]:
    """draft_steps() without the host between the steps, nor after them: the same tokens."""
    tokens = replayed.draft(
        token_ids=[int(s.token_ids[0]) for s in sequences],
        positions=[s.num_computed_tokens for s in sequences],
        last=[s.num_computed_tokens + s.draft_length for s in sequences],
        rows=first_rows,
    )
    return [DeviceDraft(tokens, i, s.draft_length) for i, s in enumerate(sequences)]
