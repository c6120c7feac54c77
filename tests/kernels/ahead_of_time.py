"""What each Triton kernel takes of a GPU's multiprocessor, compiled here for GPUs that are not.

python -m tests.kernels.ahead_of_time prints the table that ahead_of_time.json holds: registers a
thread, bytes of its stack (spills), and bytes of shared memory a block.
"""

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from magicdec.kernels import (
    triton_attention,
    triton_gumbel,
    triton_largest,
    triton_linear,
    triton_mass,
    triton_merge,
    triton_rotary,
    triton_steps,
    triton_view,
    triton_view_columns,
)
from magicdec.kernels.triton_tiles import choose_num_warps

ARCHITECTURES = (80, 90)
# Of a block's shared memory: CUDA C programming guide, compute capabilities.
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10}
TABLE = Path(__file__).with_name("ahead_of_time.json")

# By the end of a parameter's name; any other is a pointer to the dtype of the pages.
_TYPES = {
    "partial_output": "*fp32",
    "partial_lse": "*fp32",
    "lse": "*fp32",
    "mass": "*fp32",
    "best_values": "*fp64",
    "best_entries": "*i32",
    "keys": "*i64",
    "distances": "*i64",
    "slots": "*i64",
    "steps": "*i32",
    "slot_mapping": "*i64",
    "sequences": "*i32",
    "row_starts": "*i32",
    "query_lens": "*i32",
    "context_lens": "*i32",
    "block_tables": "*i32",
    "table": "*i32",
    "scaling": "fp32",
    "softcap": "fp32",
    "epsilon": "fp32",
}
_ALIGNED = ("_head_stride", "_row_stride", "num_inputs", "num_outputs")
_INTEGERS = ("_stride", "batch", "step", "window", "first_block", "split_keys")


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    most_registers: int | None = None
    types: dict[str, str] = field(default_factory=dict)  # that differ from _TYPES


def variants() -> list[Variant]:
    found: list[Variant] = []
    for head_dim in (64, 128, 256):
        shape = {
            "GROUP_SIZE": 4,
            "HEAD_DIM": head_dim,
            "HAS_SOFTCAP": False,
            "PRECISION": "tf32",
            "BLOCK_N": 64,
            "BLOCK_D": head_dim,
        }
        paged = {**shape, "BLOCK_SIZE": 64, "HAS_WINDOW": False, "MIN_SPLIT": 256}
        paged |= {"MOST_SPLITS": 32}
        for block_m in (16, 32, 128):
            constants = {**paged, "IS_SPLIT": True, "BLOCK_M": block_m}
            name = f"attend, {block_m} rows, head of {head_dim}"
            num_warps = choose_num_warps(block_m, head_dim)
            found.append(Variant(name, triton_attention._attend, constants, num_warps))
        chunk = {**paged, "IS_SPLIT": False, "BLOCK_M": 64}
        name = f"attend a chunk, head of {head_dim}"
        num_warps = choose_num_warps(64, head_dim)
        found.append(Variant(name, triton_attention._attend, chunk, num_warps))
        if head_dim == 256:
            continue
        view = {**shape, "SPLIT_KEYS": 128, "BLOCK_M": 16, "BLOCK_OWN": 16}
        name = f"attend a view, head of {head_dim}"
        found.append(Variant(name, triton_view._attend_listed, view, num_stages=2))
        merge = {"HEAD_DIM": head_dim, "BLOCK_S": 32, "BLOCK_D": head_dim}
        name = f"merge 32 splits, head of {head_dim}"
        types = {"rows": "*i32"}
        found.append(Variant(name, triton_merge.merge_splits, merge, types=types))
        mass = {**shape, "BLOCK_SIZE": 64, "BLOCK_M": 32}
        name = f"row lse, head of {head_dim}"
        found.append(Variant(name, triton_mass._row_lse, mass))
        found.append(Variant(f"key mass, head of {head_dim}", triton_mass._key_mass, mass))
    listed = {"sequences": "*i64", "layers": "*i32"}
    constants = {"BLOCK_SIZE": 64, "BLOCK": 256}
    kernel = triton_view_columns._list_columns
    found.append(Variant("list a view's columns", kernel, constants, types=listed))
    found.append(_largest())
    scores = {"scores": "*fp32"}
    found.append(Variant("choose", triton_gumbel._choose, {"BLOCKS": 128}, types=scores))
    for has_residual, name in ((False, "rms norm of 4096"), (True, "sum and rms norm of 4096")):
        norm = {"HAS_RESIDUAL": has_residual, "BLOCK": 4096}
        found.append(Variant(name, triton_steps._rms_norm, norm))
    for has_norms, name in ((False, "rotate"), (True, "norm and rotate")):
        rotation = {"HAS_NORMS": has_norms, "HEAD_DIM": 128, "BLOCK": 64}
        found.append(Variant(name, triton_rotary._rotate, rotation, num_warps=1))
        kernel = triton_rotary._rotate_and_store
        found.append(Variant(f"{name} and store", kernel, rotation, num_warps=1))
    stored = {"HEAD_DIM": 128, "BLOCK": 128}
    found.append(Variant("store", triton_rotary._store_kv, stored, num_warps=1))
    found.append(Variant("silu product", triton_steps._silu_product, {"BLOCK": 1024}))
    return found + _linears()


