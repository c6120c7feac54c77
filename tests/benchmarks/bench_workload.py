"""A workload that changes: short chats, long documents, values that no draft foresees.

python -m tests.benchmarks.bench_workload --text book.txt --out workload.jsonl
python -m tests.benchmarks.bench_workload --report --out workload.jsonl

All arms take turns on one live batch, round by round, and begin anew with other seeds several times
a phase. The adaptive policy sees its own rounds alone: its first one of a phase is the first that
it hears of the new mix. How it begins is repeated before, each time by a copy of it as the phase
before left it; what it has chosen after 8 rounds then runs as a fixed arm beside the others.
"""

import argparse
import copy
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from magicdec.batch import Plan
from magicdec.control.round_policy import FixedPolicy, RoundPolicy
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME
from magicdec.deployments.live_bench import PLAIN, TRIAL, Segment
from tests.benchmarks.bench_grid import append, read_records
from tests.benchmarks.policy_arms import ADAPTIVE, ARMS, FIXED, Bench, describe

_BLOCK = 64
_SETTLED_ROUNDS = 8  # after which the choice should be right
_JUDGED_ROUNDS = 8  # from there on
_REPLAYED_SECONDS = 3.0  # of plain decoding, in which a choice is judged
_NEAR_ROUNDS = 24  # from the settled one to here: text that the choice could have foreseen
_WITHIN = 0.95  # of the best
_LOOK_UPS = 24  # in a prompt, after its table
_ROW = 5  # tokens of a table


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    batch_size: int
    context_len: int
    temperature: float
    looked_up: bool = False  # the prompts are tables of random values, asked for in any order


PHASES = (
    Phase("chat", 8, 400, 0.8),
    Phase("documents", 8, 6000, 0.8),
    # A random prompt alone is foreseen well: both passes of one model, at one noise, guess alike.
    # What a view lacks is a value that stands anywhere in the context.
    Phase("look-ups", 8, 3000, 1.0, looked_up=True),
    Phase("documents again", 8, 6000, 0.8),
)


def main() -> None:
    args = parse_arguments()
    if not args.report:
        run(args)
    print(render(read_records(args.out)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_MODEL_NAME)
    parser.add_argument("--text", type=Path, help="a long plain-text file; else Python's library")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--arms", nargs="+", default=[PLAIN, *list(FIXED)[:3], ADAPTIVE])
    parser.add_argument("--seconds", type=float, default=60.0, help="of plain decoding, a phase")
    parser.add_argument("--segments", type=int, default=12, help="into which a phase is cut")
    parser.add_argument("--repeats", type=int, default=6, help="of how each phase begins")
    parser.add_argument("--out", type=Path, required=True, help="JSONL, appended to")
    parser.add_argument("--report", action="store_true", help="print what the file holds")
    args = parser.parse_args()
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"--arms must be of {', '.join(ARMS)}, got {', '.join(sorted(unknown))}")
    return args


def run(args: argparse.Namespace) -> None:
    longest = max(phase.context_len for phase in PHASES)
    batch = max(phase.batch_size for phase in PHASES)
    room = 2 * batch * (longest + 16 * _BLOCK)
    bench = Bench(args.model, args.dtype, room, batch)
    ids = bench.token_ids(args.text)
    random = Random(0)
    append(args.out, {"run": describe(bench)})
    for number, phase in enumerate(PHASES):
        if phase.looked_up:
            prompts = [look_ups(random, phase.context_len) for _ in range(phase.batch_size)]
        else:
            prompts = bench.token_prompts(ids, phase.batch_size, phase.context_len)
        bench.prefill(prompts)
        for repeat in range(args.repeats):
            append(args.out, settle(bench, number, phase, prompts, args.arms, repeat))
        play(bench, number, phase, prompts, args)


