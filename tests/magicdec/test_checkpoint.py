"""Reading safetensors files by the names of a module's parameters."""

import torch

from magicdec.checkpoint import parameters_on_meta


def test_meta_modules_have_real_buffers_and_leave_torch_as_it_was() -> None:
    register = torch.nn.Module.register_parameter
    with parameters_on_meta():
        norm = torch.nn.BatchNorm1d(4)
    assert norm.weight.is_meta
    assert norm.running_var is not None and norm.running_var.tolist() == [1.0] * 4
    assert torch.nn.Module.register_parameter is register
