"""Peak memory of a loss, measured in a process of its own for `launch.bench_kernels --cpu`.

The peak is the kernel's own high-water mark of resident memory, above what was resident before:
inputs do not count, gradients do. A counting allocator would miss what libraries allocate inside
an operator; the mark misses nothing, but a process has one only, and freed memory of an earlier
measurement could be used again without raising it. Hence one process for each measurement.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from data.errors import InputError
from launch.commands import child_environment

CHILD = """
import json, sys
from data.machine import end_with_parent
end_with_parent()
from launch.bench_kernels.memory import measure
print(measure(**json.loads(sys.argv[1])))
"""
STATUS = Path("/proc/self/status")
MEMORY = Path("/proc/meminfo")
RESET = Path("/proc/self/clear_refs")


def peak_bytes(kind: str, **sizes: int) -> int:
    """Peak memory of one forward and backward pass, measured in a child process.

    Args:
        kind: "full" or "fused", of launch.bench_kernels.losses.LOSSES.
        sizes: vocabulary, tokens, hidden, threads.

    Raises:
        InputError: the system does not tell (it needs Linux), or memory ran out.
    """
    if not RESET.exists():
        raise InputError("--cpu measures memory by /proc/self/clear_refs, which needs Linux")
    command = [sys.executable, "-c", CHILD, json.dumps(sizes | {"kind": kind})]
    result = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    if result.returncode:
        raise InputError(
            f"measuring the {kind} loss of {sizes} ended with status {result.returncode}: "
            f"{result.stderr.strip()[-500:]}; with less memory, lower --tokens"
        )
    return int(result.stdout)


def require_memory(tokens: int, vocabulary: int, hidden: int) -> None:
    """Raises InputError where the logits, their softmax and its gradient, and what they are made
    of, with gradients, do not fit; all in fp32."""
    needed = 4 * (3 * tokens * vocabulary + 2 * hidden * (tokens + vocabulary))
    if MEMORY.exists():
        available = _read_bytes(MEMORY, "MemAvailable")
        # Others use memory too, and a system that runs out of it stops whom it likes.
        if 1.25 * needed > available:
            raise InputError(
                f"full logits of {tokens} tokens and {vocabulary} ids at width {hidden} take "
                f"{needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free; lower --tokens, "
                "--vocabularies or --hidden"
            )


def measure(kind: str, vocabulary: int, tokens: int, hidden: int, threads: int) -> int:
    """Peak of resident memory in this process during one pass, above what it had before."""
    import torch

    from launch.bench_kernels.losses import LOSSES, loss_inputs

    torch.set_num_threads(threads)
    # Libraries set themselves up at first use.
    LOSSES[kind](*loss_inputs(100, 16, 8))
    inputs: Any = loss_inputs(vocabulary, tokens, hidden)
    RESET.write_text("5")
    before = _read_bytes(STATUS, "VmRSS")
    LOSSES[kind](*inputs)
    return _read_bytes(STATUS, "VmHWM") - before


def _read_bytes(file: Path, key: str) -> int:
    """An entry of a file in /proc, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", file.read_text(), flags=re.MULTILINE)
    assert found is not None, key
    return 1024 * int(found[1])
