"""Counter-based randomness: a pure function of (seed, position, vocabulary entry, role).

Drafter-invariant verification (arXiv 2408.07978) needs draft and target to see the same noise,
whatever step, batch or replica asks for it. Rejection sampling needs the opposite: draws that know
nothing of each other at one position, which is what roles are for.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Role(IntEnum):
    """What a draw at a position is for; the streams of two roles are disjoint.

    A draw used twice biases what is emitted: the token that was proposed, whether it is accepted
    and what replaces it must be independent.
    """

    SHARED = 0  # one noise for draft and target; resuming a stream relies on its values
    PROPOSE = 1
    ACCEPT = 2
    RECOVER = 3  # recovered and bonus tokens: a position has one or the other


def random_words(
    seed: int, position: int, num_words: int, role: int = Role.SHARED, step: int = 0
) -> NDArray[np.uint32]:
    """Philox4x64-10 with key (seed, 0) and counter (block, position, role, step), blocks from 1.

    Entry v is half v % 2 (low half first) of 64-bit word v // 2 of the stream.
    """
    # NumPy increments the counter before its first block.
    stream = np.random.Philox(
        key=np.array([seed, 0], dtype=np.uint64),
        counter=np.array([0, position, role, step], dtype=np.uint64),
    )
    words = stream.random_raw((num_words + 1) // 2).astype("<u8", copy=False)
    return words.view("<u4")[:num_words]


def uniforms(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """(word + 0.5) / 2**32: above 0, and below 1 by enough that u * q < q for every q > 0."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def gumbel_noise(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """-log(-log(u)) of the words' uniforms, so within [-3.2, 22.9] and never infinite."""
    return np.asarray(-np.log(-np.log(uniforms(words))))
