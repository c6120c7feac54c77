"""The figures of one batch at one context, planned or measured: what a table of them is made of."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepShares:
    """Where the time of a plain step goes; they sum to 1."""

    weights: float  # reading the linears' weights, where that takes longer than their arithmetic
    kv: float  # reading the KV cache
    compute: float  # the arithmetic of attention, and of the linears where it takes longer
    overhead: float  # host, launches, all-reduces: whatever the size of the step


@dataclass(frozen=True, slots=True)
class DraftFigures:
    """What drafts best, and what it reaches. `draft_length` 0 is plain decoding: nothing pays."""

    draft_length: int
    tokens_per_second: float  # of the whole batch
    drafter: str | None = None  # None: nobody drafts, as in the next two
    draft_budget: int | None = None  # None as well: the drafter reads no view
    acceptance: float | None = None


@dataclass(frozen=True, slots=True)
class PointFigures:
    """A batch of sequences of one length. What does not fit in the KV pool has no rates."""

    batch_size: int
    context_len: int
    kv_share: float | None = None  # of the KV pool; above 1 it does not fit; None: not known
    plain_tokens_per_second: float | None = None  # of the whole batch
    draft: DraftFigures | None = None
    shares: StepShares | None = None

    @property
    def speedup(self) -> float | None:
        """Speculative tokens a second over plain ones."""
        if self.draft is None or self.plain_tokens_per_second is None:
            return None
        return self.draft.tokens_per_second / self.plain_tokens_per_second
