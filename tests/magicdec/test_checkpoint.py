"""A model read tensor by tensor is the one that transformers loads, and takes no second copy."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import Transpose, WeightConverter

from magicdec import checkpoint
from magicdec.checkpoint import (
    Checkpoint,
    CheckpointError,
    StoredTensor,
    load_module,
    parameters_on_meta,
)
from tests.cluster.shard_models import REFUSED, SHARDABLE
from tests.conftest import FAMILIES, save_model
from tests.loaded_models import assert_as_transformers_loads_it

CPU = torch.device("cpu")
WHOLE = {
    **FAMILIES,
    **{name: SHARDABLE[name] for name in ("llama_tied", "smollm2", "glm4", "qwen3_moe")},
    **{name: REFUSED[name][0] for name in ("phi3", "gpt2", "gpt_neox", "olmo2")},
}
OTHERWISE = ("qwen3_moe", "gpt_neox")  # experts are fused, the head is renamed on loading
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("whole")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else save_model(path, WHOLE[name]())

    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_a_model_is_the_one_that_transformers_loads(
    name: str,
    dtype: torch.dtype,
    folders: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = load_module(folders(name), dtype, CPU)
    assert_as_transformers_loads_it(module, folders(name), dtype)
    on_the_host_first = [r.message for r in caplog.records if "on the host first" in r.message]
    assert len(on_the_host_first) == (1 if name in OTHERWISE else 0)
    assert all("parameters are stored otherwise" in message for message in on_the_host_first)


@pytest.mark.parametrize("name", ["llama_tied", "qwen3"])
def test_a_bf16_checkpoint_of_many_files_serves_in_fp32(
    name: str, tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    module = AutoModelForCausalLM.from_pretrained(folders(name), dtype=torch.bfloat16)
    module.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for dtype in DTYPES[:2]:
        assert_as_transformers_loads_it(load_module(tmp_path, dtype, CPU), tmp_path, dtype)


@pytest.mark.parametrize("differs", [False, True])
def test_a_head_that_is_stored_beside_its_partner_is_tied_where_it_is_the_same(
    differs: bool, tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    folder = tmp_path / "both"
    shutil.copytree(folders("llama_tied"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + float(differs)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    module: Any = load_module(folder, torch.float32, CPU)
    assert (module.lm_head.weight is module.model.embed_tokens.weight) != differs
    assert_as_transformers_loads_it(module, folder, torch.float32)


def test_files_of_pickled_weights_are_left_to_transformers(
    tmp_path: Path, folders: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(folders("llama"), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    module = load_module(folder, torch.float32, CPU)
    assert_as_transformers_loads_it(module, folder, torch.float32)
    assert "on the host first: it has no safetensors files" in caplog.text


def test_a_shape_that_config_json_does_not_make_is_refused(
    tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(folders("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    said = r"^lm_head\.weight: the file holds \[384, 64\], config\.json makes it \[300, 64\]$"
    with pytest.raises(CheckpointError, match=said):
        load_module(folder, torch.float32, CPU)


def test_weights_that_do_not_fit_say_what_would_help(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(StoredTensor, "read", full)
    said = r"llama: its weights take 0\.00 GiB, more than cpu has free; raise tensor_parallel_size"
    with pytest.raises(CheckpointError, match=said):
        load_module(folders("llama"), torch.float32, CPU)


def on_meta(folder: Path) -> Any:
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def test_what_is_stored_by_name_but_otherwise_is_not_read_by_name(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, module = folders("llama"), on_meta(folders("llama"))
    assert Checkpoint.index(folder, module).why_not_by_name is None
    with monkeypatch.context() as patch:
        patch.setattr(type(module), "_keep_in_fp32_modules_strict", ["norm"])
        module._keep_in_fp32_modules_strict = ["norm"]
        module.to(torch.bfloat16)
        wider = Checkpoint.index(folder, module).why_not_by_name
        assert wider == "transformers keeps parameters in another dtype: norm"
    name = "mlp.down_proj.weight"
    step = WeightConverter(name, name, [Transpose(0, 1)])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "get_model_conversion_mapping", lambda module: [step])
        turned = Checkpoint.index(folder, module).why_not_by_name
        assert turned is not None
        assert turned.startswith("transformers converts 3 tensors on loading, first model.layers.0")
    module.config.quantization_config = {"quant_method": "fp8"}
    assert Checkpoint.index(folder, module).why_not_by_name == "it is quantised"


def test_one_file_is_open_at_a_time(
    tmp_path: Path, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = AutoModelForCausalLM.from_pretrained(folders("llama"))
    module.save_pretrained(tmp_path, max_shard_size="100KB")
    opened: list[Path] = []
    now = 0

    @contextlib.contextmanager
    def counting(path: Path, framework: str) -> Iterator[Any]:
        nonlocal now
        now += 1
        assert now == 1
        opened.append(path)
        with safe_open(path, framework=framework) as file:
            yield file
        now -= 1

    monkeypatch.setattr(checkpoint, "safe_open", counting)
    load_module(tmp_path, torch.float32, CPU)
    assert sorted(opened) == sorted(tmp_path.glob("*.safetensors"))


_PEAK = """
import re, sys
from pathlib import Path
import torch
from transformers.models.llama import modeling_llama
from magicdec.checkpoint import load_module

def resident(field):
    found = re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
module = load_module(Path(sys.argv[1]), torch.float32, torch.device("cpu"))
print(resident("VmHWM") - before, sum(p.nbytes for p in module.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_load_takes_the_model_and_no_second_copy(tmp_path: Path) -> None:
    """In another dtype than the files', so that all is copied, as onto a device. What may be there
    beside the model is a file's mapped pages, an eighth of the whole, and the odd tensor."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    config = FAMILIES["llama"]()
    config.update({**shape, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128})
    config.update({"vocab_size": 16384})
    module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    module.save_pretrained(tmp_path, max_shard_size="34MB")
    del module
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert stored > 190e6 and len(list(tmp_path.glob("*.safetensors"))) >= 6
    command = [sys.executable, "-c", _PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    grown, held = (int(word) for word in done.stdout.split())
    assert held == pytest.approx(2 * stored, rel=0.01)
    assert grown > held  # or the peak was not that of the load
    assert grown - held < 0.45 * stored  # with every file mapped to the end, all of it


def test_meta_modules_have_real_buffers_and_leave_torch_as_it_was() -> None:
    register = torch.nn.Module.register_parameter
    with parameters_on_meta():
        norm = torch.nn.BatchNorm1d(4)
    assert norm.weight.is_meta
    assert norm.running_var is not None and norm.running_var.tolist() == [1.0] * 4
    assert torch.nn.Module.register_parameter is register
