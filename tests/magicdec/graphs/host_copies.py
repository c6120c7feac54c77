"""Counts what goes to the host and to the device, where both are a CPU."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class HostCopies(TorchFunctionMode):
    """Follows the device's tensors, and what is computed from them, by their storage."""

    READS = (
        "tolist",
        "item",
        "cpu",
        "numpy",
        "nonzero",
        "equal",
        "__bool__",
        "__int__",
        "__float__",
    )

    def __init__(self, on_device: list[torch.Tensor]) -> None:
        TorchFunctionMode.__init__(self)
        self._known = {_address(tensor) for tensor in on_device}
        self._alive = list(on_device)  # so that no address comes twice
        self.to_host: list[str] = []
        self.to_device: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        places = [
            _address(leaf) in self._known
            for leaf in torch.utils._pytree.tree_leaves((args, kwargs or {}))
            if isinstance(leaf, torch.Tensor)
        ]
        out = func(*args, **(kwargs or {}))
        if any(places) and (name in self.READS or (name == "copy_" and not places[0])):
            self.to_host.append(name)
        elif any(places):
            if not all(places):
                self.to_device.append(name)
            for leaf in torch.utils._pytree.tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._known.add(_address(leaf))
                    self._alive.append(leaf)
        return out


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
