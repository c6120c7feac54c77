"""How often the host waits in a round of an engine by graphs: once, for what was drafted together
with what was chosen."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from magicdec.batch import Batch, StepResult
from magicdec.drafters.self_draft import SelfDrafter
from magicdec.graphs.draft_graphs import DraftGraphs
from magicdec.graphs.forward_graphs import ForwardGraphs
from magicdec.kernels.gumbel import Draw, Scaling, Winners
from magicdec.types import Request, SamplingParams
from tests.conftest import engine_config
from tests.generation import random_prompts, run
from tests.magicdec.graphs.captured_region import tensors_of
from tests.magicdec.graphs.conftest import MakeWatched, Watched
from tests.magicdec.graphs.host_copies import HostCopies

if torch.cuda.is_available():
    pytest.skip("copies are counted where host and device are one", allow_module_level=True)

SAMPLED = SamplingParams(temperature=0.8, seed=5, max_tokens=9, ignore_eos=True)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PENALISED = SamplingParams(temperature=0.0, presence_penalty=0.5, max_tokens=7, ignore_eos=True)


def largest(
    scores: torch.Tensor,
    draws: Sequence[Draw | None],
    first_entry: int = 0,
    scaling: Scaling | None = None,
) -> Winners:
    """Without noise, by operations that HostCopies sees."""
    scores = scores if scaling is None else scaling.of(scores)
    values, entries = scores.max(dim=1)
    return Winners(values.double(), entries + first_entry)


class Counted:
    """The copies of each round that is replayed whole, by graphs that were there before."""

    def __init__(self, watched: Watched) -> None:
        self._watched, self._execute = watched, watched.runner.execute
        watched._execute = self.execute
        self.waits: list[tuple[int, int]] = []  # drafted tokens, and copies to the host

    def execute(self, batch: Batch) -> StepResult:
        before = len(self._captured())
        with HostCopies(self._on_device()) as copies:
            result = self._execute(batch)
        if len(self._captured()) == before and not self._watched.launched:
            drafted = sum(outcome.num_draft_tokens for outcome in result.sequences)
            self.waits.append((drafted, len(copies.to_host)))
        return result

    def _captured(self) -> list[object]:
        forwards, drafts = self._graphs()
        return [*forwards._captured.values(), *drafts._captured.values()]

    def _graphs(self) -> tuple[ForwardGraphs, DraftGraphs]:
        runner = self._watched.runner
        drafter = runner._drafters.by_name["streaming"]
        assert isinstance(drafter, SelfDrafter) and drafter._graphs is not None
        assert runner._target_forward is not None and runner._target_forward._graphs is not None
        return runner._target_forward._graphs, drafter._graphs

    def _on_device(self) -> list[torch.Tensor]:
        forwards, drafts = self._graphs()
        runner = self._watched.runner
        begun = self._watched.next_step()
        held = [
            *(() if begun is None else (begun.logits,)),
            *(t for c in forwards._captured.values() for t in (*c.step.static, c.logits)),
            *(t for c in drafts._captured.values() for t in (*c.step.static, c.logits)),
            *(inputs.words for inputs in drafts._view_inputs.values()),
        ]
        return [*tensors_of(runner._model, runner._pages), *held]


def counted(
    folder: Path,
    by_graphs: MakeWatched,
    sampling: list[SamplingParams],
    draft_length: int,
    drafter: str = "streaming",
) -> list[tuple[int, int]]:
    """Of the second of two runs, which finds all graphs."""
    config = engine_config(folder, draft_length=draft_length, drafter=drafter, draft_budget=24)
    watched = by_graphs(config, largest)
    prompts = random_prompts([20, 12, 9][: len(sampling)])
    for name in ("first", "second"):
        of_run = Counted(watched) if name == "second" else None
        wanted = [Request(f"{name} {i}", tuple(prompts[i]), own) for i, own in enumerate(sampling)]
        run(watched.engine, wanted)
    assert of_run is not None
    return of_run.waits


@pytest.mark.parametrize(
    ("draft_length", "drafter"), [(0, "streaming"), (2, "streaming"), (2, "recycled")]
)
def test_the_host_waits_once_a_round(
    folder: Path, by_graphs: MakeWatched, draft_length: int, drafter: str
) -> None:
    """Where views are chosen again, too."""
    waits = counted(folder, by_graphs, [SAMPLED, GREEDY], draft_length, drafter)
    assert len(waits) >= 4
    assert {n for _, n in waits} == {1}
    assert any(drafted > 0 for drafted, _ in waits) is (draft_length > 0)


def test_rounds_with_penalties_wait_for_every_drafted_token(
    folder: Path, by_graphs: MakeWatched
) -> None:
    """What is counted would see them: penalties look at the draft's own tokens."""
    waits = counted(folder, by_graphs, [GREEDY, PENALISED], draft_length=2)
    assert any(drafted > 0 and n >= 3 for drafted, n in waits)
