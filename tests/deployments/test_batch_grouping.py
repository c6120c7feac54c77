"""Grouping changes the order alone: rows of one beginning are neighbours, long ones first."""

from hypothesis import given
from hypothesis import strategies as st

from magicdec.deployments.batch_grouping import PREFIX_CHARACTERS, WINDOW_ROWS, grouped
from magicdec.deployments.batch_row import COMPLETIONS_URL, BatchRow, prompt_text


def row(custom_id: str, prompt: object) -> BatchRow:
    return BatchRow("here", custom_id, COMPLETIONS_URL, {"prompt": prompt})


PROMPTS = st.one_of(
    st.text(max_size=20), st.integers(), st.none(), st.lists(st.text(max_size=5), max_size=3)
)


@given(st.lists(PROMPTS, max_size=30))
def test_no_row_is_lost_or_doubled(prompts: list[object]) -> None:
    rows = [row(str(i), prompt) for i, prompt in enumerate(prompts)]
    found = list(grouped(rows))
    assert sorted(r.custom_id for r in found) == sorted(r.custom_id for r in rows)
    assert found == list(grouped(rows))


def test_rows_of_one_document_are_neighbours_and_long_ones_go_first() -> None:
    documents = {name: name * PREFIX_CHARACTERS for name in "abc"}
    rows = [
        row(f"{name}{i}", documents[name] + "?" * (i * ord(name)))
        for i in range(3)
        for name in "abc"
    ]
    order = [r.custom_id for r in grouped(rows)]
    assert order == ["c2", "c1", "c0", "b2", "b1", "b0", "a2", "a1", "a0"]


def test_an_input_of_any_length_is_streamed() -> None:
    taken = 0

    def rows() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield row(str(taken), "x")

    next(grouped(rows()))  # type: ignore[arg-type]
    assert taken == WINDOW_ROWS


def test_the_text_of_a_conversation_is_all_its_messages() -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": parts}]
    assert prompt_text({"messages": messages}) == "a\nb\nc"
    assert prompt_text({"messages": messages}, 2) == "a\n"
