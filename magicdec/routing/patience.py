"""How long requests in the queue wait for company, and how long anybody waits for them."""

import math
from collections import OrderedDict


class Patience:
    """Both spans are the same for every request, so each order is that of the last asking."""

    def __init__(self, *, company_wait_s: float, lease_s: float) -> None:
        self._company_wait_s = company_wait_s
        self._lease_s = lease_s
        self._asked_at: OrderedDict[str, float] = OrderedDict()
        self._company_until: OrderedDict[str, float] = OrderedDict()

    def begin(self, request_id: str, now: float) -> None:
        self._asked_at[request_id] = now
        self._company_until[request_id] = now + self._company_wait_s

    def renew(self, request_id: str, now: float) -> None:
        """Somebody asked about it again."""
        self._asked_at[request_id] = now
        self._asked_at.move_to_end(request_id)

    def end(self, request_id: str) -> None:
        """It has left the queue."""
        del self._asked_at[request_id]
        self._company_until.pop(request_id, None)

    def wants_company(self, request_id: str, now: float) -> bool:
        return self._company_until.get(request_id, -math.inf) > now

    def next_due(self, now: float) -> float:
        """When the next wait for company ends; infinity where nobody waits for any."""
        while self._company_until:
            until = next(iter(self._company_until.values()))
            if until > now:
                return until
            self._company_until.popitem(last=False)
        return math.inf

    def abandoned(self, now: float) -> list[str]:
        """Those whom nobody asked about for the length of the lease."""
        found = []
        for request_id, asked_at in self._asked_at.items():
            if now - asked_at < self._lease_s:
                break
            found.append(request_id)
        return found
