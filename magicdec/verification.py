"""Which drafted tokens stand. A rule owns both halves: how drafts are drawn, how they are judged.

Shared noise, the default: draft and target choose argmax(score + noise) with the *same* noise at a
position (drafter-invariant speculative decoding, arXiv 2408.07978; temperature 0 has no noise). A
draft that equals the target's own choice is that choice, and the first one that differs is replaced
by it; so the emitted tokens are the target's autoregressive sample of that seed, whatever was
drafted.

Optimal coupling: rejection sampling of a draft whose law is known. It accepts more, and keeps the
target's law but not the sample.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from magicdec.drafts import Draft, fetch, token_ids_of
from magicdec.kernels.gumbel import Role
from magicdec.sampler import Proposal, Sampler, SamplerRow
from magicdec.vocabulary import Vocabulary

Meanwhile = Callable[[torch.Tensor], None]


class VerificationRule(Protocol):
    def propose(self, logits: torch.Tensor, rows: list[SamplerRow]) -> list[Proposal]:
        """Draws the next token of each draft. logits: the drafter's, [num_rows, vocab_size]; a
        rank's share of them where the rule was made for that, as in `verify`."""
        ...

    def only_scales(self, rows: list[SamplerRow]) -> bool:
        """Whether propose() would choose, of each row and of its draft's later ones, by logits over
        temperature and the shared noise alone: then a graph may choose in its place."""
        ...

    def verify(
        self,
        logits: torch.Tensor,  # [num_rows, vocab_size] of the target
        rows: list[SamplerRow],
        drafts: Sequence[Draft],
        meanwhile: Meanwhile | None = None,
    ) -> list[tuple[int, ...]]:
        """The tokens each round emits: accepted drafts, then the recovered or bonus token.

        Every draft has one row more than tokens; rows of all drafts stand back to back. A rule that
        chooses on the device calls `meanwhile` with each row's choice, int64 [num_rows], before the
        host waits for them; others do not.
        """
        ...


class SharedNoise:
    """Accept while equal. Ranks that share a vocabulary sample together."""

    def __init__(self, sampler: Sampler, vocabulary: Vocabulary | None = None) -> None:
        self._sampler = sampler
        self._vocabulary = vocabulary

    def propose(self, logits: torch.Tensor, rows: list[SamplerRow]) -> list[Proposal]:
        """See VerificationRule.propose. The law is not kept: equality needs none."""
        chosen = self._sampler.sample(logits, rows, self._vocabulary)
        return [Proposal(token_id) for token_id in chosen]

    def only_scales(self, rows: list[SamplerRow]) -> bool:
        """See VerificationRule.only_scales."""
        return all(map(self._sampler.only_scales, rows))

    def verify(
        self,
        logits: torch.Tensor,
        rows: list[SamplerRow],
        drafts: Sequence[Draft],
        meanwhile: Meanwhile | None = None,
    ) -> list[tuple[int, ...]]:
        """See VerificationRule.verify."""
        chosen = fetch(self._sampler.winners(logits, rows, self._vocabulary), drafts, meanwhile)
        stops = list(accumulate(len(draft) + 1 for draft in drafts))
        return [
            accept(token_ids_of(draft), chosen[stop - len(draft) - 1 : stop])
            for draft, stop in zip(drafts, stops, strict=True)
        ]


