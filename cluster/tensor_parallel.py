"""One rank's shard of a model: join the ranks, split with DeepSpeed AutoTP, read only the shard.

    meta model (shapes only) -> init_inference -> local shapes -> this rank's slices of the files
      its head (shapes only) -------> this rank's rows -----^

DeepSpeed's own checkpoint loader is not used: it knows norms by a list of class names and leaves
those it does not know (Gemma's) unset. Here the ranks tell one another their local shapes, which
gives every slice, and each rank reads its bytes alone from the safetensors files.
"""

import contextlib
import io
import logging
from datetime import timedelta
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import SubParamColumnParallel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from magicdec.checkpoint import Bounds, Checkpoint, Shape, parameters_on_meta
from magicdec.cluster.placement import Rendezvous
from magicdec.cluster.vocabulary_head import SplitHead
from magicdec.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_SECONDS = 300.0


class ShardError(RuntimeError):
    """The shards of the ranks do not make up the checkpoint. Names the parameter."""


def join_process_group(
    rendezvous: Rendezvous, timeout_seconds: float = JOIN_TIMEOUT_SECONDS
) -> None:
    """Blocks until every rank has joined; `rendezvous.environment()` must be set already.

    Raises RuntimeError when a rank has not joined in time. The timeout holds for every later
    collective too, so it allows for a rank that loads slowly: that a peer died is known by its
    closed sockets, not by this.
    """
    # DeepSpeed's shared-memory all-reduce spins for ever when a peer dies, and compiles itself at
    # start-up; gloo raises within milliseconds.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if rendezvous.use_gpu else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_seconds),
    )


def load_shard(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Vocabulary]:
    """This rank's share of the model in `folder`, on the rank's device, in evaluation mode; and
    which part of the vocabulary its logits are of.

    Every rank calls it together, after join_process_group. Reads this rank's slices only where the
    safetensors files hold the module's parameters by name and nothing else; otherwise (experts
    that transformers fuses on loading, stored buffers) loads all, splits it, and logs so.
    Raises ShardError where the shards do not tile a parameter.
    """
    model_config = AutoConfig.from_pretrained(folder)
    with parameters_on_meta():
        meta_module = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    checkpoint = Checkpoint.index(folder, meta_module)
    reason = checkpoint.why_not_by_name
    if reason is None:
        module, vocabulary = _shard(meta_module, dtype)
        reason = _why_not_contiguous(module)
        if reason is None:
            _read_slices(module, checkpoint)
            return module.eval(), vocabulary
    logger.warning("rank loads the whole model before splitting it: %s", reason)
    return _load_whole(folder, dtype)


def _load_whole(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Vocabulary]:
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    sharded, vocabulary = _shard(module, dtype)
    return sharded.eval(), vocabulary


def _shard(module: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, Vocabulary]:
    """AutoTP in place, but for the head. Buffers keep their values and dtype.

    DeepSpeed would cast them to the model's dtype (rotary frequencies in bf16 lose positions
    beyond a few hundred) and leave a meta model's unset.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    head = SplitHead.detach(module, dist.get_world_size(), dist.get_rank())
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its policy on every rank
        sharded: nn.Module = deepspeed.init_inference(
            module,
            tensor_parallel={"tp_size": dist.get_world_size()},
            dtype=dtype,
            replace_with_kernel_inject=False,
        ).module
    for name, buffer in buffers.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = sharded.get_submodule(owner_name)
        owner._buffers[leaf] = buffer.to(next(sharded.parameters()).device)
    head.attach(sharded)
    return sharded, head.vocabulary


def _why_not_contiguous(module: nn.Module) -> str | None:
    """Packed weights (gate and up in one) are cut in pieces: a rank's share is no single slice."""
    for name, child in module.named_modules():
        if isinstance(child, SubParamColumnParallel):
            return f"{name} packs several weights in one"
    return None


def _read_slices(module: nn.Module, checkpoint: Checkpoint) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    local = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    shapes: list[dict[str, Shape] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, local)
    by_rank = [shape for shape in shapes if shape is not None]
    with torch.no_grad():
        for name, stored in checkpoint.tensors():
            bounds = slice_bounds(
                name, [shape[name] for shape in by_rank], stored.shape, dist.get_rank()
            )
            if all(stop > start for start, stop in bounds):
                parameters[name].copy_(stored.read(bounds))


def slice_bounds(name: str, shapes: list[Shape], full: Shape, rank: int) -> Bounds:
    """(start, stop) on each axis of the full tensor, given the shape that every rank holds.

    An axis is either whole on all ranks or cut, in rank order. Raises ShardError where the cuts
    do not make up the axis, or where more than one is cut.
    """
    if any(len(shape) != len(full) for shape in shapes):
        raise ShardError(f"{name}: shards {shapes} of a parameter of shape {full}")
    bounds = []
    cut = 0
    for axis, size in enumerate(full):
        sizes = [shape[axis] for shape in shapes]
        if set(sizes) == {size}:
            bounds.append((0, size))
            continue
        start = sum(sizes[:rank])
        cut += 1
        if sum(sizes) != size or cut > 1:
            raise ShardError(f"{name}: shards {shapes} do not tile the shape {full}")
        bounds.append((start, start + sizes[rank]))
    return bounds
