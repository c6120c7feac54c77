"""Accelerators by their data sheets, and what of these figures a forward is expected to reach."""

from dataclasses import dataclass

from magicdec.config import MEMORY_SHARE, ConfigError
from magicdec.roofline import Device

BANDWIDTH_REACHED = 0.8  # of the data sheet, by reading weights and K/V
ARITHMETIC_REACHED = 0.6  # of the data sheet's dense rate, by the linears

# Host and launches, replayed as graphs: 1 ms for 32 layers. An assumption.
LAYER_SECONDS = 30e-6

# One all-reduce of a decode step, what goes with it in a layer included: what is left of the draft
# steps at batch 32 of MagicDec's Tables 1, 3 and 6 (arXiv 2408.11049) after weights, K/V and
# LAYER_SECONDS. A layer has two. Larger batches take longer, on A100 twice as long at 128.
_NVLINK_HOPPER = 30e-6
_NVLINK_AMPERE = 75e-6
_PCIE = 160e-6

_TERA = 1e12


@dataclass(frozen=True, slots=True)
class DataSheet:
    """What the vendor states, without sparsity. A GB there counts as 10^9 bytes."""

    name: str
    description: str
    bandwidth: float  # bytes a second
    tensor_flops: float  # bf16 or fp16, accumulated in fp32
    float32_flops: float  # not TF32, whose products are no longer fp32's
    memory_bytes: float
    all_reduce_seconds: float
    source: str


def _gpu(
    name: str, description: str, figures: tuple[float, float, float, int], link: float, source: str
) -> DataSheet:
    """`figures`: TB/s, TFLOP/s in bf16 and in fp32, GB."""
    bandwidth, tensor, float32, memory = figures
    return DataSheet(
        name,
        description,
        bandwidth * _TERA,
        tensor * _TERA,
        float32 * _TERA,
        memory * 1e9,
        link,
        f"NVIDIA {source}",
    )


_HOPPER = "H100 data sheet"
_AMPERE = "A100 data sheet"
_SHEETS = (
    _gpu("b200", "B200 (HGX)", (8.0, 2250, 80, 180), _NVLINK_HOPPER, "Blackwell brief, DGX B200"),
    _gpu("h200", "H200 SXM", (4.8, 989.4, 67, 141), _NVLINK_HOPPER, "H200 data sheet"),
    _gpu("h100", "H100 SXM 80 GB", (3.35, 989.4, 67, 80), _NVLINK_HOPPER, _HOPPER),
    _gpu("h100-nvl", "H100 NVL 94 GB", (3.9, 835.5, 60, 94), _NVLINK_HOPPER, _HOPPER),
    _gpu("h100-pcie", "H100 PCIe 80 GB", (2.0, 756, 51, 80), _PCIE, _HOPPER),
    _gpu("a100-80g", "A100 SXM 80 GB", (2.039, 312, 19.5, 80), _NVLINK_AMPERE, _AMPERE),
    _gpu("a100-40g", "A100 SXM 40 GB", (1.555, 312, 19.5, 40), _NVLINK_AMPERE, _AMPERE),
    _gpu("l40s", "L40S", (0.864, 362.05, 91.6, 48), _PCIE, "L40S data sheet"),
    _gpu("l40", "L40", (0.864, 181.05, 90.5, 48), _PCIE, "L40 data sheet"),
    _gpu("l4", "L4", (0.3, 121, 30.3, 24), _PCIE, "L4 data sheet"),
    _gpu("a10", "A10", (0.6, 125, 31.2, 24), _PCIE, "A10 data sheet"),
    _gpu("rtx-4090", "GeForce RTX 4090", (1.008, 165.2, 82.6, 24), _PCIE, "Ada whitepaper"),
)
DATA_SHEETS = {sheet.name: sheet for sheet in _SHEETS}


@dataclass(frozen=True, slots=True)
class PlanDevice:
    """One accelerator as the plan takes it: the rates it sustains, and what a layer adds."""

    name: str
    bandwidth: float  # bytes a second
    arithmetic: float  # floating-point operations a second, in the dtype of the linears
    usable_bytes: float  # for weights and K/V
    layer_seconds: float = LAYER_SECONDS
    all_reduce_seconds: float = _NVLINK_HOPPER
    origin: str = "as given"  # of the figures, for people
    overhead_origin: str = "assumed, with launches replayed as graphs"

    def __post_init__(self) -> None:
        for name, value in (("usable_bytes", self.usable_bytes), *self._rates()):
            if not 0.0 < value < float("inf"):
                raise ConfigError(f"{name} must be finite and above 0, got {value}")
        for name, value in (
            ("layer_seconds", self.layer_seconds),
            ("all_reduce_seconds", self.all_reduce_seconds),
        ):
            if not 0.0 <= value < float("inf"):
                raise ConfigError(f"{name} must be finite and at least 0, got {value}")

    def fixed_seconds(self, num_layers: int, num_ranks: int) -> float:
        """Of a forward, whatever its size."""
        layer = self.layer_seconds
        if num_ranks > 1:
            layer += 2 * self.all_reduce_seconds
        return num_layers * layer

    def rates(self, num_layers: int, num_ranks: int) -> Device:
        """For the roofline of one model."""
        fixed = self.fixed_seconds(num_layers, num_ranks)
        return Device(self.bandwidth, self.arithmetic, int(self.usable_bytes), fixed)

    def _rates(self) -> tuple[tuple[str, float], ...]:
        return (("bandwidth", self.bandwidth), ("arithmetic", self.arithmetic))


def known_device(name: str, dtype: str) -> PlanDevice:
    """What is expected of a device in the table. Raises ConfigError that lists the known ones."""
    sheet = DATA_SHEETS.get(name.lower())
    if sheet is None:
        raise ConfigError(f"gpu must be one of {', '.join(DATA_SHEETS)} or this, got {name!r}")
    flops = sheet.float32_flops if dtype == "float32" else sheet.tensor_flops
    return PlanDevice(
        name=sheet.name,
        bandwidth=BANDWIDTH_REACHED * sheet.bandwidth,
        arithmetic=ARITHMETIC_REACHED * flops,
        usable_bytes=MEMORY_SHARE * sheet.memory_bytes,
        all_reduce_seconds=sheet.all_reduce_seconds,
        origin=f"{sheet.description}: {BANDWIDTH_REACHED:.0%}, {ARITHMETIC_REACHED:.0%} and "
        f"{MEMORY_SHARE:.0%} of the data sheet",
    )
