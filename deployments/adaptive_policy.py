"""The policy of an engine that chooses its drafts: this machine's profile and the controller."""

import logging

from transformers import AutoConfig

from magicdec.config import AdaptiveConfig, ConfigError, EngineConfig
from magicdec.control.profiled_costs import ProfiledRoundCosts
from magicdec.control.round_policy import AdaptivePolicy
from magicdec.deployments.cache_folder import cache_folder
from magicdec.executor import Executor
from magicdec.profiling.profile import profile_executor
from magicdec.profiling.profile_cache import ProfileKey, cached_profile
from magicdec.profiling.profile_samples import Hardware, profile_kinds
from magicdec.profiling.step_profile import StepProfile
from magicdec.roofline import ModelGeometry

logger = logging.getLogger(__name__)

_KV_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def build_policy(
    config: EngineConfig, adaptive: AdaptiveConfig, executor: Executor, max_model_len: int
) -> AdaptivePolicy:
    """Times this machine's steps, for some seconds, where no profile of it is kept.

    Raises ConfigError for a model whose steps cannot be modelled.
    """
    device = executor.measure_device()
    kv_bytes = _KV_ELEMENT_BYTES[config.model.dtype]
    weight_bytes = device.weight_element_bytes
    geometry = _geometry(config.model.path, weight_bytes, kv_bytes)
    draft = config.speculation.draft_model
    draft_geometry = None if draft is None else _geometry(draft.path, weight_bytes, kv_bytes)

    def build() -> StepProfile:
        logger.warning("timing this machine's steps once, for some seconds, to choose drafts by")
        hardware = Hardware(geometry, device.rates, draft_geometry)
        return profile_executor(executor, config, max_model_len, hardware)

    profile = cached_profile(
        cache_folder() / "profiles",
        ProfileKey.of(config, device, executor.attention_backend),
        profile_kinds(config),
        build,
    )
    costs = ProfiledRoundCosts(profile, geometry, config.speculation)
    return AdaptivePolicy(config.speculation, adaptive, costs)


def _geometry(path: str, weight_bytes: int, kv_bytes: int) -> ModelGeometry:
    try:
        return ModelGeometry.from_config(
            AutoConfig.from_pretrained(path),
            weight_element_bytes=weight_bytes,
            kv_element_bytes=kv_bytes,
        )
    except ValueError as error:
        raise ConfigError(
            f"draft_length must be a number for {path}, got auto: its steps cannot be modelled, "
            f"{error}"
        ) from error
