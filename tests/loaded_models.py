"""What a model that was read must have in common with the one that transformers loads."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM


def assert_as_transformers_loads_it(ours: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Bit for bit, with the same parameters tied, in evaluation mode."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    # Duplicates left out: the same ones are tied.
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for found, expected in (
        (ours.named_parameters(remove_duplicate=False), theirs.named_parameters),
        (ours.named_buffers(remove_duplicate=False), theirs.named_buffers),
    ):
        tensors = dict(found)
        wanted = dict(expected(remove_duplicate=False))
        assert tensors.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert tensors[name].dtype == tensor.dtype, name
            assert torch.equal(tensors[name], tensor), name
    assert not any(child.training for child in ours.modules())
    assert type(ours) is type(theirs)
    config: Any = ours.config
    assert config._attn_implementation == theirs.config._attn_implementation
