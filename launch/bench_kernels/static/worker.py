"""Compiles Triton kernels ahead of time, in a process of its own: `static.compile_triton` runs it.

A process that interprets kernels (TRITON_INTERPRET=1) cannot compile them, and the compiler may
abort. Reads a request from stdin and writes KERNEL.sm_ARCH.cubin files; prints a JSON line before
and after each.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from trainer.kernels.compilation import ENABLE_FP_FUSION, Compilation


def compile_one(record: Compilation, arch: int, cubin: Path) -> dict[str, Any]:
    """Compiles one kernel for one architecture, as it is launched; what the cubin does not tell."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(record.module), record.function)
    names = list(function.arg_names)
    types = {**record.signature, **dict.fromkeys(record.constants, "constexpr")}
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    source = ASTSource(
        fn=function,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in record.constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *record.aligned)
        },
    )
    options = {
        "num_warps": record.num_warps,
        "num_stages": record.num_stages,
        "enable_fp_fusion": ENABLE_FP_FUSION,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin.write_bytes(compiled.asm["cubin"])
    return {
        "shared_bytes": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "has_dot": "tt.dot" in compiled.asm["ttir"],
    }


def main() -> None:
    request = json.load(sys.stdin)
    done = {tuple(pair) for pair in request["done"]}
    for record in importlib.import_module(request["module"]).compilations():
        for arch in request["archs"]:
            if (record.name, arch) in done or not record.runs_on(arch):
                continue
            facts: dict[str, Any] = {"kernel": record.name, "arch": arch}
            facts |= {key: getattr(record, key, None) for key in request["fields"]}
            print(json.dumps(facts), flush=True)
            cubin = Path(request["folder"], f"{record.name}.sm_{arch}.cubin")
            try:
                facts |= compile_one(record, arch, cubin)
            # Whatever one kernel's compilation raises is that kernel's result.
            except Exception as error:
                facts["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(facts | {"finished": True}), flush=True)


if __name__ == "__main__":
    main()
