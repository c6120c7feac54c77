"""What the event loop asks of the engine's thread (engine_loop.py)."""

from dataclasses import dataclass

from magicdec.control.policy_snapshot import PolicySnapshot
from magicdec.types import Request


@dataclass(frozen=True, slots=True)
class Add:
    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class Tell:
    """What the policy has learnt is wanted."""


@dataclass(frozen=True, slots=True)
class Count:
    """What the engine has counted is wanted."""


@dataclass(frozen=True, slots=True)
class Merge:
    others: PolicySnapshot


@dataclass(frozen=True, slots=True)
class Stop:
    pass


@dataclass(frozen=True, slots=True)
class Inflow:
    """Requests that have passed a point since the start, and the tokens they came with."""

    num_requests: int = 0
    num_tokens: int = 0

    def plus(self, request: Request) -> "Inflow":
        num_tokens = len(request.prompt_token_ids) + len(request.emitted_token_ids)
        return Inflow(self.num_requests + 1, self.num_tokens + num_tokens)


Command = Add | Abort | Tell | Count | Merge | Stop
