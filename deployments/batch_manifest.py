"""The manifest beside an output: the settings that its answers depend on."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magicdec.deployments.batch_answered import OutputError

FORMAT = 1


def manifest_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.manifest.json")


@dataclass(frozen=True, slots=True)
class Manifest:
    """`answers`: what, if it were otherwise, would make other answers; how fast they come (drafts,
    ranks, replicas, the size of the cache) is not in it, so a job may go on elsewhere. `run` is for
    people."""

    answers: dict[str, Any]
    run: dict[str, Any]

    def differences(self, other: "Manifest") -> list[str]:
        """One line a setting, `self` being the older."""
        names = sorted(self.answers.keys() | other.answers.keys())
        return [
            f"{name} was {self.answers.get(name)!r}, now {other.answers.get(name)!r}"
            for name in names
            if self.answers.get(name) != other.answers.get(name)
        ]

    def write(self, path: Path) -> None:
        """All of it or nothing. Raises OutputError."""
        partial = path.with_name(f".{path.name}.partial")
        document = {"format": FORMAT, "answers": self.answers, "run": self.run}
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error


def read_manifest(path: Path) -> Manifest | None:
    """None where there is none. Raises OutputError for one that cannot be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise OutputError(f"{path}: format must be {FORMAT}, got {document['format']!r}")
        return Manifest(dict(document["answers"]), dict(document["run"]))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is not a manifest of this command: {error!r}") from error


def check_manifest(output: Path, wanted: Manifest, *, force: bool) -> None:
    """Raises OutputError for an output that other settings made, or that is none of ours, unless
    that is `force`d."""
    if force:
        return
    found = read_manifest(manifest_path(output))
    if found is None and (not output.exists() or output.stat().st_size == 0):
        return
    if found is None:
        raise OutputError(
            f"{output} exists and has no {manifest_path(output).name} beside it: choose another "
            "output, or --force to go on with it"
        )
    differences = found.differences(wanted)
    if differences:
        raise OutputError(
            f"{output} was made by other settings: {'; '.join(differences)}; choose another "
            "output, or --force to go on with these"
        )
