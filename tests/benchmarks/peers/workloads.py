"""What the contenders decode: windows of public documents, by the committed list."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from magicdec.model_loader import load_tokenizer
from tests.benchmarks.acceptance_tasks import read_corpus, read_windows, window_ids


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    batch_size: int
    context_len: int
    temperature: float = 0.0  # greedy
    top_p: float = 1.0


WORKLOADS = (
    Workload("8 x 7,000 greedy", 8, 7000),
    Workload("8 x 7,000 sampled", 8, 7000, 0.8, 0.95),
    Workload("16 x 3,500 greedy", 16, 3500),
    Workload("1 x 7,000 greedy", 1, 7000),
)


def read_prompts(
    corpus: Path, model: str, workloads: Sequence[Workload]
) -> dict[str, list[list[int]]]:
    """Token ids by the workload's name: continuations of novels, code and documentation, in turn
    as the list has them; no text of them is kept here. Raises KeyError for another corpus."""
    windows = [window for window in read_windows() if window.task != "summary"]
    by_task = {w.task: [v for v in windows if v.task == w.task] for w in windows}
    mixed = [window for turn in zip(*by_task.values(), strict=False) for window in turn]
    texts = read_corpus(corpus, {window.source for window in mixed})
    tokenizer = load_tokenizer(model)
    return {
        workload.name: [
            window_ids(tokenizer, texts[w.source], w.offset, workload.context_len)
            for w in mixed[: workload.batch_size]
        ]
        for workload in workloads
    }
