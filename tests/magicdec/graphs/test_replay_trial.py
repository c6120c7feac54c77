"""Replays are served only where they do what launched steps do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from magicdec.graphs.capture import Graph
from magicdec.graphs.forward_graphs import ForwardGraphs
from magicdec.graphs.replay_trial import replays_agree
from magicdec.kernels.dispatch import triton_backend
from magicdec.kv_cache import PagedKVCache
from magicdec.model_loader import LoadedModel, describe_model
from magicdec.vocabulary import Vocabulary
from tests.conftest import FAMILIES
from tests.magicdec.graphs.captured_region import tensors_of
from tests.magicdec.graphs.eager_capturer import EagerCapturer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = triton_backend()


class FrozenGraph:
    def replay(self) -> None: ...


class FrozenCapturer(EagerCapturer):
    """Its replays leave what the capture left, as where an exchange was not captured."""

    left = 0.0

    def capture(self, step: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        return FrozenGraph(), step().fill_(self.left)


class NanCapturer(FrozenCapturer):
    """The same over memory that held anything."""

    left = float("nan")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    torch.manual_seed(0)
    module: Any = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    return describe_model(module.to(DEVICE), "float32")


@pytest.mark.parametrize(
    ("kind", "agrees"), [(EagerCapturer, True), (FrozenCapturer, False), (NanCapturer, False)]
)
def test_a_replay_is_held_to_a_launched_step(
    model: LoadedModel, kind: type[EagerCapturer], agrees: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PagedKVCache(model.layers, 16, 4, torch.float32, DEVICE)
    graphs = ForwardGraphs(
        model.forward, cache, BACKEND, kind(DEVICE, tensors_of(model, cache)), 40
    )
    assert replays_agree(model.forward, cache, BACKEND, graphs, model.vocabulary) is agrees
    assert any("are launched" in message for message in caplog.messages) is not agrees


@pytest.mark.parametrize("other", [1.0, float("nan")])
def test_ranks_go_by_the_worst_of_them(model: LoadedModel, other: float) -> None:
    """This one agrees; another is off by all of its logits, or has NaNs."""

    def all_gather(part: torch.Tensor) -> torch.Tensor:
        return torch.stack([part, torch.full_like(part, other)])

    cache = PagedKVCache(model.layers, 16, 4, torch.float32, DEVICE)
    capturer = EagerCapturer(DEVICE, tensors_of(model, cache))
    graphs = ForwardGraphs(model.forward, cache, BACKEND, capturer, 40)
    vocabulary = Vocabulary((0, 8, 16), 0, all_gather)
    assert not replays_agree(model.forward, cache, BACKEND, graphs, vocabulary)
