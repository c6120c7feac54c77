"""A request in the router's queue."""

from dataclasses import dataclass, field

from magicdec.routing.settings import Ask

SHORTEST_CLASS = 256  # tokens; reading the cache of a shorter context costs next to nothing


def length_class(num_tokens: int) -> int:
    """Powers of two: class c holds contexts of 2^c to 2^(c+1) - 1 tokens; 8 all shorter ones."""
    return max(num_tokens, SHORTEST_CLASS).bit_length() - 1


@dataclass(slots=True, eq=False)
class Waiting:
    """Times are the queue's clock's, in seconds.

    `num_tokens` is what it is charged: its context and the answer expected. `first_at` is when its
    age bound is reached, what it had waited at an earlier router included.
    """

    request_id: str
    key: str
    length_class: int
    num_context_tokens: int
    num_tokens: int
    queued_at: float
    first_at: float
    resumed: bool = False
    prefix_hashes: tuple[int, ...] = ()
    exclude: tuple[str, ...] = ()
    queued: bool = field(default=True)  # False: it has left, and heaps may still hold it

    @classmethod
    def of(cls, ask: Ask, num_output_tokens: int, now: float, age_bound_s: float) -> "Waiting":
        """From what was asked and the answer expected. A resumed one goes first from the start."""
        bound_s = 0.0 if ask.resumed else age_bound_s - ask.waited_s
        return cls(
            ask.request_id,
            ask.key,
            length_class(ask.num_context_tokens),
            ask.num_context_tokens,
            ask.num_context_tokens + num_output_tokens,
            queued_at=now,
            first_at=now + bound_s,
            resumed=ask.resumed,
            prefix_hashes=ask.prefix_hashes,
            exclude=ask.exclude,
        )
