"""What a processor multiplies in, and how wide the weights are that it reads."""

import ctypes
import logging
from typing import cast

import torch

from magicdec.kernels.compiled import compiled_library

logger = logging.getLogger(__name__)


def compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """What the linears run in: the configured dtype, or fp32 where the CPU lacks its arithmetic.

    Emulated bf16 products take five times as long as fp32 ones; the KV cache, which long contexts
    are bound by, stays in the configured dtype, and so do linears that are packed.
    """
    wanted = cast(torch.dtype, getattr(torch, dtype))
    units = {"bfloat16": ("amx_bf16", "avx512_bf16"), "float16": ("amx_fp16", "avx512_fp16")}
    if device.type != "cpu" or dtype not in units:
        return wanted
    capabilities = torch.cpu.get_capabilities()
    if any(capabilities.get(unit, False) for unit in units[dtype]):
        return wanted
    logger.info("no %s arithmetic on this CPU: linears run in float32, KV stays %s", dtype, dtype)
    return torch.float32


def weight_element_bytes(dtype: str, device: torch.device) -> int:
    """Of the linears of a model that is loaded so, as a forward reads them."""
    packed = packing_library(dtype, device) is not None
    return (torch.bfloat16 if packed else compute_dtype(dtype, device)).itemsize


def packing_library(dtype: str, device: torch.device) -> ctypes.CDLL | None:
    """What multiplies rows with packed bf16 weights, where a bfloat16 model is computed so: fp32
    rows, or bf16 ones where the processor multiplies pairs of them, or has matrix units.

    None: torch's linears serve, in fp32 where nothing can be compiled.
    """
    library = compiled_library() if device.type == "cpu" and dtype == "bfloat16" else None
    if library is None or compute_dtype(dtype, device) is torch.float32:
        return library
    return library if library.multiplies_narrow_rows() else None
