"""The worker with units that misbehave, and the strict interpreter of kernels."""

import atexit
import os
import time
from typing import Any

import torch
from torch import Tensor

from launch.bench_kernels.gpu import worker as gpu_worker
from trainer.kernels import swiglu

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.trainer.kernels import interpreter

    interpreter.install()


def plant_wrong_gradient() -> None:
    """Doubles the mask's gradient wherever the kernels of SwiGLU compute it."""
    right = swiglu._backward

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        d_gate, d_up, d_mask = right(*arguments)
        return d_gate, d_up, 2 * d_mask

    planted = torch.library.Library("shorn", "IMPL")
    planted.impl("swiglu_backward", wrong, "CPU")
    KEPT.append(planted)


def echo(unit: dict[str, Any], device: torch.device) -> dict[str, Any]:
    print("noise of a library")
    return {"heard": unit["say"]}


def crash(unit: dict[str, Any], device: torch.device) -> dict[str, Any]:
    os.abort()


def hang(unit: dict[str, Any], device: torch.device) -> dict[str, Any]:
    time.sleep(600)
    return {}


def linger(unit: dict[str, Any], device: torch.device) -> dict[str, Any]:
    # As compilers in the background do.
    atexit.register(time.sleep, 600)
    return {}


def close(unit: dict[str, Any], device: torch.device) -> dict[str, Any]:
    os.closerange(3, 64)
    return hang(unit, device)


def complain(unit: dict[str, Any], device: torch.device) -> dict[str, Any]:
    raise ValueError("no such\nthing")


def lose(unit: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """As after an illegal access: the device answers nothing any more."""

    def answer(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    gpu_worker._wait = answer
    return {}


KEPT: list[torch.library.Library] = []

if __name__ == "__main__":
    if "PLANTED" in os.environ:
        plant_wrong_gradient()
    for misbehave in (echo, crash, hang, linger, close, complain, lose):
        gpu_worker.KINDS[misbehave.__name__] = misbehave
    gpu_worker.main()
