"""A simulated prefix cache: what a replica still has of the prompts it computed."""

from collections import OrderedDict

from magicdec.simulation.trace import TraceRequest


class PrefixStore:
    """Shared beginnings by name, and what nobody will ask for again, which takes room all the same.

    A prefix in use counts here and in its request: the pool of a real replica holds it once, so
    this one gives up a little early.
    """

    def __init__(self) -> None:
        self._tokens: OrderedDict[str, int] = OrderedDict()
        self._total = 0
        self._num_left_behind = 0

    @property
    def num_tokens(self) -> int:
        return self._total

    def match(self, request: TraceRequest, most: int) -> int:
        """Tokens of the request's prompt that are here, `most` at most."""
        if request.prefix_id is None or request.prefix_id not in self._tokens:
            return 0
        self._tokens.move_to_end(request.prefix_id)
        held = min(self._tokens[request.prefix_id], request.num_prefix_tokens)
        return max(min(held, most), 0)

    def add(self, request: TraceRequest) -> None:
        """Its prompt is computed."""
        if request.prefix_id is not None:
            held = self._tokens.get(request.prefix_id, 0)
            self._put(request.prefix_id, max(held, request.num_prefix_tokens))

    def leave_behind(self, request: TraceRequest) -> None:
        """It has ended: what only it had is idle now."""
        own = request.num_prompt_tokens - request.num_prefix_tokens + request.num_output_tokens
        self._num_left_behind += 1
        self._put(f"\0{self._num_left_behind}", own)  # a name that no trace has

    def shrink_to(self, num_tokens: int) -> None:
        """Gives up the least recently used until no more than these are left."""
        while self._total > num_tokens and self._tokens:
            _, given_up = self._tokens.popitem(last=False)
            self._total -= given_up

    def _put(self, name: str, num_tokens: int) -> None:
        self._total += num_tokens - self._tokens.get(name, 0)
        self._tokens[name] = num_tokens
        self._tokens.move_to_end(name)
