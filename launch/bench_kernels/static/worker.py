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

from launch.bench_kernels.static.record import compile_one


def main() -> None:
    request = json.load(sys.stdin)
    done = {tuple(pair) for pair in request["done"]}
    for launch in importlib.import_module(request["module"]).launches():
        for arch in request["archs"]:
            if (launch.name, arch) in done:
                continue
            facts: dict[str, Any] = {"kernel": launch.name, "arch": arch}
            facts |= {"shape": launch.shape, "flops": launch.flops}
            print(json.dumps(facts), flush=True)
            cubin = Path(request["folder"], f"{launch.name}.sm_{arch}.cubin")
            try:
                facts |= compile_one(launch, arch, cubin)
            # Whatever one kernel's compilation raises is that kernel's result.
            except Exception as error:
                facts["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(facts | {"finished": True}), flush=True)


if __name__ == "__main__":
    main()
