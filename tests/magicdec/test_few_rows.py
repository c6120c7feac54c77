"""A fused model whose few rows go to Triton's linears gives the model's own logits, as a graph
would hold them; a linear goes there for the rows that its kernel is not slower for."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from magicdec.few_rows import serve_few_rows
from magicdec.fused_layers import FewRowLinear, FusedDecoderLayer
from magicdec.fused_modules import fuse_modules
from magicdec.graphs.forward_graphs import static_forward
from magicdec.graphs.forward_inputs import Shape
from magicdec.kernels.dispatch import triton_backend
from magicdec.kernels.triton_linear import TritonLinear
from magicdec.kernels.triton_steps import TritonElementwise
from magicdec.kv_cache import PagedKVCache
from magicdec.model_loader import LoadedModel, describe_model
from tests.magicdec.graphs.captured_region import CapturedRegion, tensors_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE = 16
SIZES: dict[str, Any] = {
    "vocab_size": 192,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,  # biases
    "qwen3": Qwen3Config,  # norms of heads
}


class Timer:
    """Seconds in turn: the kernel's, then torch's, of 1, 8, 32 and 40 rows."""

    def __init__(self, *seconds: float) -> None:
        self._seconds, self.num_timed = seconds, 0

    def __call__(self, call: Callable[[], torch.Tensor]) -> float:
        call()
        self.num_timed += 1
        return self._seconds[(self.num_timed - 1) % len(self._seconds)]


def made(family: str, is_tied: bool = False) -> Any:
    config = FAMILIES[family](**SIZES, tie_word_embeddings=is_tied)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms' weights would all be 1, and biases 0
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model.to(DEVICE)


def served(family: str, *seconds: float) -> tuple[Any, Timer]:
    model, kernels, timer = made(family), TritonElementwise(DEVICE, torch.float32), Timer(*seconds)
    fuse_modules(model, kernels)
    serve_few_rows(model, TritonLinear(DEVICE), kernels, timer)
    return model, timer


def logits(model: LoadedModel, num_rows: int) -> torch.Tensor:
    """Of sequences of one row each, none with a past, of the first positions of their blocks."""
    cache = PagedKVCache(model.layers, BLOCK_SIZE, num_rows, torch.float32, DEVICE)
    shape = Shape(bucket=num_rows, tier=1, num_columns=1)
    rows = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    ones, zeros = torch.ones_like(rows), torch.zeros_like(rows)
    buffer = torch.cat([rows, zeros, rows * BLOCK_SIZE, rows, ones, zeros, rows])
    step = static_forward(model.forward, cache, triton_backend(), shape, buffer)
    with torch.inference_mode(), CapturedRegion([*tensors_of(model, cache), *step.static]):
        return step()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_rows", [1, 20, 40, 70])
def test_logits_are_the_models_own(family: str, num_rows: int) -> None:
    """Of rows for each tile, and of more."""
    expected = logits(describe_model(made(family), "float32"), num_rows)
    model, _ = served(family, 1.0, 2.0)
    kinds = [type(child) for child in model.modules()]
    assert nn.Linear not in kinds
    assert kinds.count(FewRowLinear) == 4 * SIZES["num_hidden_layers"] + 1
    assert FusedDecoderLayer in kinds
    found = logits(describe_model(model, "float32"), num_rows)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_each_shape_is_timed_once_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _, timer = served("llama", 1e-6, 2e-6)
    assert timer.num_timed == 5 * 4 * 2
    (line,) = [m for m in caplog.messages if m.startswith("us of (1, 8, 32, 40) rows")]
    assert "512 x 128 with gates 1.0 1.0 1.0 1.0 (2.0 2.0 2.0 2.0)" in line
    assert "128 x 256 with a sum" in line
    assert "192 x 128 linear" in line


def test_rows_go_where_they_are_faster() -> None:
    """All rows of a tile together: what 8 rows gain is more than one row loses. Torch's rows, which
    depend on one another, are left unless they are clearly faster."""
    model, _ = served("llama", 2.0, 1.0, 2.0, 4.0, 3.0, 2.0, 3.0, 2.9)
    head = model.lm_head
    assert isinstance(head, FewRowLinear)
    taken = [head.takes(torch.zeros(1, num_rows, 128)) for num_rows in (1, 16, 17, 32, 33, 64, 65)]
    assert taken == [True, True, False, False, True, True, False]
    model, _ = served("llama", 2.2, 2.0)
    assert not any(isinstance(child, FewRowLinear) for child in model.modules())


def test_a_tied_head_stays_the_embedding() -> None:
    model, kernels = made("llama", is_tied=True), TritonElementwise(DEVICE, torch.float32)
    serve_few_rows(model, TritonLinear(DEVICE), kernels, Timer(1.0, 2.0))
    head = model.get_output_embeddings()
    assert isinstance(head, FewRowLinear)
    assert head.weight is model.get_input_embeddings().weight


def test_what_is_no_plain_linear_stays() -> None:
    """Such as DeepSpeed's, which reduce over ranks."""

    class Other(nn.Linear):
        pass

    module = nn.Sequential(Other(128, 64), nn.Linear(100, 64), nn.Linear(128, 60)).to(DEVICE)
    kernels = TritonElementwise(DEVICE, torch.float32)
    serve_few_rows(module, TritonLinear(DEVICE), kernels, Timer(1.0, 2.0))
    assert [type(child) for child in module] == [Other, nn.Linear, nn.Linear]
