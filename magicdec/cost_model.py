"""What a round costs and what it yields: MagicDec's Eq. 1-4, and step times.

Plain arithmetic on numbers: nothing here knows a model, a device or a scheduler. Times in seconds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass

import numpy as np
from numpy.typing import NDArray

VERIFY = "verify"  # one pass over the whole KV cache; without drafts it is plain decoding

_PRIOR_WEIGHT = 0.01  # of one measurement, for each coefficient
_OUTLIER = 0.2  # relative error from which a sample counts ever less (Cauchy loss)
_REWEIGHTINGS = 12
_MAX_RIDGES = 24  # places tried for the ridge between memory-bound and compute-bound linears

Floats = NDArray[np.float64]


def draft_kind(drafter: str) -> str:
    """The kind of a step under which a drafter's cost is kept."""
    return f"draft:{drafter}"


def expected_tokens(acceptance: float, draft_length: int) -> float:
    """Tokens a round yields, bonus included: 1 + a + a^2 + ... + a^draft_length (Eq. 1).

    Every draft is accepted with the same probability, independently.
    """
    if acceptance >= 1.0:
        return draft_length + 1.0
    return (1.0 - acceptance ** (draft_length + 1)) / (1.0 - acceptance)


def implied_acceptance(tokens_per_round: float, draft_length: int) -> float:
    """The acceptance under which rounds yield so many tokens: Eq. 1 solved by bisection.

    Raises ValueError outside 1..draft_length + 1, and for a draft_length below 1.
    """
    if draft_length < 1 or not 1.0 <= tokens_per_round <= draft_length + 1.0:
        raise ValueError(
            f"tokens_per_round must be between 1 and draft_length + 1, got {tokens_per_round} "
            f"at draft_length {draft_length}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2.0
        if expected_tokens(middle, draft_length) < tokens_per_round:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0


def round_ratio(draft_length: int, draft_ratio: float, verify_ratio: float) -> float:
    """A round's time over a plain step's: gamma * c + v, with c = T_D / T_T and v = T_V / T_T."""
    return draft_length * draft_ratio + verify_ratio


def speedup(tokens: float, draft_length: int, draft_ratio: float, verify_ratio: float) -> float:
    """Tokens a second over plain decoding's: the inverse of Eq. 2."""
    return tokens / round_ratio(draft_length, draft_ratio, verify_ratio)


def best_draft_length(
    acceptance: float, draft_seconds: float, verify_seconds: Sequence[float]
) -> int:
    """The draft length of the most tokens a second (Eq. 4, for one drafter and budget).

    `draft_seconds` is one draft step, the choice of the KV it reads included (Eq. 3).
    `verify_seconds[n]` verifies n drafts, so that `verify_seconds[0]` is a plain step and 0 is
    among the answers. The shortest of equals wins.
    """
    rates = [
        expected_tokens(acceptance, length) / (length * draft_seconds + seconds)
        for length, seconds in enumerate(verify_seconds)
    ]
    return rates.index(max(rates))


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the time of one forward depends on, summed over its sequences and all ranks."""

    num_rows: int  # tokens through the linears
    kv_bytes: float  # read from the cache: each sequence's once, however many rows look at it
    row_products: float  # sum of rows_i * context_i: the arithmetic of attention
    num_sequences: int


@dataclass(frozen=True, slots=True)
class StepCost:
    """Coefficients of one kind of step, in seconds a unit.

    T = fixed + max(weights, per_row * rows) + per_kv_byte * kv_bytes
        + per_row_product * row_products + per_sequence * num_sequences

    The linears read their weights or compute, whichever takes longer: the ridge is where both take
    the same time. Raises ValueError for a coefficient that is negative or not finite.
    """

    fixed: float
    weights: float
    per_row: float
    per_kv_byte: float
    per_row_product: float
    per_sequence: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0.0 <= value < math.inf:
                raise ValueError(f"StepCost.{name} must be finite and at least 0, got {value}")

    def seconds(self, shape: StepShape) -> float:
        return (
            self.fixed
            + max(self.weights, self.per_row * shape.num_rows)
            + self.per_kv_byte * shape.kv_bytes
            + self.per_row_product * shape.row_products
            + self.per_sequence * shape.num_sequences
        )


def fit_step_cost(
    shapes: Sequence[StepShape], seconds: Sequence[float], prior: StepCost
) -> StepCost:
    """The non-negative coefficients that explain the measured seconds best, in relative error.

    A time that is off by more than a fifth counts the less the further it is, so stalled steps do
    not bend the fit; one that is not finite and positive is left out. Where the shapes do not tell
    coefficients apart (one context length, one side of the ridge) those nearest to the prior are
    taken, and the prior itself for what they do not hold at all. Nearness is measured in shares of
    the step time, so no wrong prior weighs more than one that is wrong by the whole step. Raises
    ValueError unless there are as many times as shapes.
    """
    usable = [(s, t) for s, t in zip(shapes, seconds, strict=True) if 0.0 < t < math.inf]
    if not usable:
        return prior
    rows = np.array([float(s.num_rows) for s, _ in usable])  # [num_samples]
    terms = np.array(  # [num_samples, 6] what each coefficient is multiplied with
        [(1.0, 1.0, s.num_rows, s.kv_bytes, s.row_products, s.num_sequences) for s, _ in usable]
    ) / np.array([[t] for _, t in usable])
    scale = np.sqrt(np.mean(terms**2, axis=0))  # [6] relative step time a unit
    held = scale > 0.0
    shares = terms / np.where(held, scale, 1.0)
    wanted = np.minimum(np.array(astuple(prior)) * scale, 1.0)  # [6]
    best, least = wanted, math.inf
    for ridge in _ridges(rows):
        theta = _fit_beside_ridge(shares, rows > ridge, wanted)
        loss = _loss(shares, theta, wanted)
        if loss < least:
            best, least = theta, loss
    fitted = np.where(held, best / np.where(held, scale, 1.0), astuple(prior))
    return StepCost(*(float(value) for value in fitted))


def _ridges(rows: Floats) -> Floats:
    """Row counts up to which the linears may be memory-bound; below all of them: nowhere."""
    counts = np.unique(rows)
    ridges: Floats = np.concatenate([[counts[0] - 1.0], counts])
    picks = np.linspace(0, len(ridges) - 1, min(len(ridges), _MAX_RIDGES))
    return np.asarray(ridges[picks.round().astype(int)])


def _fit_beside_ridge(shares: Floats, computes: NDArray[np.bool_], wanted: Floats) -> Floats:
    """Coefficients in `shares`' units where `computes` says which samples are compute-bound."""
    sided = shares.copy()
    sided[computes, 1] = 0.0
    sided[~computes, 2] = 0.0
    theta, weights = wanted, np.ones(len(shares))
    for _ in range(_REWEIGHTINGS):
        weighted = sided * weights[:, None]
        normal = weighted.T @ sided + _PRIOR_WEIGHT * np.eye(len(wanted))
        theta = _solve_non_negative(normal, weighted.sum(axis=0) + _PRIOR_WEIGHT * wanted)
        weights = 1.0 / (1.0 + ((sided @ theta - 1.0) / _OUTLIER) ** 2)
    return theta


def _solve_non_negative(normal: Floats, target: Floats) -> Floats:
    """The x >= 0 that minimises x' normal x / 2 - target' x, for a positive definite `normal`.

    It solves the equations of its own positive entries, so every such set is tried: 2^6 of them.
    """
    size = len(target)
    free = (np.arange(2**size)[:, None] >> np.arange(size)) % 2 == 1  # [2^size, size]
    both = free[:, :, None] & free[:, None, :]
    systems = np.where(both, normal, np.eye(size))
    found = np.linalg.solve(systems, np.where(free, target, 0.0)[:, :, None])[:, :, 0]
    values = np.einsum("si,ij,sj->s", found, normal, found) / 2.0 - found @ target
    feasible = np.all(found >= 0.0, axis=1)
    best: Floats = found[np.argmin(np.where(feasible, values, math.inf))]
    return best


def _loss(shares: Floats, theta: Floats, wanted: Floats) -> float:
    """Of the model itself, whose linears take the greater of both sides of the ridge."""
    linears = np.maximum(shares[:, 1] * theta[1], shares[:, 2] * theta[2])
    rest = shares[:, [0, 3, 4, 5]] @ theta[[0, 3, 4, 5]]
    errors = (linears + rest - 1.0) / _OUTLIER
    misfit = _OUTLIER**2 * np.sum(np.log1p(errors**2))
    return float(misfit + _PRIOR_WEIGHT * np.sum((theta - wanted) ** 2))


@dataclass(frozen=True, slots=True)
class CostModel:
    """The cost of every kind of step: VERIFY, and draft_kind(name) of each drafter's one step."""

    costs: Mapping[str, StepCost]

    def cost(self, kind: str) -> StepCost:
        """Raises KeyError naming the kinds that are known."""
        found = self.costs.get(kind)
        if found is None:
            raise KeyError(f"no cost of {kind!r}; known are {', '.join(sorted(self.costs))}")
        return found

    def seconds(self, kind: str, shape: StepShape) -> float:
        return self.cost(kind).seconds(shape)
