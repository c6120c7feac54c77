"""How many KV blocks a sequence will have held at its end, as far as answers seen let expect."""

from collections.abc import Iterable

from magicdec.routing.traffic import OutputEstimate
from magicdec.sequence import Sequence


class KvReservation:
    """Learns from the answers that end here how much of their max_tokens others will use."""

    def __init__(self, block_size: int, max_model_len: int) -> None:
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._answers = OutputEstimate()

    def learn(self, sequence: Sequence) -> None:
        """One that has answered; what was given up teaches nothing."""
        max_tokens = sequence.request.sampling.max_tokens
        self._answers.learn(max_tokens, sequence.num_output_tokens)

    def num_blocks(self, sequence: Sequence) -> int:
        """Of prompt and whole expected answer, no fewer than it holds."""
        num_output, max_tokens = sequence.num_output_tokens, sequence.request.sampling.max_tokens
        answer = max(self._answers.expected(max_tokens, num_output), num_output + 1)
        num_tokens = min(sequence.num_prompt_tokens + answer, self._max_model_len)
        return max(-(-num_tokens // self._block_size), len(sequence.block_table))

    def num_growing(self, running: Iterable[Sequence]) -> int:
        """Blocks that these will ask for beyond what they hold."""
        return sum(self.num_blocks(s) - len(s.block_table) for s in running)
