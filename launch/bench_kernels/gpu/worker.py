"""The process that runs operators on a GPU, for launch/bench_kernels/gpu/jobs.py.

Reads {"device", "units"} from stdin and prints one JSON line for each unit. After a unit that broke
the device's context it ends, and is started again for the rest.
"""

import json
import os
import sys
from typing import IO, Any

import torch

from launch.bench_kernels.gpu import correctness as gpu_correctness
from launch.bench_kernels.gpu import timing as gpu_timing
from launch.bench_kernels.gpu.jobs import MESSAGE_CHARACTERS, Result, Unit, failed

KINDS = {"check": gpu_correctness.check, "time": gpu_timing.measure}


def run(unit: Unit, device: torch.device) -> Result:
    """The unit's result; whatever it raises is its result too."""
    try:
        found = KINDS[unit["kind"]](unit, device)
        _wait(device)
    except Exception as error:
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        message = " ".join(lines)[:MESSAGE_CHARACTERS]
        return unit | {"status": failed(unit), "message": message}
    return unit | {"status": "ok", "message": ""} | found


def is_usable(device: torch.device) -> bool:
    """Whether the device still answers; after an illegal access it does not."""
    try:
        _wait(device)
    except RuntimeError:
        return False
    return True


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_over_output() -> IO[str]:
    """Stdout for results alone: whatever else is printed goes to stderr."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return results


def main() -> None:
    request: dict[str, Any] = json.load(sys.stdin)
    results, device = take_over_output(), torch.device(request["device"])
    for unit in request["units"]:
        result = run(unit, device)
        print(json.dumps(result), file=results, flush=True)
        if not is_usable(device):
            break
    # A broken context may keep the interpreter from ending, and so may the compilers that
    # torch.compile started.
    os._exit(0)


if __name__ == "__main__":
    main()
