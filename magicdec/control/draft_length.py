"""Who drafts next round, how far and over how much: the most predicted tokens a second.

Every round weighs all drafters, budgets and draft lengths, plain decoding among them, by what the
acceptance model says they emit and the cost model says they take: MagicDec's Eq. 4 (arXiv
2408.11049) with measured hazards in place of one acceptance. It knows no scheduler and no clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from magicdec.acceptance.model import AcceptanceModel
from magicdec.acceptance.records import Observation
from magicdec.batch import Plan
from magicdec.config import check_at_least, check_share
from magicdec.control.exploration import ExplorationAccount, Trial
from magicdec.control.request_lengths import Candidate, split_rows, trim_rows
from magicdec.control.round_choice import RoundChoice, RowOutcome
from magicdec.control.round_costs import RoundCosts, RoundLoad
from magicdec.control.round_forecast import Forecast, Forecaster
from magicdec.control.step_corrections import MAX_ABSURDITY

_LOOK_EVERY = 2  # decisions between looks for something to try, where no request is new
_SLOW = 1.3  # times the predicted seconds: what a trial takes below that is the machine's noise
_PATIENCE = 3  # rounds in a row after which plain decoding was foreseen to win: one is no proof


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """How reluctantly choices change. Gains are shares of the predicted tokens a second."""

    leave_plain_gain: float = 0.03
    switch_gain: float = 0.01  # between drafts, and for draft lengths of single requests
    exploration_share: float = 0.01  # of the time, that may be lost by trying; 0: never try
    max_view_share: float = 1 / 3  # no draft where its view would be more of the context

    def __post_init__(self) -> None:
        check_at_least("leave_plain_gain", self.leave_plain_gain, 0)
        check_at_least("switch_gain", self.switch_gain, 0)
        check_share("max_view_share", self.max_view_share)


class DraftController:
    """Not thread-safe; one owner calls `choose`, runs the round, and calls `observe`.

    Draft length 0 is left for a gain above leave_plain_gain alone; other changes need switch_gain.
    What cannot be, in an outcome or a time, is counted in `num_dropped` and moves nothing.
    """

    def __init__(
        self,
        acceptance: AcceptanceModel,
        costs: RoundCosts,
        config: ControllerConfig | None = None,
    ) -> None:
        self.acceptance = acceptance
        self.hurries = False  # the round repeats the last one, and they are too short to time each
        self._config = ControllerConfig() if config is None else config
        self._forecaster = Forecaster(acceptance, costs, self._config.max_view_share)
        self.exploration = ExplorationAccount(self._config.exploration_share)
        self._current = (0, 0)  # setting and draft length, for all rows, trials aside
        self._num_worse = 0  # rounds in a row after which plain decoding was predicted to win
        self._was_split = False
        self._untried: set[str] = set()  # drafters, of requests that came while nothing is drafted
        self._num_decisions = 0
        self._standing: tuple[RoundLoad, RoundChoice] | None = None  # of the last decision
        self._num_left = 0  # rounds that it stands for
        self._unlearnt: list[Observation] = []  # of the rounds since that decision
        self._num_unlearnt = 0
        self._num_dropped_times = 0

    @property
    def num_dropped(self) -> int:
        return self.acceptance.num_dropped + self._num_dropped_times

    @property
    def stands(self) -> bool:
        """Whether the next round is to go by the same choice, while the requests are the same."""
        return self._num_left > 1

    def choose(self, load: RoundLoad) -> RoundChoice:
        """The next round's plan. Without decode rows it is plain, for the drafter that was last.

        For the same requests, neither plain decoding nor drafts of short rounds are weighed anew
        every round; as much is learnt a second as from long ones.
        """
        self.hurries = False
        if not load.context_lens:
            return RoundChoice(self._plan(self._current[0], 0))
        self._num_left -= 1
        if self._num_left > 0 and self._standing is not None and load.is_like(self._standing[0]):
            self.hurries = self._standing[1].is_short
            return self._standing[1]
        self._learn()
        self._num_decisions += 1
        choice = self._weigh(load)
        self._standing, self._num_left = (load, choice), choice.num_rounds
        return choice

    def _weigh(self, load: RoundLoad) -> RoundChoice:
        forecast = self._forecaster.forecast(load)
        setting, length = self._current = self._decide(forecast)
        best = _candidate(forecast, setting, length)
        if load.request_keys:
            best = self._own_lengths(forecast, best)
        return self._try_another(forecast, best) or self._choice(load, best, best.rate)

    def observe(
        self, load: RoundLoad, choice: RoundChoice, outcomes: Sequence[RowOutcome], seconds: float
    ) -> None:
        """What a round came to; outcomes in the order of the load's decode rows.

        Raises ValueError unless there is one a row.
        """
        if len(outcomes) != len(load.context_lens):
            raise ValueError(
                f"outcomes must be one a decode row ({len(load.context_lens)}), got {len(outcomes)}"
            )
        if not outcomes:
            return
        keys = load.request_keys or ("",) * len(outcomes)
        drafter, draft_budget = choice.plan.drafter, choice.plan.draft_budget
        self._unlearnt += [
            Observation(drafter, draft_budget, context_len, drafted, accepted, key or None, asked)
            for context_len, key, (drafted, accepted, asked) in zip(
                load.context_lens, keys, outcomes, strict=True
            )
        ]
        self._num_unlearnt += 1
        if self._num_left <= 1:  # the next round is decided anew
            self._learn()
        self._settle(choice, outcomes, seconds)

    def _learn(self) -> None:
        self.acceptance.observe_round(self._unlearnt, self._num_unlearnt)
        self._unlearnt, self._num_unlearnt = [], 0

    def _decide(self, forecast: Forecast) -> tuple[int, int]:
        """Setting and draft length for all rows alike. A plain choice names the best drafter: a
        prompt's last chunk seeds its view.

        Plain decoding shows nothing of the drafts: to leave them takes more than one prediction.
        """
        rates = forecast.rates
        plain, now = rates[0, 0], rates[self._current]
        setting, length = divmod(int(np.argmax(rates[:, 1:])), rates.shape[1] - 1)
        best = rates[setting, length + 1]
        if self._current[1] == 0:
            leaves = best > (1.0 + self._config.leave_plain_gain) * plain
            return (setting, length + 1) if leaves else (setting, 0)
        self._num_worse = 0 if best > plain else self._num_worse + self._num_stood()
        if best <= plain and (self._num_worse >= _PATIENCE or not self._may_pay(forecast, setting)):
            self._num_worse = 0
            return (setting, 0)
        switches = best > (1.0 + self._config.switch_gain) * now
        return (setting, length + 1) if switches else self._current

    def _num_stood(self) -> int:
        """Rounds that the last decision was kept for."""
        return 1 if self._standing is None else self._standing[1].num_rounds - self._num_left

    def _may_pay(self, forecast: Forecast, setting: int) -> bool:
        hopeful = self._forecaster.hopeful_tokens(forecast.load)[setting]
        return bool((hopeful / forecast.seconds[setting]).max() > forecast.rates[0, 0])

    def _own_lengths(self, forecast: Forecast, best: Candidate) -> Candidate:
        split = split_rows(forecast, best, self._forecaster.costs)
        margin = self._config.switch_gain
        if best.draft_length == 0:
            margin = 0.0 if self._was_split else self._config.leave_plain_gain
        self._was_split = split is not None and split.rate > (1.0 + margin) * best.rate
        if split is not None and self._was_split:
            best = split
        # A lone row's shorter drafts are among what was weighed.
        if best.draft_length > 0 and len(forecast.load.context_lens) > 1:
            trimmed = trim_rows(forecast, best, self._forecaster.costs)
            if trimmed.rate > (1.0 + self._config.switch_gain) * best.rate:
                best = trimmed
        return best

    def _try_another(self, forecast: Forecast, best: Candidate) -> RoundChoice | None:
        load, plain = forecast.load, best.draft_length == 0
        num_unseen = sum(self.acceptance.num_rounds(key) == 0 for key in load.request_keys)
        if not plain or 2 * num_unseen > len(load.context_lens):
            # Should the next rounds be plain, they say nothing of the requests: each drafter is
            # tried for them once, but for the one that drafts now.
            self._untried = {drafter for drafter, _ in self._forecaster.settings}
            if not plain:
                self._untried.discard(self._forecaster.settings[best.setting][0])
        looks = self._num_decisions % _LOOK_EVERY == 0
        are_new = plain and bool(self._untried)
        trial = self.exploration.pick_plain(forecast, best) if looks else None
        if trial is None and are_new:
            trial = self._pick(forecast, best, are_new=True)
        if trial is None and looks:  # that purse is not held up by what the other cannot pay
            trial = self._pick(forecast, best, are_new=False)
        if trial is None:
            return None
        self._untried.discard(self._forecaster.settings[trial.setting][0])
        tried = _candidate(forecast, trial.setting, trial.draft_length)
        choice = self._choice(load, tried, best.rate)
        return replace(choice, explores=True, explores_unseen=trial.of_unseen)

    def _pick(self, forecast: Forecast, best: Candidate, *, are_new: bool) -> Trial | None:
        if not self.exploration.has_credit(float(forecast.seconds[0, 0]), of_unseen=are_new):
            return None
        plain = best.draft_length == 0
        return self.exploration.pick(
            forecast,
            self._forecaster.hopeful_tokens(forecast.load),
            best,
            self._config.leave_plain_gain if plain else self._config.switch_gain,
            [drafter in self._untried or not are_new for drafter, _ in self._forecaster.settings],
            of_unseen=are_new,
        )

    def _choice(self, load: RoundLoad, chosen: Candidate, set_aside_rate: float) -> RoundChoice:
        return RoundChoice(
            self._plan(chosen.setting, chosen.draft_length),
            {load.request_keys[row]: length for row, length in chosen.row_lengths.items()},
            predicted_seconds=chosen.seconds,
            predicted_tokens=chosen.tokens,
            set_aside_rate=set_aside_rate,
        )

    def _plan(self, setting: int, draft_length: int) -> Plan:
        drafter, draft_budget = self._forecaster.settings[setting]
        return Plan(drafter, draft_length, draft_budget)

    def _settle(self, choice: RoundChoice, outcomes: Sequence[RowOutcome], seconds: float) -> None:
        """Keeps the account of what trying costs."""
        predicted = choice.predicted_seconds
        usable = predicted / MAX_ABSURDITY <= seconds <= predicted * MAX_ABSURDITY
        if usable:
            self.exploration.pay_in(seconds, predicted, is_plain=choice.plan.draft_length == 0)
        else:
            self._num_dropped_times += 1
        if not choice.explores:
            return
        num_tokens, taken = choice.predicted_tokens, predicted
        if usable and all(outcome.is_possible for outcome in outcomes):
            num_tokens = len(outcomes) + sum(outcome.num_accepted_tokens for outcome in outcomes)
            taken = seconds if seconds > _SLOW * predicted else predicted
        loss = taken - num_tokens / choice.set_aside_rate
        self.exploration.charge(loss, of_unseen=choice.explores_unseen)


def _candidate(forecast: Forecast, setting: int, draft_length: int) -> Candidate:
    """One choice for all rows alike."""
    at = (setting, draft_length)
    tokens, seconds = float(forecast.tokens[at]), float(forecast.seconds[at])
    return Candidate(setting, draft_length, tokens, seconds)
