"""Which drafted tokens stand: accept while equal.

Draft and target choose argmax(score + noise) with the *same* noise at a position (drafter-invariant
speculative decoding, arXiv 2408.07978; temperature 0 has no noise). A draft that equals the
target's own choice is that choice, and the first one that differs is replaced by it; so the emitted
tokens are the target's autoregressive sample of that seed, whatever was drafted.
"""

from collections.abc import Sequence


def accept(draft_token_ids: Sequence[int], target_token_ids: Sequence[int]) -> tuple[int, ...]:
    """The tokens a round emits: accepted drafts, then the recovered or bonus token.

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
