"""What the folders promise: links, layers, sizes, a complete wheel, an engine without Ray."""

import ast
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from magicdec.deployments.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("kernels", "cluster", "deployments")
SOURCES = ("magicdec", *SIBLINGS)
MAX_FILE_LINES = 260
ENGINE_MAY_IMPORT = {"magicdec", "numpy", "torch", "transformers"}
COMES_WITH_TRANSFORMERS = {"huggingface_hub", "safetensors", "tokenizers"}
ENGINE_MAY_USE_IF_PRESENT = {"flash_attn", "triton"}
ENGINE_MUST_DO_WITHOUT = [
    "deepspeed",
    "fastapi",
    "gguf",
    "grafana_api",
    "openai",
    "pydantic",
    "ray",
    "starlette",
    "uvicorn",
]


def source_files(*folders: str) -> list[Path]:
    """Real files only: a link is not followed, so each file comes once."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def engine_modules() -> list[str]:
    modules = []
    for path in source_files("magicdec", "kernels"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "magicdec" else ("magicdec", *parts)
        modules.append(".".join(p for p in parts if p != "__init__"))
    return modules


def run_python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SIBLINGS)
def test_link_resolves_to_its_sibling(name: str) -> None:
    link = ROOT / "magicdec" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", SIBLINGS)
def test_sibling_is_no_top_level_package(name: str) -> None:
    assert not list((ROOT / name).rglob("__init__.py"))


def test_another_package_named_kernels_is_not_shadowed(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'theirs'\n")
    code = f"""
        import sys
        sys.path.append({str(tmp_path)!r})  # after the root, which comes first with -c
        from kernels import get_kernel
        print(get_kernel)
    """
    assert run_python(code).strip() == "theirs"


@pytest.mark.parametrize("path", source_files(*SOURCES), ids=lambda p: str(p.relative_to(ROOT)))
def test_file_fits_in_the_head(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{num_lines} lines: split it by what changes together"


def imported_roots(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_engine_and_kernels_name_no_other_dependency() -> None:
    allowed = ENGINE_MAY_IMPORT | COMES_WITH_TRANSFORMERS | ENGINE_MAY_USE_IF_PRESENT
    allowed |= set(sys.stdlib_module_names)
    foreign = {
        (str(path.relative_to(ROOT)), root)
        for path in source_files("magicdec", "kernels")
        for root in imported_roots(path)
        if root not in allowed
    }
    assert not foreign


def test_engine_and_kernels_import_without_ray_deepspeed_or_http() -> None:
    code = f"""
        import importlib, sys
        from importlib.machinery import PathFinder

        ABSENT = {ENGINE_MUST_DO_WITHOUT!r}

        class Without(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                absent = name.partition(".")[0] in ABSENT
                return None if absent else PathFinder.find_spec(name, path, target)

        sys.meta_path[sys.meta_path.index(PathFinder)] = Without
        for name in {[*engine_modules(), "magicdec.engine"]!r}:
            importlib.import_module(name)
        assert not [name for name in ABSENT if name in sys.modules]
        print("imported")
    """
    assert run_python(code).strip() == "imported"


def test_wheel_holds_every_layer(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for folder in SOURCES:
        copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    run_python(
        f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})", cwd=tree
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"magicdec/py.typed"}
    for folder in SOURCES:
        prefix = "" if folder == "magicdec" else "magicdec/"
        files = [p for s in ("*.py", "*.json", "*.yaml") for p in (tree / folder).rglob(s)]
        expected |= {prefix + str(path.relative_to(tree)) for path in files}
    assert expected <= names
    assert {name.partition("/")[0] for name in names} == {"magicdec", wheel_metadata(names)}


def wheel_metadata(names: set[str]) -> str:
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    return metadata.partition("/")[0]


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
    assert sections.keys() == ServeSettings.model_fields.keys()
    for name, section in ServeSettings().model_dump().items():
        for field, default in section.items():
            rounded = round(default, 4) if isinstance(default, float) else default
            shown = "empty" if default is None else str(rounded)
            shown = shown.lower() if isinstance(default, bool) else shown
            assert f"| `{field}` | {shown} |" in sections[name]
