"""How the rows that a step has for prompts are divided among them."""

from collections.abc import Sequence

from magicdec.config import OBSERVATION_WINDOW
from magicdec.sequence import Sequence as ServedSequence


def prefill_chunks(
    prefilling: Sequence[ServedSequence], num_rows: int
) -> list[tuple[ServedSequence, int]]:
    """Who prefills how many rows of a step that has so many for prompts."""
    if not prefilling:
        return []
    shares = prefill_shares([s.num_uncomputed_tokens for s in prefilling], num_rows)
    return [(s, share) for s, share in zip(prefilling, shares, strict=True) if share > 0]


def prefill_shares(left: Sequence[int], num_rows: int) -> list[int]:
    """Rows of each prompt's next chunk, [num_prompts]; `left` is what each has to compute yet,
    oldest first.

    Half for the oldest, the rest evenly, and what one cannot use goes to the others: a short prompt
    behind a long one soon has its first token, and equal ones still end one after the other. The
    last chunk of a prompt holds its whole observation window, so the boundary before it moves; the
    oldest always gets on where there are rows for one window.
    """
    shares = [0] * len(left)
    if not left or num_rows <= 0:
        return shares
    shares[0] = min(left[0], max(num_rows // 2, min(num_rows, OBSERVATION_WINDOW)))
    spare = num_rows - shares[0]
    by_length = sorted(range(1, len(left)), key=lambda i: left[i])
    for num_done, i in enumerate(by_length):
        shares[i] = _chunk(left[i], spare // (len(by_length) - num_done))
        spare -= shares[i]
    for i, num_left in enumerate(left):  # what rounding and whole windows left over
        share = _chunk(num_left, shares[i] + spare)
        spare -= share - shares[i]
        shares[i] = share
    return shares


def rows_wanted(prefilling: Sequence[ServedSequence], num_rows: int) -> int:
    """Rows of such a step that these prompts have a use for; with fewer than there are, another
    prompt may begin. The oldest counts for its half at most: a short prompt need not wait for it.
    """
    if not prefilling:
        return 0
    oldest, *others = [s.num_uncomputed_tokens for s in prefilling]
    return min(oldest, num_rows // 2) + sum(others)


def _chunk(num_left: int, num_rows: int) -> int:
    """The longest chunk of at most so many rows that leaves a whole window or nothing."""
    return (
        num_left if num_left <= num_rows else max(min(num_rows, num_left - OBSERVATION_WINDOW), 0)
    )
