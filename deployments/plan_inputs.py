"""What a plan is asked, from the words of a command line: lists, a model's config, a device."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from magicdec.compute_dtype import compute_dtype, weight_element_bytes
from magicdec.config import DTYPES, MEMORY_SHARE, ConfigError
from magicdec.deployments.embedded_model import resolve_model
from magicdec.planning.devices import PlanDevice, known_device
from magicdec.planning.memory import PlanModel
from magicdec.profiling.device_rates import measure_device
from magicdec.roofline import ModelGeometry

THIS = "this"
GIVEN = "given figures"
_NUMBER = re.compile(r"(\d+)(k?)", re.IGNORECASE)


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """ "2048,32k": k is 1,024. Raises ConfigError."""
    found = [_NUMBER.fullmatch(part.strip()) for part in text.split(",")]
    if not all(found):
        raise ConfigError(f"{name} must be whole numbers parted by commas, got {text!r}")
    return tuple(int(m[1]) * (1024 if m[2] else 1) for m in found if m is not None)


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Raises ConfigError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{name} must be numbers parted by commas, got {text!r}") from error


def read_model(name: str, dtype: str, *, on_this_machine: bool = False) -> PlanModel:
    """The shape of a model: a folder, a config.json, the embedded model, or a hub id whose config
    is in the local cache. Nothing is downloaded and no weights are read.

    Raises ConfigError, and ModelNotFoundError for a path that is neither.
    """
    kv = _torch_dtype(dtype).itemsize
    weights = weight_element_bytes(dtype, _torch_device()) if on_this_machine else kv
    config = read_config(name)
    try:
        geometry = ModelGeometry.from_config(
            config,
            weight_element_bytes=weights,
            kv_element_bytes=kv,
        )
    except ValueError as error:
        raise ConfigError(f"model {name}: {error}") from error
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"model {name}: no dense decoder with gated MLPs, as far as its config says: {error}"
        ) from error
    sizes = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, geometry.num_weights)
    if min(sizes) < 1:
        raise ConfigError(f"model {name}: layers, heads and sizes must be at least 1")
    fields = vars(config.get_text_config())
    return PlanModel(
        name=Path(name).parent.name if name.endswith("/config.json") else Path(name).name,
        geometry=geometry,
        tied_head=bool(fields.get("tie_word_embeddings")),
        max_context=fields.get("max_position_embeddings"),
    )


def read_config(name: str) -> PreTrainedConfig:
    """Raises ConfigError where there is none, or none that transformers knows."""
    path = Path(name).expanduser()
    found = str(path) if path.is_file() else resolve_model(name)
    options: dict[str, Any] = {} if Path(found).exists() else {"local_files_only": True}
    try:
        with _quiet():
            config: PreTrainedConfig = AutoConfig.from_pretrained(found, **options)
    except OSError as error:
        if options:
            raise ConfigError(
                f"model {name!r} has no config in the local cache; give a folder or its config.json"
            ) from error
        raise ConfigError(f"cannot read {found}: {_first_line(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read {found}: {_first_line(error)}") from error
    return config


def split_notes(name: str, model: PlanModel, num_ranks: int) -> tuple[str, ...]:
    """What the engine says of the split. Raises ConfigError where it would refuse it."""
    if num_ranks == 1:
        return ()
    from magicdec.attention import UnsupportedModel
    from magicdec.cluster.preflight import preflight  # DeepSpeed: seconds

    config = read_config(name)
    try:
        with _quiet():
            notes = preflight(config, num_ranks).warnings
    except UnsupportedModel as error:
        raise ConfigError(f"tensor_parallel_size {num_ranks}: {error}") from error
    if num_ranks in model.even_degrees:
        return notes
    even = ", ".join(str(n) for n in model.even_degrees)
    return (*notes, f"tensor_parallel_size {even} split the heads evenly")


def is_this_machine(gpu: str | None, figures: dict[str, float | None]) -> bool:
    """Whether read_device would measure: asked to, or told neither a GPU nor all of its figures."""
    if gpu is not None:
        return gpu.lower() == THIS
    return None in (figures["bandwidth"], figures["flops"], figures["memory"])


def read_device(
    gpu: str | None, dtype: str, figures: dict[str, float | None], num_layers: int
) -> PlanDevice:
    """The device in the table, this machine's, or the figures given; these win over the others.

    `figures`: bandwidth in GB/s, flops in TFLOP/s, memory in GB, overhead_ms of a forward; None
    where not given. Raises ConfigError.
    """
    scales = {"bandwidth": 1e9, "flops": 1e12, "memory": 1e9, "overhead_ms": 1e-3}
    units = {"bandwidth": "GB/s", "flops": "TFLOP/s", "memory": "GB", "overhead_ms": "ms"}
    for name, value in figures.items():
        if value is not None and not (0.0 if name == "overhead_ms" else 1e-9) <= value < 1e9:
            least = "at least 0" if name == "overhead_ms" else "above 0"
            raise ConfigError(f"{name} must be {least} and below 1e9 {units[name]}, got {value:g}")
    given = {name: value * scales[name] for name, value in figures.items() if value is not None}
    rates = {name: given[name] for name in ("bandwidth", "flops", "memory") if name in given}
    if is_this_machine(gpu, figures):
        device = _this_device(dtype)
    elif gpu is not None:
        device = known_device(gpu, dtype)
    else:
        device = PlanDevice(GIVEN, rates["bandwidth"], rates["flops"], rates["memory"])
    if rates and device.name != GIVEN:
        device = replace(device, origin=f"{device.origin}; {', '.join(rates)} as given")
    device = replace(
        device,
        bandwidth=given.get("bandwidth", device.bandwidth),
        arithmetic=given.get("flops", device.arithmetic),
        usable_bytes=given.get("memory", device.usable_bytes),
    )
    if "overhead_ms" not in given:
        return device
    return replace(
        device,
        layer_seconds=given["overhead_ms"] / num_layers,
        all_reduce_seconds=0.0,
        overhead_origin="as given",
    )


def _this_device(dtype: str) -> PlanDevice:
    where = _torch_device()
    computes = compute_dtype(dtype, where)
    measured = measure_device(where, computes, weight_element_bytes(dtype, where))
    return PlanDevice(
        name=measured.name,
        bandwidth=measured.rates.bandwidth,
        arithmetic=measured.rates.arithmetic,
        usable_bytes=MEMORY_SHARE * measured.rates.memory_bytes,
        origin=f"measured here, {MEMORY_SHARE:.0%} of the memory",
    )


def _torch_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _torch_dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of libraries, which a plan has nothing to do with."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        transformers_logging.set_verbosity(verbosity)
