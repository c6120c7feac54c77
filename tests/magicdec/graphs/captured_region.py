"""What may not happen where a GPU's work is captured, found on a CPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from magicdec.kv_cache import PagedKVCache
from magicdec.model_loader import LoadedModel


class Forbidden(AssertionError):
    """A captured region did what a replay cannot."""


class CapturedRegion(TorchDispatchMode):
    """Fails on reading a value, on shapes that depend on one, on numbers from the host, and on
    tensors that are neither made inside nor among the static ones."""

    HOST = ("_local_scalar_dense", "item", "is_nonzero", "equal", "lift_fresh", "lift_fresh_copy")
    SHAPES = ("nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount")

    def __init__(self, static: list[torch.Tensor]) -> None:
        TorchDispatchMode.__init__(self)
        self._known = {tensor.untyped_storage().data_ptr() for tensor in static}
        self._alive = list(static)  # so that no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in self.HOST or name in self.SHAPES:
            raise Forbidden(f"{name} in a captured region")
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs or {})):
            if isinstance(tensor, torch.Tensor):
                self._check(name, tensor)
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._known.add(tensor.untyped_storage().data_ptr())
                self._alive.append(tensor)
        return out

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.numel() > 0 and tensor.untyped_storage().data_ptr() not in self._known:
            raise Forbidden(f"{name} reads a tensor {tuple(tensor.shape)} that is not static")


def tensors_of(model: LoadedModel, cache: PagedKVCache) -> list[torch.Tensor]:
    module = model.module
    return [*module.parameters(), *module.buffers(), *cache.k, *cache.v]