def _largest() -> Variant:
    types = {"bits": "*i32", "taken_keys": "*i32", "taken": "*i32", "width": "i32"}
    return Variant(
        "the largest of rows",
        triton_largest._take_largest,
        triton_largest.CONSTANTS,
        num_warps=triton_largest.NUM_WARPS,
        most_registers=triton_largest.MOST_REGISTERS,
        types=types,
    )


def _linears() -> list[Variant]:
    found = []
    for block_m, num_warps in triton_linear.NUM_WARPS.items():
        tile = {
            "BLOCK_M": block_m,
            "BLOCK_N": triton_linear.BLOCK_N,
            "BLOCK_K": triton_linear.BLOCK_K,
        }
        num_stages = triton_linear.choose_num_stages(block_m, 2, SHARED_BYTES["sm_80"])
        options = (num_warps, num_stages)
        for has_bias, has_residual, name in (
            (False, False, "linear"),
            (True, False, "linear and bias"),
            (False, True, "linear and residual"),
        ):
            constants = {**tile, "HAS_BIAS": has_bias, "HAS_RESIDUAL": has_residual}
            case = (f"{name}, {block_m} rows", triton_linear._linear, constants)
            found.append(Variant(*case, *options))
        gated = (f"gated linear, {block_m} rows", triton_linear._gated_linear)
        found.append(Variant(*gated, {**tile, "HAS_BIAS": False}, *options))
    return found


def measure(variant: Variant, architecture: int) -> dict[str, int]:
    names = variant.kernel.arg_names
    types = {name: _type(name, variant) for name in names}
    aligned = [i for i, name in enumerate(names) if _is_aligned(name, types[name])]
    constants = dict(variant.constants)
    if "IS_EARLY" in names:
        constants["IS_EARLY"] = architecture >= 90
    source = ASTSource(
        variant.kernel,
        types,
        constants,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if variant.most_registers is not None:
        options["maxnreg"] = variant.most_registers
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


def _is_aligned(name: str, type_name: str) -> bool:
    """As triton finds tensors, strides of whole heads and sizes of matrices when it compiles at a
    launch."""
    return type_name.startswith("*") or name.endswith(_ALIGNED)


def _type(name: str, variant: Variant) -> str:
    if name in variant.constants or name == "IS_EARLY":
        return "constexpr"
    if name in variant.types:
        return variant.types[name]
    if name in _TYPES:
        return _TYPES[name]
    if name.startswith("num_") or name.endswith(_INTEGERS):
        return "i32"
    return "*bf16"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, as the assembler wrote them down."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])


def table() -> dict[str, dict[str, int]]:
    return {
        f"sm_{architecture}: {variant.name}": measure(variant, architecture)
        for variant in variants()
        for architecture in ARCHITECTURES
    }


if __name__ == "__main__":
    print(json.dumps(table(), indent=1))
