"""A model's safetensors files, read tensor by tensor: the whole of each, or a rank's slice.

    module on meta (shapes only) -> index of the files -> one tensor after another to its device

One file is open at a time, so what the host needs beside the page cache is a tensor.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from magicdec.config import ConfigError

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Bounds = list[tuple[int, int]]  # (start, stop) on each axis


class CheckpointError(ConfigError):
    """Files that do not fit the model's config.json, which their owner can mend. Names the
    parameter."""


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built here hold parameters without storage; their buffers are real.

    Stands in for deepspeed.OnDevice, which replaces Tensor.__new__, so that a module that Python
    imports meanwhile breaks (GLM-4 and the MoE models import torch._dynamo there).
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class StoredTensor:
    """One tensor of an open file: its shape is known, its numbers are read when asked for."""

    def __init__(self, part: Any) -> None:
        self._part = part

    @property
    def shape(self) -> Shape:
        return tuple(self._part.get_shape())

    def read(self, bounds: Bounds | None = None) -> torch.Tensor:
        """In the stored dtype; None: all of it, of which nothing is copied yet."""
        wanted = ... if bounds is None else tuple(slice(*bound) for bound in bounds)
        part: torch.Tensor = self._part[wanted]
        return part


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Which safetensors file holds each parameter of a module."""

    files: dict[str, Path]  # stored name -> file
    stored_names: dict[str, str]  # parameter -> stored name; a tied one has its partner's
    why_not_by_name: str | None  # None: the files hold the parameters as they are, and no more

    @classmethod
    def index(cls, folder: Path, module: nn.Module) -> "Checkpoint":
        """Reads names alone. The module is one of transformers."""
        files = dict(_stored_tensors(folder))
        tied = getattr(module, "all_tied_weights_keys", None) or {}
        names = {
            name: name if name in files else tied.get(name, name)
            for name, _ in module.named_parameters(remove_duplicate=False)
        }
        return cls(files, names, _why_not_by_name(files, names, module))

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """Every parameter's name and what is stored for it, which is read before the next.

        File by file, each by stored name: in that order writers lay tensors out.
        """
        stored = sorted((self.files[s], s, name) for name, s in self.stored_names.items())
        for path, entries in groupby(stored, key=itemgetter(0)):
            with safe_open(path, framework="pt") as file:
                for _, stored_name, name in entries:
                    yield name, StoredTensor(file.get_slice(stored_name))


def load_module(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The whole model in `folder` on one device, in evaluation mode.

    Tensor by tensor onto the device; transformers' own loader, over the host's memory, where the
    files do not hold the parameters by name, and the log says why. Raises CheckpointError.
    """
    started = time.perf_counter()
    with parameters_on_meta():
        module = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation="eager"
        )
    checkpoint = Checkpoint.index(folder, module)
    if checkpoint.why_not_by_name is None:
        try:
            _read_parameters(module, checkpoint, device)
        except torch.OutOfMemoryError as error:
            raise CheckpointError(_too_large(folder, module, device)) from error
    else:
        logger.warning(
            "%s is loaded whole on the host first: %s", folder, checkpoint.why_not_by_name
        )
        module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        )
    module.to(device)  # of what was read there, the buffers alone
    num_bytes = sum(parameter.nbytes for parameter in module.parameters())
    seconds = time.perf_counter() - started
    logger.info("%s: %.2f GiB of weights in %.1f s", folder, num_bytes / (1 << 30), seconds)
    loaded: nn.Module = module.eval()
    return loaded


def _too_large(folder: Path, module: nn.Module, device: torch.device) -> str:
    gib = sum(parameter.nbytes for parameter in module.parameters()) / (1 << 30)
    return (
        f"{folder}: its weights take {gib:.2f} GiB, more than {device} has free; raise "
        "tensor_parallel_size, or take a smaller model"
    )


def _read_parameters(module: Any, checkpoint: Checkpoint, device: torch.device) -> None:
    """In the dtype that each was built with. Tied ones are read once, and stay one."""
    built = dict(module.named_parameters(remove_duplicate=False))
    for name, stored in checkpoint.tensors():
        if checkpoint.stored_names[name] != name:
            continue
        if stored.shape != built[name].shape:
            raise CheckpointError(
                f"{name}: the file holds {list(stored.shape)}, config.json makes it "
                f"{list(built[name].shape)}"
            )
        owner, _, leaf = name.rpartition(".")
        values = stored.read().to(device, built[name].dtype)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
    names = checkpoint.stored_names.items()
    # Unties what the files hold twice with different numbers, as transformers does.
    module.tie_weights({name for name, stored in names if name != stored}, recompute_mapping=False)


def _why_not_by_name(files: dict[str, Path], names: dict[str, str], module: Any) -> str | None:
    if not files:
        return "it has no safetensors files"
    if "quantization_config" in vars(module.config):
        return "it is quantised"
    if missing := [name for name, stored in names.items() if stored not in files]:
        return f"{len(missing)} parameters are stored otherwise, first {missing[0]}"
    if unknown := files.keys() - set(names.values()):
        return f"{len(unknown)} stored tensors are no parameters, first {min(unknown)}"
    if converted := _converted(files, module):
        return f"transformers converts {len(converted)} tensors on loading, first {converted[0]}"
    if wider := module._get_dtype_plan(module.dtype):
        return f"transformers keeps parameters in another dtype: {', '.join(sorted(wider))}"
    return None


def _converted(files: dict[str, Path], module: Any) -> list[str]:
    """Stored under a parameter's name, and yet laid out otherwise."""
    steps = [
        step for step in get_model_conversion_mapping(module) if isinstance(step, WeightConverter)
    ]
    return sorted(name for name in files if any(s.compiled_sources.search(name) for s in steps))


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Path]]:
    """As transformers chooses: the single file where there is one."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        with safe_open(single, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, single
    elif index.exists():
        for name, file in json.loads(index.read_text())["weight_map"].items():
            yield name, folder / file
