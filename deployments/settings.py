"""The server's settings: where YAML and the command line enter, checked once, then frozen."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from magicdec.config import (
    CacheConfig,
    ConfigError,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from magicdec.deployments.cache_settings import CacheSettings
from magicdec.deployments.engine_settings import (
    ModelSettings,
    ParallelSettings,
    SchedulerSettings,
    Section,
    SpeculationSettings,
)
from magicdec.routing.settings import AdmissionConfig

_ADMISSION = AdmissionConfig()  # one source of defaults


class SettingsError(ValueError):
    """A settings file or flag that cannot be used; the message is one line for a person."""


class StartFailed(RuntimeError):
    """The application did not become ready; the message is one line for a person."""


class AutoscalingSettings(Section):
    """See autoscaling.py; Serve's controller applies bounds and delays."""

    min_replicas: int = Field(default=1, ge=1, description="Replicas that are always there.")
    max_replicas: int = Field(default=1, ge=1, description="The most replicas.")
    target_kv_usage: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="To which share KV pools are to be filled by all that is in flight and queued.",
    )
    look_back_s: float = Field(
        default=20.0, gt=0, description="Over how many seconds tokens are averaged."
    )
    upscale_delay_s: float = Field(
        default=10.0, ge=0, description="How long more must be wanted before replicas are added."
    )
    downscale_delay_s: float = Field(
        default=600.0, ge=0, description="How long fewer must be wanted before they drain."
    )

    @model_validator(mode="after")
    def _in_order(self) -> "AutoscalingSettings":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas must be at least min_replicas ({self.min_replicas}), "
                f"got {self.max_replicas}"
            )
        return self


class ServerSettings(Section):
    host: str = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface."
    )
    port: int = Field(default=8000, ge=1, le=65535, description="TCP port of the HTTP endpoint.")
    num_replicas: int = Field(default=1, ge=1, description="Copies of the engine.")
    autoscaling: AutoscalingSettings | None = Field(
        default=None,
        description="Replicas by KV tokens instead of num_replicas: min_replicas, max_replicas, "
        "target_kv_usage, look_back_s, upscale_delay_s, downscale_delay_s; empty: num_replicas.",
    )
    num_ingress_replicas: int = Field(
        default=1, ge=1, description="Processes that validate, tokenize and stream."
    )
    max_queued_requests: int = Field(
        default=256,
        ge=1,
        description="Requests that may wait for an engine, over all replicas; more get 429.",
    )
    company_wait_s: float = Field(
        default=_ADMISSION.company_wait_s,
        description="How long a request waits for others of its length to start with; never while "
        "a replica idles.",
    )
    age_bound_s: float = Field(
        default=_ADMISSION.age_bound_s,
        description="A request that has waited so long goes before all others of its API key, "
        "whatever its length.",
    )
    length_classes: bool = Field(
        default=_ADMISSION.length_classes,
        description="Requests of like length (powers of two) start together, on the same replicas.",
    )
    prefix_affinity: bool = Field(
        default=_ADMISSION.prefix_affinity,
        description="A prompt goes to a replica that has computed its beginning.",
    )
    overload_factor: float = Field(
        default=_ADMISSION.overload_factor,
        description="How many times as busy as the least busy replica one may be that is chosen "
        "for a prompt's beginning or length.",
    )
    keep_alive_s: float = Field(
        default=5.0,
        gt=0,
        description="A stream that has been silent this long gets an SSE comment.",
    )
    drain_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="How long a replica that is taken away may finish its streams.",
    )
    drain_file: str | None = Field(
        default=None,
        description="Once this file is there, the replicas of its machine take nothing new.",
    )
    replica_wait_s: float = Field(
        default=60.0,
        gt=0,
        description="How long a request waits for a replica while none can take it.",
    )
    max_body_bytes: int = Field(
        default=16 << 20, ge=1024, description="Largest request body; larger ones get 413."
    )
    max_choices: int = Field(
        default=64, ge=1, description="Most prompts in one completion request."
    )
    api_keys_file: str | None = Field(
        default=None,
        description="File with one accepted API key a line; empty: no key is asked for.",
    )

    @model_validator(mode="after")
    def _one_number_of_replicas(self) -> "ServerSettings":
        if self.autoscaling is not None and "num_replicas" in self.model_fields_set:
            raise ValueError(
                "num_replicas must be empty where autoscaling is set, got both: "
                f"{self.num_replicas} and {self.autoscaling.min_replicas} to "
                f"{self.autoscaling.max_replicas}"
            )
        return self


