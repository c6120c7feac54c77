"""Which drafted tokens stand. A rule owns both halves: how drafts are drawn, how they are judged.

Shared noise, the default: draft and target choose argmax(score + noise) with the *same* noise at a
position (drafter-invariant speculative decoding, arXiv 2408.07978; temperature 0 has no noise). A
draft that equals the target's own choice is that choice, and the first one that differs is replaced
by it; so the emitted tokens are the target's autoregressive sample of that seed, whatever was
drafted.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from magicdec.sampler import Proposal, Sampler, SamplerRow


class VerificationRule(Protocol):
    def propose(self, logits: torch.Tensor, rows: list[SamplerRow]) -> list[Proposal]:
        """Draws the next token of each draft. logits: [num_rows, vocab_size] of the drafter."""
        ...

    def verify(
        self,
        logits: torch.Tensor,  # [num_rows, vocab_size] of the target
        rows: list[SamplerRow],
        drafts: list[tuple[Proposal, ...]],
    ) -> list[tuple[int, ...]]:
        """The tokens each round emits: accepted drafts, then the recovered or bonus token.

        Every draft has one row more than tokens; rows of all drafts stand back to back.
        """
        ...


class SharedNoise:
    """Accept while equal."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def propose(self, logits: torch.Tensor, rows: list[SamplerRow]) -> list[Proposal]:
        """See VerificationRule.propose. The law is not kept: equality needs none."""
        return [Proposal(token_id) for token_id in self._sampler.sample(logits, rows)]

    def verify(
        self, logits: torch.Tensor, rows: list[SamplerRow], drafts: list[tuple[Proposal, ...]]
    ) -> list[tuple[int, ...]]:
        """See VerificationRule.verify."""
        chosen = iter(self._sampler.sample(logits, rows))
        return [
            accept([p.token_id for p in draft], [next(chosen) for _ in range(len(draft) + 1)])
            for draft in drafts
        ]


def accept(draft_token_ids: Sequence[int], target_token_ids: Sequence[int]) -> tuple[int, ...]:
    """The tokens a round emits under shared noise.

    target_token_ids[i] is the target's choice after draft_token_ids[:i]; it has one more entry
    than the draft. Entries after the first disagreement were computed on a prefix that does not
    stand and are dropped.
    """
    if len(target_token_ids) != len(draft_token_ids) + 1:
        raise ValueError(
            f"{len(draft_token_ids)} drafts need {len(draft_token_ids) + 1} target tokens, "
            f"got {len(target_token_ids)}"
        )
    num_accepted = 0
    for draft, target in zip(draft_token_ids, target_token_ids, strict=False):
        if draft != target:
            break
        num_accepted += 1
    return tuple(target_token_ids[: num_accepted + 1])
