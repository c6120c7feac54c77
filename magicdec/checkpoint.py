"""A checkpoint's safetensors files, read tensor by tensor: the whole of each, or a rank's slice.

    module on meta (shapes only) -> index of the files -> one tensor after another to its device

One file is open at a time, so what the host needs beside the page cache is a tensor.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

Shape = tuple[int, ...]
Bounds = list[tuple[int, int]]  # (start, stop) on each axis


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
    missing: tuple[str, ...]

    @classmethod
    def index(cls, folder: Path, module: nn.Module) -> "Checkpoint":
        files = dict(_stored_tensors(folder))
        tied = getattr(module, "all_tied_weights_keys", None) or {}
        names = {}
        missing = []
        for name, _ in module.named_parameters(remove_duplicate=False):
            stored = name if name in files else tied.get(name, name)
            names[name] = stored
            if stored not in files:
                missing.append(name)
        return cls(files, names, tuple(missing))

    def why_not_by_name(self) -> str | None:
        """None where the files hold the module's parameters by name and nothing else."""
        if not self.files:
            return "it has no safetensors files"
        if self.missing:
            return f"{len(self.missing)} parameters are stored otherwise, first {self.missing[0]}"
        if unknown := self.files.keys() - set(self.stored_names.values()):
            return f"{len(unknown)} stored tensors are no parameters, first {min(unknown)}"
        return None

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """Every parameter's name and what is stored for it, which is read before the next.

        File by file, each by stored name: in that order writers lay tensors out.
        """
        stored = sorted((self.files[s], s, name) for name, s in self.stored_names.items())
        for path, entries in groupby(stored, key=itemgetter(0)):
            with safe_open(path, framework="pt") as file:
                for _, stored_name, name in entries:
                    yield name, StoredTensor(file.get_slice(stored_name))


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
