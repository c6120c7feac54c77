"""The journal of a request: what a second replica is given, and when there is no third."""

from typing import Any

import pytest

from magicdec.deployments.errors import ApiError
from magicdec.deployments.journal import Journal, ReplicaLost
from magicdec.types import FinishReason, Request, RequestOutput, Usage

REQUEST = Request("r", (1, 2, 3))


def output(*token_ids: int, completion_tokens: int = 0, **counts: Any) -> RequestOutput:
    usage = Usage(3, completion_tokens, **counts)
    return RequestOutput("r", token_ids, "", usage)


def test_the_next_replica_gets_what_was_emitted() -> None:
    journal = Journal(REQUEST)
    journal.add(output(7, 8))
    journal.add(output(9))
    assert journal.next_request().emitted_token_ids == (7, 8, 9)
    assert journal.next_request().prompt_token_ids == (1, 2, 3)


def test_attempts_have_ids_of_their_own_and_the_client_sees_its_own() -> None:
    journal = Journal(REQUEST)
    ids = {journal.next_request().request_id for _ in range(3)}
    assert len(ids) == 3 and all(name.startswith("r") for name in ids)
    sent = journal.next_request()
    answered = RequestOutput(sent.request_id, (7,), "", Usage(3, 1))
    assert journal.add(answered).request_id == "r"


def test_rounds_add_up_and_tokens_are_counted_once() -> None:
    journal = Journal(REQUEST)
    first = {"num_rounds": 2, "num_draft_tokens": 8, "num_accepted_tokens": 5}
    journal.add(output(*range(7), completion_tokens=7, **first))
    journal.replica_lost(ReplicaLost("a", died=True))
    second = {"num_rounds": 1, "num_draft_tokens": 4, "num_accepted_tokens": 2}
    usage = journal.add(output(7, 8, 9, completion_tokens=10, **second)).usage
    assert usage == Usage(3, 10, 0, num_rounds=3, num_draft_tokens=12, num_accepted_tokens=7)


def test_two_deaths_end_the_request() -> None:
    journal = Journal(REQUEST)
    journal.replica_lost(ReplicaLost("a", died=True))
    with pytest.raises(ApiError) as caught:
        journal.replica_lost(ReplicaLost("b", died=True))
    assert caught.value.code == "replica_died_twice"
    assert caught.value.headers["x-should-retry"] == "false"
    assert journal.lost == ("a", "b")


def test_at_most_two_resumes() -> None:
    journal = Journal(REQUEST)
    for _ in range(2):
        journal.replica_lost(ReplicaLost("a", died=False))
    with pytest.raises(ApiError) as caught:
        journal.replica_lost(ReplicaLost("a", died=False))
    assert (caught.value.status, caught.value.code) == (503, "replica_unavailable")
    assert "x-should-retry" not in caught.value.headers
    assert "died" not in caught.value.message


def test_the_last_output_keeps_its_finish_reason() -> None:
    usage = Usage(3, 1)
    last = RequestOutput("r", (5,), "x", usage, FinishReason.STOP)
    assert Journal(REQUEST).add(last) == last