class OptimalCoupling:
    """Accept x ~ q with probability min(1, p(x) / q(x)); replace the first rejected token by a draw
    from norm(max(p - q, 0)) (arXiv 2211.17192, 2302.01318).

    Accepts with probability sum(min(p, q)), which no rule exceeds. The price: which tokens come
    depends on where rounds begin and on what was drafted, so that a seed gives the same tokens only
    under the same draft lengths, budgets and drafter, and a stream that resumes on another
    replica goes on with the right law but other tokens. At temperature 0 the tokens are plain
    decoding's. Laws are of the whole vocabulary: ranks that share it send each other all logits.
    """

    def __init__(self, sampler: Sampler, vocabulary: Vocabulary | None = None) -> None:
        self._sampler = sampler
        self._vocabulary = vocabulary

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self._vocabulary is None else self._vocabulary.join(logits.float())

    def propose(self, logits: torch.Tensor, rows: list[SamplerRow]) -> list[Proposal]:
        """See VerificationRule.propose. Sampled drafts keep their law."""
        logits = self._whole(logits)
        return [self._propose(logits[i : i + 1], row) for i, row in enumerate(rows)]

    def _propose(self, logits: torch.Tensor, row: SamplerRow) -> Proposal:
        if row.sampling.temperature == 0.0:
            return Proposal(self._sampler.sample(logits, [row])[0])
        scores = self._sampler.process(logits[0].float().cpu(), row)
        return Proposal(self._sampler.choose(scores.numpy(), row, Role.PROPOSE), scores)

    def only_scales(self, rows: list[SamplerRow]) -> bool:
        """See VerificationRule.only_scales. A sampled draft's law must come to the host."""
        is_greedy = all(row.sampling.temperature == 0.0 for row in rows)
        return is_greedy and all(self._sampler.only_scales(row) for row in rows)

    def verify(
        self,
        logits: torch.Tensor,
        rows: list[SamplerRow],
        drafts: Sequence[Draft],
        meanwhile: Meanwhile | None = None,
    ) -> list[tuple[int, ...]]:
        """See VerificationRule.verify. What is chosen is chosen on the host."""
        logits = self._whole(logits)
        emitted, start = [], 0
        for draft in drafts:
            stop = start + len(draft) + 1
            emitted.append(self._judge(logits[start:stop], rows[start:stop], tuple(draft)))
            start = stop
        return emitted

    def _judge(
        self, logits: torch.Tensor, rows: list[SamplerRow], draft: tuple[Proposal, ...]
    ) -> tuple[int, ...]:
        """One draft's round; rows after the first rejection are never looked at."""
        token_ids = tuple(proposal.token_id for proposal in draft)
        if rows[0].sampling.temperature == 0.0:
            return accept(token_ids, self._sampler.sample(logits, rows))
        for i, proposal in enumerate(draft):
            p = probabilities(self._sampler.process(logits[i].float().cpu(), rows[i]))
            q = _draft_law(proposal, len(p))
            uniform = self._sampler.uniform(rows[i], Role.ACCEPT)
            if uniform * q[proposal.token_id] >= p[proposal.token_id]:
                return (*token_ids[:i], self._recover(residual(p, q), rows[i]))
        return (*token_ids, self._bonus(logits[len(draft)], rows[len(draft)]))

    def _recover(self, weights: NDArray[np.float64], row: SamplerRow) -> int:
        with np.errstate(divide="ignore"):
            scores = np.log(weights)
        return self._sampler.choose(scores, row, Role.RECOVER)

    def _bonus(self, logits: torch.Tensor, row: SamplerRow) -> int:
        scores = self._sampler.process(logits.float().cpu(), row)
        return self._sampler.choose(scores.numpy(), row, Role.RECOVER)


def probabilities(scores: torch.Tensor) -> NDArray[np.float64]:
    """exp(scores), normalised in float64: [vocab_size]. Entries at -inf get exactly 0."""
    weights = np.exp(scores.numpy().astype(np.float64) - float(scores.max()))
    return np.asarray(weights / weights.sum())


def residual(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """max(p - q, 0), [vocab_size], not normalised: what the target holds beyond the draft's law.

    Where that is empty, p: in exact arithmetic nothing is rejected then, but sums that differ in
    their last bit may leave p a little under q everywhere, and then p is the law that was meant.
    """
    excess = np.maximum(p - q, 0.0)
    return excess if excess.any() else p


def _draft_law(proposal: Proposal, vocab_size: int) -> NDArray[np.float64]:
    if proposal.scores is not None:
        return probabilities(proposal.scores)
    certain = np.zeros(vocab_size)
    certain[proposal.token_id] = 1.0
    return certain


def verification_rule(
    name: str,
    sampler: Sampler,
    vocabulary: Vocabulary | None = None,  # that the logits are a rank's share of; None: whole
) -> VerificationRule:
    """The rule of that name in config.VERIFICATION_RULES."""
    if name == "optimal_coupling":
        return OptimalCoupling(sampler, vocabulary)
    return SharedNoise(sampler, vocabulary)


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
    while (
        num_accepted < len(draft_token_ids)
        and draft_token_ids[num_accepted] == target_token_ids[num_accepted]
    ):
        num_accepted += 1
    return tuple(target_token_ids[: num_accepted + 1])
