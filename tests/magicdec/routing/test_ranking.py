"""The sorted list against sorting."""

from hypothesis import given
from hypothesis import strategies as st

from magicdec.routing.ranking import Ranking

CHANGES = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.one_of(st.none(), st.floats(-5, 5))), max_size=40
)


@given(CHANGES)
def test_the_order_is_that_of_the_last_scores(changes: list[tuple[str, float | None]]) -> None:
    ranking, scores = Ranking(), dict[str, float]()
    for name, score in changes:
        if score is None:
            ranking.discard(name)
            scores.pop(name, None)
        else:
            ranking.put(name, score)
            scores[name] = score
    order = sorted(scores, key=lambda name: (scores[name], name))
    assert list(ranking) == order and len(ranking) == len(order)
    assert all((name in ranking) == (name in scores) for name in "abcdef")
    if order:
        assert ranking.least() == scores[order[0]]
        assert (ranking.greatest(), ranking.last()) == (scores[order[-1]], order[-1])
