"""Limits of the server's settings that pydantic's schema does not tell: the engine's config has
them, and its message names field, value and limit. The chart's schema refuses the same earlier."""

from typing import Any

from magicdec.config import DRAFTERS, MAX_DRAFT_LENGTH, VERIFICATION_RULES

Limit = dict[str, Any]

_POSITIVE: Limit = {"minimum": 1}
_SHARE: Limit = {"exclusiveMinimum": 0, "maximum": 1}

SETTING_LIMITS: dict[tuple[str, str], Limit] = {
    ("cache", "block_size"): _POSITIVE,
    ("cache", "num_blocks"): _POSITIVE,
    ("scheduler", "max_num_seqs"): _POSITIVE,
    ("scheduler", "max_batch_tokens"): _POSITIVE,
    ("speculation", "drafter"): {"enum": list(DRAFTERS)},
    ("speculation", "draft_length"): {"minimum": 0, "maximum": MAX_DRAFT_LENGTH},
    ("speculation", "draft_budget"): {"exclusiveMinimum": 0},
    ("speculation", "exploration_share"): {"minimum": 0, "maximum": 1},
    ("speculation", "inter_token_target_s"): {"exclusiveMinimum": 0},
    ("speculation", "max_draft_length"): {"minimum": 0, "maximum": MAX_DRAFT_LENGTH},
    ("speculation", "max_view_share"): _SHARE,
    ("speculation", "verification"): {"enum": list(VERIFICATION_RULES)},
    ("speculation", "num_sink_tokens"): {"minimum": 0},
    ("speculation", "num_recent_tokens"): _POSITIVE,
    ("speculation", "num_first_layers"): {"minimum": 0},
    ("speculation", "first_layers_factor"): _POSITIVE,
    ("speculation", "refresh_rounds"): _POSITIVE,
    ("speculation", "chunk_size"): _POSITIVE,
    ("speculation", "coverage"): _SHARE,
}


def limited(section: str, name: str, schema: Limit) -> Limit:
    """The field's schema with its limit; one that may be empty may still be."""
    limit = SETTING_LIMITS.get((section, name))
    if limit is None:
        return schema
    branches = schema.get("anyOf")
    if branches is None:
        return {**schema, **limit}
    return {"anyOf": [b if b == {"type": "null"} else {**b, **limit} for b in branches]}


def refused_values(limit: Limit) -> list[Any]:
    """The nearest that the limit leaves out."""
    if "enum" in limit:
        return ["medusa"]
    found: list[Any] = [limit["minimum"] - 1] if "minimum" in limit else []
    found += [limit["exclusiveMinimum"]] if "exclusiveMinimum" in limit else []
    return found + ([limit["maximum"] + 1] if "maximum" in limit else [])


def taken_values(limit: Limit) -> list[Any]:
    """Its last ones."""
    return [*limit.get("enum", ()), *(limit[n] for n in ("minimum", "maximum") if n in limit)]
