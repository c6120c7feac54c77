"""Rounds of one live batch by plans in turn, each long enough for its rounds to go on."""

import time
from dataclasses import replace
from typing import NamedTuple

from magicdec.batch import Plan
from magicdec.control.round_policy import FixedPolicy
from magicdec.engine import Engine

ROUNDS_A_TURN = 6  # of a plan's first turn graphs are captured and views chosen: it is not counted


class Played(NamedTuple):
    """A round."""

    seconds: float
    num_tokens: int


def play_turn(engine: Engine, plan: Plan) -> list[Played]:
    """A round begins the next one, but for the turn's last: that one is another plan's."""
    played = []
    for left in reversed(range(ROUNDS_A_TURN)):
        engine.policy = FixedPolicy(replace(plan, stands=left > 0))
        started = time.perf_counter()
        num_tokens = sum(len(output.token_ids) for output in engine.step())
        played.append(Played(time.perf_counter() - started, num_tokens))
    return played
