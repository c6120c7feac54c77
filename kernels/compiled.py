"""The kernels in C++: compiled once on a machine, kept, and loaded from there."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

logger = logging.getLogger(__name__)

_SOURCE_FOLDER = Path(__file__).resolve().parent / "cpu"
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    *("-std=c++20", "-fPIC"),
)
_MOST_SAID = 500  # characters of a compiler's complaint


class CompileError(RuntimeError):
    """There is no compiler here, or it refuses; the message says what it said."""


@functools.cache
def compiled_library() -> ctypes.CDLL | None:
    """Kept where torch keeps what it compiles (TORCH_EXTENSIONS_DIR, or the user's cache).

    None, and a warning, where there is no compiler or it fails.
    """
    try:
        return load_compiled(Path(cpp_extension.get_default_build_root()))
    except CompileError as error:
        logger.warning("no compiled CPU kernels, torch's take longer: %s", error)
        return None


def load_compiled(folder: Path) -> ctypes.CDLL:
    """The library of kernels/cpu, compiled into `folder` unless it lies there already.

    Its name tells sources, flags, torch and processor, so a folder may be shared by machines. Two
    processes that compile at once do so apart; the later one's library replaces an equal one.
    Raises CompileError.
    """
    library = folder / f"magicdec_cpu_{_digest()}.so"
    if library.exists():
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            logger.warning("%s is damaged and compiled anew: %s", library, error)
    started = time.perf_counter()
    logger.info("compiling the CPU kernels, once on this machine")
    _compile(library)
    logger.info("compiled the CPU kernels in %.0f s", time.perf_counter() - started)
    return ctypes.CDLL(str(library))


def sources_digest() -> str:
    """Of what is compiled, whether it can be or not."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCE_FOLDER.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _digest() -> str:
    digest = hashlib.sha256(sources_digest().encode())
    for fact in (*_FLAGS, torch.__version__, platform.machine(), _processor_flags()):
        digest.update(fact.encode())
    return digest.hexdigest()[:16]


def _processor_flags() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(library: Path) -> None:
    """The compiler that torch's extension loader would call, without that loader: it wants ninja on
    the path, and its lock outlives a process that is killed."""
    compiler = str(cpp_extension.get_cxx_compiler())  # type: ignore[no-untyped-call]

    def run(*arguments: Path | str) -> None:
        command = [compiler, *_FLAGS, *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            sources = sorted(_SOURCE_FOLDER.glob("*.cpp"))
            objects = [Path(folder) / f"{source.stem}.o" for source in sources]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                pairs = zip(sources, objects, strict=True)
                list(pool.map(lambda pair: run("-c", pair[0], "-o", pair[1]), pairs))
            built = Path(folder) / library.name
            run("-shared", *objects, "-o", built)
            os.replace(built, library)
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{compiler} failed: {error.stderr.strip()[:_MOST_SAID]}") from error
    except OSError as error:
        raise CompileError(str(error)) from error
