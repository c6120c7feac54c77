"""Plans of a well-known model, as its tests ask for them."""

from dataclasses import replace
from typing import Any

from magicdec.planning.devices import known_device
from magicdec.planning.memory import PlanModel
from magicdec.planning.plan import PlanRequest, draft_settings
from magicdec.roofline import ModelGeometry

LLAMA_31_8B = PlanModel(
    "llama-3.1-8b", ModelGeometry(32, 4096, 32, 8, 128, 14336, 128256), max_context=131072
)
LLAMA_31_70B = PlanModel(
    "llama-3.1-70b", ModelGeometry(80, 8192, 64, 8, 128, 28672, 128256), max_context=131072
)
LLAMA_32_1B = PlanModel(
    "llama-3.2-1b", ModelGeometry(16, 2048, 32, 8, 64, 8192, 128256), tied_head=True
)
SETTINGS = draft_settings(["recycled"], [512, 2048], [])


def request(**changes: Any) -> PlanRequest:
    """Llama-3.1-8B on one H100."""
    asked = PlanRequest(
        model=LLAMA_31_8B,
        device=known_device("h100", "bfloat16"),
        batch_sizes=(1, 8),
        context_lens=(2048, 32768),
        settings=SETTINGS,
    )
    return replace(asked, **changes)
