"""Incremental text and stop strings of one sequence."""

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, DecodeStream
from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # of bytes that are no whole character


class TokenTexts(dict[int, str]):
    """What tokens are by themselves, kept as they come: whole characters, wherever they stand.

    Empty for those whose text their neighbours decide: parts of a character, and every token of a
    tokenizer whose decoder does more than put bytes together. One a tokenizer serves all requests.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        # Not text, but a stream would decode all of a run of them at each one.
        self.special = frozenset(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)
        self._joins_bytes = isinstance(self.backend.decoder, ByteLevel)

    def __missing__(self, token_id: int) -> str:
        text = self.backend.decode([token_id]) if self._joins_bytes else ""
        self[token_id] = text = "" if _REPLACEMENT in text else text
        return text


class Detokenizer:
    """Token ids in, releasable text out.

        text so far   | released: sent to the client | held back: may begin a stop string |

    What is released is a function of the ids alone, so a stream that resumes from its journal
    holds back exactly what the first replica did.
    """

    def __init__(self, texts: TokenTexts, stop: tuple[str, ...]) -> None:
        self._texts = texts
        self._stream: DecodeStream | None = None  # of the tokens since the last with a text
        self._stop = stop
        self._held = ""
        self._undecoded: list[int] = []  # ids whose bytes are not yet whole characters
        self.stopped = False  # a stop string was met; the text ends before it

    def append(self, token_id: int, may_stop: bool) -> str:
        """Text that this token releases; stop strings are looked for only where it may stop."""
        text = self._decode(token_id)
        return self._release(text) if may_stop and self._stop else text

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        rest, self._held = self._held, ""
        return rest if self.stopped else rest + self._give_up_undecoded()

    def _decode(self, token_id: int) -> str:
        if token_id in self._texts.special:
            return ""
        if not self._undecoded and (text := self._texts[token_id]):
            self._stream = None
            return text
        try:
            text = self._step(token_id)
        except Exception:  # what tokenizers raises for bytes that no character begins with
            given_up = self._give_up_undecoded()
            self._stream = None
            text = given_up + self._step(token_id)
        if text:
            self._undecoded.clear()
        else:
            self._undecoded.append(token_id)
        return text

    def _step(self, token_id: int) -> str:
        if self._stream is None:
            self._stream = DecodeStream(skip_special_tokens=True)
        return self._stream.step(self._texts.backend, token_id) or ""

    def _give_up_undecoded(self) -> str:
        """Bytes that never became a character, as replacement characters."""
        text: str = self._texts.backend.decode(self._undecoded)
        self._undecoded.clear()
        return text

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            released, self._held = self._held[: min(found)], ""
            return released
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        split = len(self._held) - keep
        released, self._held = self._held[:split], self._held[split:]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
