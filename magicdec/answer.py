"""What one request is answered: tokens and the text that they release, up to where it ends."""

from collections.abc import Sequence as Tokens

from magicdec.detokenizer import Detokenizer, TokenTexts
from magicdec.sequence import Sequence
from magicdec.types import FinishReason


class Answer:
    """Appends to its sequence. Text and stop matching live here: ranks see token ids only."""

    def __init__(
        self,
        sequence: Sequence,
        texts: TokenTexts,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        sampling = sequence.request.sampling
        self.sequence = sequence
        self._detokenizer = Detokenizer(texts, sampling.stop)
        eos = frozenset[int]() if sampling.ignore_eos else eos_token_ids
        self._stop_token_ids = eos | frozenset(sampling.stop_token_ids)
        self._least_tokens = sequence.num_prompt_tokens + sampling.min_tokens
        self._most_tokens = min(sequence.most_tokens, max_model_len)

    def append(self, emitted: Tokens[int]) -> tuple[int, str, FinishReason | None]:
        """How many of the tokens are the answer's, the text that they release, and whether it ends
        with them: what was drafted past the stop never happened."""
        token_ids, detokenizer = self.sequence.token_ids, self._detokenizer
        text = ""
        for num_kept, token_id in enumerate(emitted, start=1):
            token_ids.append(token_id)
            num_tokens = len(token_ids)
            may_stop = num_tokens >= self._least_tokens
            if may_stop and token_id in self._stop_token_ids:
                return num_kept, text, FinishReason.STOP  # the stop token itself is not text
            text += detokenizer.append(token_id, may_stop)
            if detokenizer.stopped:
                return num_kept, text, FinishReason.STOP
            if num_tokens >= self._most_tokens:
                return num_kept, text, FinishReason.LENGTH
        return len(emitted), text, None

    def flush(self) -> str:
        """The text that was held back, once no more tokens come."""
        return self._detokenizer.flush()