class ServeSettings(Section):
    """Everything that `magicdec serve` can be told; the YAML file has these sections."""

    model: ModelSettings = Field(default_factory=ModelSettings, description="Which weights.")
    cache: CacheSettings = Field(default_factory=CacheSettings, description="The KV pool.")
    scheduler: SchedulerSettings = Field(
        default_factory=SchedulerSettings, description="How much one step may hold."
    )
    speculation: SpeculationSettings = Field(
        default_factory=SpeculationSettings, description="The draft."
    )
    parallel: ParallelSettings = Field(
        default_factory=ParallelSettings, description="How one replica is spread over ranks."
    )
    server: ServerSettings = Field(default_factory=ServerSettings, description="The HTTP side.")

    @model_validator(mode="after")
    def _engine_accepts(self) -> "ServeSettings":
        try:
            self.engine_config()
            self.admission_config()
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def model_paths(self) -> list[str]:
        """Every model that an engine loads."""
        draft_model = self.speculation.draft_model
        return [self.model.path, *([draft_model] if draft_model else [])]

    def admission_config(self) -> AdmissionConfig:
        """Raises ConfigError naming field, value and limit."""
        return AdmissionConfig(
            max_queued_requests=self.server.max_queued_requests,
            company_wait_s=self.server.company_wait_s,
            age_bound_s=self.server.age_bound_s,
            length_classes=self.server.length_classes,
            prefix_affinity=self.server.prefix_affinity,
            overload_factor=self.server.overload_factor,
        )

    def engine_config(self) -> EngineConfig:
        """Raises ConfigError naming field, value and limit."""
        return EngineConfig(
            model=ModelConfig(
                path=self.model.path,
                dtype=self.model.dtype,
                max_model_len=self.model.max_model_len,
            ),
            cache=CacheConfig(
                block_size=self.cache.block_size,
                kv_cache_bytes=self.cache.kv_cache_bytes,
                memory_share=self.cache.memory_share,
                num_blocks=self.cache.num_blocks,
                prefix_caching=self.cache.prefix_caching,
            ),
            scheduler=SchedulerConfig(**self.scheduler.model_dump()),
            speculation=self.speculation.config(),
            parallel=ParallelConfig(
                tensor_parallel_size=self.parallel.tensor_parallel_size,
                num_threads=self.parallel.num_threads,
            ),
        )


def parse_settings(values: dict[str, Any]) -> ServeSettings:
    """Raises SettingsError: one line a wrong field, with its value and limit."""
    try:
        return ServeSettings.model_validate(values)
    except ValidationError as error:
        lines = [_line(dict(e)) for e in error.errors(include_url=False)]
        raise SettingsError("; ".join(lines)) from error


def load_settings(path: str | None, overrides: dict[str, dict[str, Any]]) -> ServeSettings:
    """The YAML file at `path`, if any, with `overrides` (section -> field -> value) on top.

    Raises SettingsError when the file cannot be read or a field is wrong.
    """
    values = {} if path is None else _read_yaml(path)
    for section, fields in overrides.items():
        given = values.get(section) or {}
        values[section] = {**given, **fields} if isinstance(given, dict) else given
    return parse_settings(values)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise SettingsError(f"{path} is not YAML: {problem}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold sections such as 'model:', got {values!r}")
    return values


def _line(error: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if not field:  # from the engine's own config, which names field and value itself
        return message
    return f"{field}: {message} (got {error['input']!r})"
