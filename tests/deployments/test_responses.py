"""What the usage of an answer says: of one choice, of several, of a stream that moved."""

from typing import Any

import pytest

from magicdec.deployments.journal import Journal, ReplicaLost
from magicdec.deployments.responses import ResponseFormat, usage_body
from magicdec.types import Request, RequestOutput, Usage

DRAFTED = Usage(100, 8, 64, num_rounds=4, num_draft_tokens=12, num_accepted_tokens=3)


def usage(drafter: str | None, num_draft_tokens: int = 4) -> Usage:
    return Usage(10, 5, num_draft_tokens=num_draft_tokens, drafter=drafter)


def test_usage_has_openai_s_counts_and_ours() -> None:
    assert usage_body([DRAFTED]) == {
        "prompt_tokens": 100,
        "completion_tokens": 8,
        "total_tokens": 108,
        "prompt_tokens_details": {"cached_tokens": 64},
        "magicdec": {
            "drafter": None,
            "rounds": 4,
            "drafted": 12,
            "accepted": 3,
            "mean_acceptance_length": 1.75,
        },
    }


@pytest.mark.parametrize(
    ("drafters", "shown"),
    [
        ([None], None),
        (["snapkv"], "snapkv"),
        (["ngram", None, "ngram"], "ngram"),
        (["recycled", "ngram"], "ngram,recycled"),
    ],
)
def test_the_drafter_is_that_of_the_choices_that_were_drafted(
    drafters: list[str | None], shown: str | None
) -> None:
    assert usage_body([usage(name) for name in drafters])["magicdec"]["drafter"] == shown


def test_the_last_chunk_of_a_stream_says_it_too() -> None:
    response = ResponseFormat.new(chat=True, model="m", with_token_ids=False)
    chunk: dict[str, Any] = response.usage_chunk([usage("streaming")])
    assert chunk["usage"]["magicdec"]["drafter"] == "streaming"


def test_after_a_resume_the_latest_drafter_counts() -> None:
    journal = Journal(Request("r", (1, 2, 3)))
    journal.add(RequestOutput("r", (4,), "", usage("snapkv")))
    journal.replica_lost(ReplicaLost("a", died=False))
    assert journal.add(RequestOutput("r", (5,), "", usage(None, 0))).usage.drafter == "snapkv"
    assert journal.add(RequestOutput("r", (6,), "", usage("ngram"))).usage.drafter == "ngram"
    journal.replica_lost(ReplicaLost("b", died=False))
    assert journal.add(RequestOutput("r", (7,), "", usage(None, 0))).usage.drafter == "ngram"
