"""Between host and device, with nobody waiting but who needs the values."""

import torch


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor there; a copy where it is on the host.

    From usual memory the host would first wait for all that a GPU was given to do, and then launch
    what follows one by one beside an idle GPU.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Arriving:
    """A tensor on its way to the host, which may give the device more to do meanwhile: what it is
    given from now on is not waited for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> list[int]:
        """Its values, of one dimension."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[int] = self._tensor.tolist()
        return values
