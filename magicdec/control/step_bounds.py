"""What the time of a verify forward goes to, by the cost model.

    weights   reading them, where the linears have too few rows to compute for longer
    compute   the linears, where they have more, and the products of attention
    kv        reading the cache
    overhead  what a forward takes whatever it computes, each sequence, and the round around it

Drafts pay where kv is most of it: more rows read the cache no more often.
"""

from dataclasses import dataclass, replace

from magicdec.cost_model import StepCost, StepShape

WEIGHTS, COMPUTE, KV, OVERHEAD = "weights", "compute", "kv", "overhead"
BOUNDS = (WEIGHTS, COMPUTE, KV, OVERHEAD)


@dataclass(frozen=True, slots=True)
class Speeds:
    """How many times slower this machine is than its profile, and a round's seconds beside its
    forwards."""

    compute: float
    read: float
    overhead: float


def with_drafts(plain: StepShape, draft_length: int) -> StepShape:
    """The same sequences, each with the rows of a draft. They read the same K/V."""
    rows = 1 + draft_length
    return replace(plain, num_rows=rows * plain.num_rows, row_products=rows * plain.row_products)


def step_bounds(
    verify: StepCost, prefill: StepCost, decode: StepShape, chunk: StepShape, speeds: Speeds
) -> dict[str, float]:
    """Seconds by name, of all BOUNDS. The flaws of the profile (extra rows, chunks) are not in
    it: it says which part is the greatest, not what the forward takes."""
    linears = verify.per_row * decode.num_rows + prefill.per_row * chunk.num_rows
    products = verify.per_row_product * decode.row_products
    products += prefill.per_row_product * chunk.row_products
    reads_weights = verify.weights >= linears
    fixed = verify.fixed + verify.per_sequence * decode.num_sequences
    return {
        WEIGHTS: speeds.compute * verify.weights if reads_weights else 0.0,
        COMPUTE: speeds.compute * (products if reads_weights else products + linears),
        KV: speeds.read * verify.per_kv_byte * decode.kv_bytes,
        OVERHEAD: speeds.compute * fixed + speeds.overhead,
    }
