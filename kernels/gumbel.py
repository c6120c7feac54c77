"""Counter-based Gumbel noise: a pure function of (seed, position, vocabulary entry).

Drafter-invariant verification (arXiv 2408.07978) needs draft and target to see the same noise,
whatever step, batch or replica asks for it.
"""

import numpy as np
from numpy.typing import NDArray


def random_words(seed: int, position: int, num_words: int) -> NDArray[np.uint32]:
    """Philox4x64-10 with key (seed, 0) and counter (block, position, 0, 0), blocks from 1.

    Entry v is half v % 2 (low half first) of 64-bit word v // 2 of the stream.
    """
    # NumPy increments the counter before its first block.
    stream = np.random.Philox(
        key=np.array([seed, 0], dtype=np.uint64),
        counter=np.array([0, position, 0, 0], dtype=np.uint64),
    )
    words = stream.random_raw((num_words + 1) // 2).astype("<u8", copy=False)
    return words.view("<u4")[:num_words]


def gumbel_noise(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """-log(-log(u)) with u = (word + 0.5) / 2**32, so within [-3.2, 22.9] and never infinite."""
    uniforms = (words.astype(np.float64) + 0.5) * 2.0**-32
    return np.asarray(-np.log(-np.log(uniforms)))
