"""Profiles kept on disk, one file for each model on each machine.

A file is believed only where it says of itself what it was asked for and every number in it could
be true; otherwise it is measured again, and the log says which file was at fault and why.
"""

import fcntl
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from magicdec import __version__
from magicdec.config import EngineConfig
from magicdec.cost_model import VERIFY, CostModel, StepCost, StepShape
from magicdec.kernels.compiled import sources_digest
from magicdec.model_loader import resolve_checkpoint
from magicdec.profiling.device_rates import RankDevice
from magicdec.profiling.step_profile import StepProfile

logger = logging.getLogger(__name__)

_FORMAT = 2  # raised when what is written changes its meaning
_LEAST_SHAPES = 12  # of some 40; fewer, where a busy machine left no time, may be far off


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """Everything that step times depend on, and what was timed for."""

    model: str  # digest of its configuration
    dtype: str
    draft_model: str  # the same; empty: none
    device: str
    backend: str
    tensor_parallel_size: int
    num_threads: int
    settings: str  # those of the engine that change steps or what steps there are, as JSON
    versions: str

    @classmethod
    def of(cls, config: EngineConfig, device: RankDevice, attention_backend: str) -> "ProfileKey":
        """Reads the models' config.json. Raises OSError where there is none."""
        speculation, draft = config.speculation, config.speculation.draft_model
        settings = {
            "block_size": config.cache.block_size,
            **asdict(config.scheduler),
            **asdict(speculation.selection),
            "max_draft_length": speculation.max_draft_length,
            "max_draft_budget": speculation.max_draft_budget,
            "verification": speculation.verification,
            "draft_model_window": None if draft is None else draft.window,
        }
        return cls(
            model=config_digest(config.model.path),
            dtype=config.model.dtype,
            draft_model="" if draft is None else config_digest(draft.path),
            device=device.name,
            backend=attention_backend,
            tensor_parallel_size=config.parallel.tensor_parallel_size,
            num_threads=device.num_threads,
            settings=json.dumps(settings, sort_keys=True),
            versions=f"magicdec {__version__}, torch {torch.__version__}, {sources_digest()}",
        )

    @property
    def file_name(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return f"profile-{_digest(text.encode())}.json"


def cached_profile(
    folder: Path, key: ProfileKey, kinds: Collection[str], build: Callable[[], StepProfile]
) -> StepProfile:
    """The profile of that key, with a cost of all these kinds; built where the folder has none.

    Processes that want the same profile wait for the first of them: two that measure at once
    measure each other. A folder that cannot be written to costs a warning and the measurement.
    """
    path = folder / key.file_name
    with _alone(path.with_suffix(".lock")):
        profile = _read(path, key, kinds)
        if profile is None:
            profile = build()
            if (profile.num_shapes or 0) < _LEAST_SHAPES:
                logger.warning(
                    "profile %s is of %s shapes, fewer than %d, and may be far off: it will be "
                    "measured again at the next start", path, profile.num_shapes, _LEAST_SHAPES,
                )  # fmt: skip
            _write(path, key, profile)
    return profile


def read_profile(path: Path, model: str, kinds: Collection[str]) -> tuple[ProfileKey, StepProfile]:
    """A file as it is, on whatever machine it was measured; `model` is the folder of its model.

    Raises OSError, and ValueError saying what is wrong.
    """
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    found = content.get("key") if isinstance(content, dict) else None
    names = [field.name for field in fields(ProfileKey)]
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        raise ValueError("it is no profile: it has no key")
    key = ProfileKey(**found)
    if key.model != config_digest(model):
        raise ValueError(f"it is another model's than {model}")
    return key, _parse(text, key, kinds)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the system lets go when it dies. Without a lock where the folder is
    read-only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path, key: ProfileKey, kinds: Collection[str]) -> StepProfile | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("profile %s is measured again: it cannot be read: %s", path, error)
        return None
    try:
        return _parse(text, key, kinds)
    except (ValueError, OverflowError, RecursionError) as error:
        logger.warning("profile %s is measured again: %s", path, error)
        return None


def _parse(text: str, key: ProfileKey, kinds: Collection[str]) -> StepProfile:
    """Raises ValueError saying what is wrong; json's own errors are ones."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, no object")
    if content.get("format") != _FORMAT:
        raise ValueError(f"its format is {content.get('format')!r}, not {_FORMAT}")
    if content.get("key") != asdict(key):
        raise ValueError(f"it is another one's: {content.get('key')!r:.500}")
    costs, rows = content.get("costs"), content.get("row_seconds")
    if not isinstance(costs, dict) or not isinstance(rows, list):
        raise ValueError("it has no costs or no row_seconds")
    missing = sorted(set(kinds) - costs.keys())
    if missing:
        raise ValueError(f"it has no cost of {', '.join(missing)}")
    num_shapes = content.get("num_shapes")
    if type(num_shapes) is not int or num_shapes < _LEAST_SHAPES:
        raise ValueError(f"it was made of {num_shapes!r} shapes, fewer than {_LEAST_SHAPES}")
    profile = StepProfile(
        CostModel({kind: _parse_cost(kind, cost) for kind, cost in costs.items()}),
        tuple(_parse_row(row) for row in rows),
        num_shapes,
    )
    if not profile.seconds(VERIFY, StepShape(1, 0.0, 0.0, 1)) > 0.0:
        raise ValueError("a step takes no time in it")
    return profile


def _parse_cost(kind: str, content: Any) -> StepCost:
    names = [field.name for field in fields(StepCost)]
    if not isinstance(content, dict) or sorted(content) != sorted(names):
        raise ValueError(f"its cost of {kind} is not made of {', '.join(names)}")
    try:
        return StepCost(**{name: _number(content[name]) for name in names})
    except ValueError as error:
        raise ValueError(f"its cost of {kind}: {error}") from None


def _parse_row(content: Any) -> tuple[int, float]:
    if not isinstance(content, list) or len(content) != 2 or type(content[0]) is not int:
        raise ValueError(f"row_seconds holds {content!r}, not rows and seconds")
    return content[0], _number(content[1])


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _write(path: Path, key: ProfileKey, profile: StepProfile) -> None:
    """By one rename: nobody sees half a file."""
    content = {
        "format": _FORMAT,
        "key": asdict(key),
        "costs": {kind: asdict(cost) for kind, cost in profile.model.costs.items()},
        "row_seconds": profile.row_seconds,
        "num_shapes": profile.num_shapes,
    }
    try:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        logger.warning("profile %s is not kept: %s", path, error)


def config_digest(model: str) -> str:
    """Of its config.json. Raises OSError where there is none."""
    return _digest((resolve_checkpoint(model) / "config.json").read_bytes())


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()
