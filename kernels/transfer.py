"""From the host to a device, with nobody waiting."""

import torch


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor there; a copy where it is on the host.

    From usual memory the host would first wait for all that a GPU was given to do, and then launch
    what follows one by one beside an idle GPU.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