def look_ups(random: Random, num_tokens: int) -> list[int]:
    """Rows of two key tokens, a mark and two value tokens; then keys of rows at random, each with
    its value."""
    mark, num_answered = 30, _LOOK_UPS * _ROW

    def row() -> list[int]:
        return [random.randrange(100, 40_000) for _ in range(2)]

    table = [[*row(), mark, *row()] for _ in range(-(-(num_tokens - num_answered) // _ROW))]
    asked = random.choices(table, k=_LOOK_UPS)
    return [token for line in table + asked for token in line][-num_tokens:]


def settle(
    bench: Bench,
    number: int,
    phase: Phase,
    prompts: list[list[int]],
    arms: Sequence[str],
    repeat: int,
) -> dict[str, Any]:
    """What a copy of the adaptive policy has chosen after 8 rounds, and the tokens/s of that as a
    fixed arm and of the others, over the same text."""

    def play_once(policies: dict[str, RoundPolicy], num_rounds: int) -> dict[str, Segment]:
        seed = 1000 * number + 500 + repeat
        return bench.live.compare(
            policies, prompts, num_rounds, seed=seed, temperature=phase.temperature
        )

    learner = {ADAPTIVE: copy.deepcopy(bench.policy(ADAPTIVE))}
    begun = play_once(learner, _SETTLED_ROUNDS + _JUDGED_ROUNDS)[ADAPTIVE]
    choice = settled_on([played.plan for played in begun.rounds])
    probe = play_once({PLAIN: bench.policy(PLAIN)}, 4)[PLAIN]
    wanted = round(_REPLAYED_SECONDS * len(probe.rounds) / probe.seconds)
    num_rounds = max(wanted, _NEAR_ROUNDS)
    fixed = {arm: bench.policy(arm) for arm in arms if arm != ADAPTIVE}
    chosen = {} if choice == PLAIN else {choice: FixedPolicy(_plan(choice))}
    found = play_once(fixed | chosen, num_rounds)
    rates = {arm: segment.rate for arm, segment in found.items()}
    near = {arm: _near_rate(segment) for arm, segment in found.items()}
    place = {"phase": number, "name": phase.name}
    return {**place, "choice": choice, "rates": rates, "near_rates": near}


def _near_rate(segment: Segment) -> float:
    """Tokens/s of the rounds that follow on the choice."""
    near = segment.rounds[_SETTLED_ROUNDS:_NEAR_ROUNDS]
    return sum(played.num_tokens for played in near) / sum(played.seconds for played in near)


def _plan(label: str) -> Plan:
    """Of a round's name."""
    drafter, length, _, budget = label.split()
    return Plan(drafter, int(length), float(budget))


def play(bench: Bench, number: int, phase: Phase, prompts: list[list[int]], args: Any) -> None:
    """A few plain rounds say how many rounds make a segment."""
    sampling = {"temperature": phase.temperature}
    probe = bench.compare([PLAIN], prompts, 6, seed=1000 * number + 999, **sampling)[PLAIN]
    step = probe.seconds / len(probe.rounds)
    num_rounds = max(round(args.seconds / args.segments / step), 4)
    for segment in range(args.segments):
        turn, seed = segment % len(args.arms), 1000 * number + segment
        arms = (*args.arms[turn:], *args.arms[:turn])
        for arm, found in bench.compare(arms, prompts, num_rounds, seed=seed, **sampling).items():
            place = {"phase": number, "name": phase.name, "segment": segment, "arm": arm}
            append(args.out, {**place, **asdict(found)})
    print(f"{phase.name}: {args.segments} segments of {num_rounds} rounds of each arm", flush=True)


def render(records: Sequence[dict[str, Any]]) -> str:
    lines = [f"{name}: {value}" for r in records if "run" in r for name, value in r["run"].items()]
    lines += ["", "| phase | plain tokens/s | best of plain and fixed | adaptive / that | spread |"]
    lines[-1] += " seconds | choices within 5 % after 8 rounds | each, its rate / the best |"
    lines[-1] += " within 5 %, by rounds 8 to 24 alone |"
    lines.append("| --- " * 9 + "|")
    phases: dict[int, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if "arm" in record:
            phases[record["phase"]][record["arm"]].append(record)
    for number, arms in phases.items():
        rates = {
            arm: [r["num_tokens"] / r["seconds"] for r in found] for arm, found in arms.items()
        }
        best = max(set(rates) - {ADAPTIVE}, key=lambda arm: _mean(rates[arm]))
        ratios = [a / b for a, b in zip(rates[ADAPTIVE], rates[best], strict=True)]
        seconds = sum(r["seconds"] for r in arms[ADAPTIVE])
        choices = [r for r in records if "choice" in r and r["phase"] == number]
        (in_all, each), (near, _) = (
            describe_choices(choices, by) for by in ("rates", "near_rates")
        )
        lines.append(
            f"| {arms[PLAIN][0]['name']} | {statistics.median(rates[PLAIN]):.1f} | {best} "
            f"{_mean(rates[best]) / _mean(rates[PLAIN]):.2f}x | {_mean(ratios):.3f} "
            f"| {min(ratios):.2f}-{max(ratios):.2f} | {seconds:.0f} | {in_all} | {each} "
            f"| {near} |"
        )
    return "\n".join(lines)


def settled_on(plans: Sequence[str]) -> str:
    """What was chosen most from the eighth round on, trials aside."""
    judged = [
        plan
        for plan in plans[_SETTLED_ROUNDS : _SETTLED_ROUNDS + _JUDGED_ROUNDS]
        if not plan.endswith(TRIAL)
    ]
    return max(set(judged), key=judged.count)


def describe_choices(records: Sequence[dict[str, Any]], by: str) -> tuple[str, str]:
    """Of one phase: how many are near the best by those rates, and each one's share of the best."""
    shares = [r[by][r["choice"]] / max(r[by].values()) for r in records]
    if not shares:
        return "-", "-"
    near = sum(share >= _WITHIN for share in shares)
    summary = f"{near} of {len(shares)}, median {statistics.median(shares):.2f}"
    names = zip((r["choice"] for r in records), shares, strict=True)
    return summary, ", ".join(f"{choice} {share:.2f}" for choice, share in names)


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


if __name__ == "__main__":
    main()
