"""Streamed text is the decoded text, cut before the first stop string and never past it."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from magicdec.detokenizer import Detokenizer, TokenTexts
from magicdec.model_loader import load_tokenizer
from tests.conftest import EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = TokenTexts(TOKENIZER)


def feed(detokenizer: Detokenizer, text: str) -> list[str]:
    ids = TOKENIZER(text)["input_ids"]
    assert isinstance(ids, list)
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.append(token_id, may_stop=True))
        if detokenizer.stopped:
            break
    return pieces


@settings(deadline=None)
@given(text=st.text(alphabet="abcdé漢🙂 ", max_size=30))
def test_without_stop_strings_the_pieces_add_up_to_the_text(text: str) -> None:
    detokenizer = Detokenizer(TEXTS, ())
    assert "".join(feed(detokenizer, text)) + detokenizer.flush() == text


@settings(deadline=None)
@given(text=st.text(alphabet="abcdé漢🙂 \N{REPLACEMENT CHARACTER}", max_size=30))
def test_each_token_releases_what_a_stream_over_all_of_them_does(text: str) -> None:
    stream, detokenizer = DecodeStream(skip_special_tokens=True), Detokenizer(TEXTS, ())
    for token_id in TOKENIZER(text)["input_ids"]:
        expected = stream.step(TOKENIZER.backend_tokenizer, token_id) or ""
        assert detokenizer.append(token_id, may_stop=True) == expected


@settings(deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=30),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(TEXTS, tuple(stop))
    released = "".join(feed(detokenizer, text)) + detokenizer.flush()
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert released == text
        assert not detokenizer.stopped
    else:  # tokens are characters here: the stop that completes first ends the text
        first = min(ends)
        longest = max(len(s) for s in stop if text[:first].endswith(s))
        assert released == text[: first - longest]
        assert detokenizer.stopped


@settings(deadline=None)
@given(
    text=st.text(alphabet="ab漢🙂", max_size=12),
    places=st.lists(st.integers(0, 40), max_size=6),
)
def test_special_tokens_are_no_text_wherever_they_stand(text: str, places: list[int]) -> None:
    """Within the bytes of a character, too."""
    ids = list(TOKENIZER(text)["input_ids"])
    for place in places:
        ids.insert(min(place, len(ids)), EOS)
    detokenizer = Detokenizer(TEXTS, ())
    pieces = [detokenizer.append(token_id, may_stop=True) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == text


def test_a_run_of_special_tokens_is_not_decoded_at_each_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[int] = []

    class Counting:
        def __init__(self, skip_special_tokens: bool) -> None:
            self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

        def step(self, tokenizer: Tokenizer, token_id: int) -> str | None:
            steps.append(token_id)
            return self._stream.step(tokenizer, token_id)

    monkeypatch.setattr("magicdec.detokenizer.DecodeStream", Counting)
    detokenizer = Detokenizer(TEXTS, ())
    letter = TOKENIZER("é")["input_ids"]
    text = "".join(detokenizer.append(i, may_stop=True) for i in [EOS] * 50 + letter)
    assert (text, steps) == ("é", letter)


def test_a_possible_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    detokenizer = Detokenizer(TEXTS, ("abc",))
    assert feed(detokenizer, "xab") == ["x", "", ""]
    assert feed(detokenizer, "d") == ["abd"]


def test_a_character_cut_in_half_is_shown_as_unknown_at_the_end() -> None:
    detokenizer = Detokenizer(TEXTS, ())
    ids = TOKENIZER("é")["input_ids"]
    assert isinstance(ids, list)
    assert detokenizer.append(ids[0], may_stop=True) == ""
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


def test_bytes_that_begin_no_character_do_not_end_the_stream() -> None:
    """As SentencePiece models have them: tokenizers gives up on such bytes, the text goes on."""
    vocab = {"<unk>": 0, "<0xFF>": 1, "<0x41>": 2, "\u2581word": 3}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    detokenizer = Detokenizer(TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend)), ())
    text = "".join(detokenizer.append(i, may_stop=True) for i in (2, 1, 3, 1, 1, 2, 3))
    assert (text + detokenizer.flush()).count("word") == 2
    assert "\N{REPLACEMENT CHARACTER}" in text


@pytest.mark.parametrize("may_stop", [True, False])
def test_stop_strings_wait_for_min_tokens(may_stop: bool) -> None:
    detokenizer = Detokenizer(TEXTS, ("a",))
    ids = TOKENIZER("a")["input_ids"]
    assert isinstance(ids, list)
    detokenizer.append(ids[0], may_stop)
    assert detokenizer.stopped == may_stop


def test_special_tokens_are_not_text(tiny_model_dir: Path) -> None:
    detokenizer = Detokenizer(TokenTexts(load_tokenizer(str(tiny_model_dir))), ())
    assert detokenizer.append(EOS, may_stop=True) == ""
    assert detokenizer.flush() == ""
