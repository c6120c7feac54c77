"""Which replica has probably seen how a prompt begins: a coarse and bounded memory.

A hint only. A wrong one costs a prefill that would have been needed elsewhere too; the overload
limit is placement's.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

CHUNK = 1024  # tokens a hash
FIRST_CHUNK = 256  # the same within the first CHUNK, where short system prompts end
_NUM_FIRST = CHUNK // FIRST_CHUNK
_MAX_REPLICAS = 4  # remembered for one prefix, the latest


def num_prefix_tokens(num_hashes: int) -> int:
    """How many tokens so many hashes cover."""
    if num_hashes <= _NUM_FIRST:
        return num_hashes * FIRST_CHUNK
    return (num_hashes - _NUM_FIRST + 1) * CHUNK


def num_prefix_hashes(num_tokens: int) -> int:
    """How many hashes a prompt of so many tokens has: whole chunks alone."""
    if num_tokens < CHUNK:
        return num_tokens // FIRST_CHUNK
    return _NUM_FIRST + num_tokens // CHUNK - 1


def prefix_hashes(token_ids: Sequence[int]) -> tuple[int, ...]:
    """A chained hash of 64 bits for each of the prompt's first chunks: equal ones say that all
    tokens up to there are equal."""
    tokens = np.asarray(token_ids, dtype=np.int64)
    hashes: list[int] = []
    chain, start = hashlib.blake2b(digest_size=8), 0
    for i in range(num_prefix_hashes(len(tokens))):
        stop = num_prefix_tokens(i + 1)
        chain.update(tokens[start:stop].tobytes())
        hashes.append(int.from_bytes(chain.digest(), "little"))
        start = stop
    return tuple(hashes)


class PrefixAffinity:
    """At most `max_hashes`, the least recently used forgotten first.

    What a replica evicts is not reported: its cache gives up what was used least recently, so a
    prefix counts as gone once the replica was sent as many other tokens as it can hold.
    """

    def __init__(self, max_hashes: int) -> None:
        self._max_hashes = max_hashes
        # hash -> replica -> what the replica had been sent when it last got this prefix
        self._index: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._num_sent: dict[str, int] = {}  # tokens, by replica

    def __len__(self) -> int:
        return len(self._index)

    def record(self, replica_id: str, hashes: Sequence[int], num_new_tokens: int) -> None:
        """A replica is sent a prompt with these hashes; `num_new_tokens` is what it has to add to
        its cache for it."""
        sent = self._num_sent.get(replica_id, 0) + num_new_tokens
        self._num_sent[replica_id] = sent
        # Backwards, so that a chain is forgotten from its end: without its start it is not found.
        for prefix in reversed(hashes):
            replicas = self._index.setdefault(prefix, {})
            replicas.pop(replica_id, None)
            replicas[replica_id] = sent
            if len(replicas) > _MAX_REPLICAS:
                del replicas[next(iter(replicas))]
            self._index.move_to_end(prefix)
        while len(self._index) > self._max_hashes:
            self._index.popitem(last=False)

    def recall(self, replica_id: str, prompts: Iterable[Sequence[int]]) -> None:
        """What a replica says it was sent, oldest first, when the router had forgotten it."""
        for hashes in prompts:
            self.record(replica_id, hashes, num_prefix_tokens(len(hashes)))

    def num_cached_tokens(
        self, replica_id: str, hashes: Sequence[int], total_kv_tokens: int
    ) -> int:
        """How much of the prompt the replica has probably cached, in tokens."""
        for count in range(len(hashes), 0, -1):
            if self._holds(hashes[count - 1], replica_id, total_kv_tokens):
                return num_prefix_tokens(count)
        return 0

    def homes(self, hashes: Sequence[int]) -> list[str]:
        """The replicas that were sent the most of this prompt, most first; at most four."""
        found: dict[str, None] = {}
        for prefix in reversed(hashes):
            for replica_id in reversed(self._index.get(prefix, {})):
                found.setdefault(replica_id)
            if len(found) >= _MAX_REPLICAS:
                break
        return list(found)[:_MAX_REPLICAS]

    def forget(self, replica_id: str) -> None:
        """Its cache is gone: it died. Walks the whole index."""
        self._num_sent.pop(replica_id, None)
        for prefix in list(self._index):
            replicas = self._index[prefix]
            if replicas.pop(replica_id, None) is not None and not replicas:
                del self._index[prefix]

    def _holds(self, prefix: int, replica_id: str, total_kv_tokens: int) -> bool:
        sent = self._index.get(prefix, {}).get(replica_id)
        return sent is not None and self._num_sent.get(replica_id, 0) - sent < total_kv_tokens
