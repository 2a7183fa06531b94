"""Compiles every Triton kernel for one architecture, without a GPU; run by test_compilation.py.

The interpreter accepts what the compiler rejects. Besides the shapes of COMPILATIONS there are
variants: without the optional arguments, in other dtypes, at shapes that are not aligned.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.launch.bench_kernels.static.head_kernels import with_heads
from trainer.kernels.compilation import ENABLE_FP_FUSION, Compilation, compilations


def compile_kernel(compilation: Compilation, architecture: int) -> Any:
    """The compiled kernel; `architecture` is 90 for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(compilation.module), compilation.function)
    types, constants, divisible = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in compilation.constants:
            types[name], constants[index,] = "constexpr", compilation.constants[name]
            continue
        types[name] = compilation.signature[name]
        if types[name].startswith("*") or name in compilation.aligned:
            divisible[index,] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=divisible),
        target=GPUTarget("cuda", architecture, 32),
        options={
            "num_warps": compilation.num_warps,
            "num_stages": compilation.num_stages,
            "enable_fp_fusion": ENABLE_FP_FUSION,
        },
    )


def variants(compilation: Compilation) -> Iterator[Compilation]:
    """Other ways in which the same kernel is launched."""
    off = dict.fromkeys([name for name in compilation.constants if name.startswith("HAS_")], False)
    yield replace(compilation, constants={**compilation.constants, **off}, aligned=())
    for dtype in ("fp16", "fp32"):
        types = {name: t.replace("bf16", dtype) for name, t in compilation.signature.items()}
        yield replace(compilation, signature=types)
    if compilation.name == "rope.forward":
        partial = {**compilation.constants, "REST": 64, "BLOCK_HALF": 32, "POSITIONS": 2}
        yield replace(compilation, constants=partial)
    if compilation.name.startswith("gather_scale"):
        types = {
            **{name: t.replace("bf16", "fp64") for name, t in compilation.signature.items()},
            **dict.fromkeys(("row_scale", "column_scale"), "*fp64"),
            **dict.fromkeys(compilation.signature.keys() & {"columns"}, "*i64"),
            **dict.fromkeys(compilation.signature.keys() & {"column_places"}, "*i32"),
        }
        constants = {**compilation.constants, "DOUBLE": True, "HAS_COLUMNS": True}
        yield replace(compilation, signature=types, constants=constants)


def of_attention(compilation: Compilation) -> Iterator[Compilation]:
    """Heads of other widths and dtypes have tiles of their own."""
    (number,) = compilation.architectures
    plain = with_heads(compilation, number, 80, "bf16", False)
    yield replace(plain, constants={**plain.constants, "GROUP": 4}, aligned=())
    for head_dim, dtype in ((32, "fp16"), (128, "fp32"), (256, "bf16")):
        yield with_heads(compilation, number, head_dim, dtype, True)


if __name__ == "__main__":
    architecture = int(sys.argv[1])
    for base in filter(lambda base: base.runs_on(architecture), compilations()):
        others = of_attention if "attention" in base.name else variants
        for kind in (base, *others(base)):
            compiled = compile_kernel(kind, architecture)
            assert compiled.asm["cubin"]
            print(base.name)
