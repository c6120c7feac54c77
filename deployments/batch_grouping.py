"""Which rows run together: those that begin alike, then those of like length. Pure.

Rows of one beginning share their KV blocks while they are neighbours, and a batch of long contexts
is where drafts gain most. Long ones go first, so that no long row is left alone at the end.
"""

from collections.abc import Iterable, Iterator

from magicdec.deployments.batch_row import BatchRow, prompt_text

WINDOW_ROWS = 2048  # looked at together: an input of any length is streamed
WINDOW_CHARACTERS = 64 << 20
PREFIX_CHARACTERS = 512  # that two prompts must share to be neighbours


def grouped(rows: Iterable[BatchRow]) -> Iterator[BatchRow]:
    """The same rows, window by window in the input's order; within one, by group and length."""
    window: list[tuple[int, BatchRow]] = []
    num_characters = 0
    for row in rows:
        length = len(prompt_text(row.body))
        window.append((length, row))
        num_characters += length
        if len(window) == WINDOW_ROWS or num_characters >= WINDOW_CHARACTERS:
            yield from _sorted(window)
            window, num_characters = [], 0
    yield from _sorted(window)


def _sorted(window: list[tuple[int, BatchRow]]) -> list[BatchRow]:
    groups: dict[str, list[tuple[int, BatchRow]]] = {}
    for length, row in window:
        groups.setdefault(prompt_text(row.body, PREFIX_CHARACTERS), []).append((length, row))
    by_length = [sorted(group, key=lambda e: -e[0]) for group in groups.values()]
    by_length.sort(key=lambda group: -group[0][0])  # stable: the same order each time
    return [row for group in by_length for _, row in group]
