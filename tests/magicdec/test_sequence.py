"""The arrays that ranks are given are those of the sequence, whatever happened in between."""

from random import Random

import numpy as np

from magicdec.sequence import Sequence
from magicdec.types import Request


def sequence_of(num_tokens: int) -> Sequence:
    return Sequence(Request("r", (0,)), 0, list(range(num_tokens)))


def test_the_table_is_the_same_array_until_a_block_comes_or_goes() -> None:
    sequence = sequence_of(40)
    sequence.hold_blocks([7, 8])
    table = sequence.table_array()
    sequence.token_ids.append(3)
    assert sequence.table_array() is table
    sequence.add_blocks([2])
    longer = sequence.table_array()
    assert list(sequence.cut_blocks(2)) == [2]
    sequence.add_blocks([5])
    assert table.tolist() == [7, 8], "an earlier step's table has changed"
    assert longer.tolist() == [7, 8, 2]
    assert sequence.table_array().tolist() == [7, 8, 5]
    sequence.hold_blocks(())
    assert len(sequence.table_array()) == 0


def test_the_history_follows_the_tokens_and_leaves_earlier_ones_as_they_are() -> None:
    sequence, random = sequence_of(5), Random(0)
    taken: list[tuple[list[int], np.ndarray]] = []
    for _ in range(40):
        sequence.token_ids += [random.randrange(1000) for _ in range(random.randrange(4))]
        taken.append((list(sequence.token_ids), sequence.history()))
    for tokens, history in taken:
        assert history.dtype == np.int64
        assert history.tolist() == tokens
