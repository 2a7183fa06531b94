"""The Triton kernels compile for GPUs as they are launched, and a GPU could make the launches."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.kernels import registry
from trainer.kernels.launching import Tile

pytest.importorskip("triton")

from trainer.kernels import attention_tiles
from trainer.kernels.attention_tiles import FP32

ROOT = Path(__file__).resolve().parents[3]
MODULES = [f"{operator.name}_triton" for operator in registry.operators()]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [(90, "few"), *(pytest.param(n, "every", marks=slow) for n in (80, 90, 100))],
)
def test_compiles_as_it_is_launched(architecture: int, shapes: str, tmp_path: Path) -> None:
    """Every kernel, through Triton's own compiler and launcher, by a driver that only looks."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.trainer.kernels.compile_kernels", str(architecture), shapes],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    launched = dict(line.split() for line in result.stdout.splitlines())
    kernels = {
        f"trainer.kernels.{module}.{name}"
        for module in (*MODULES, "attention_backward_triton")
        for name in vars(importlib.import_module(f"trainer.kernels.{module}"))
        if name.endswith("_kernel")
    }
    assert launched.keys() == kernels


@pytest.mark.parametrize(
    ("capability", "number"),
    [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)],
)
def test_every_gpu_has_a_tile(
    capability: tuple[int, int], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs of which no tile is known take that which needs least shared memory."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert attention_tiles.architecture(torch.device("cpu")) == 80
    found = attention_tiles.architecture(torch.device("cuda"))
    tiles = {n: (Tile(n, 16, 8, 2), Tile(n, 32, 8, 2)) for n in (80, 90, 100, FP32)}
    monkeypatch.setattr(attention_tiles, "architecture", lambda _: found)
    for head_dim, columns in ((64, 16), (128, 16), (129, 32), (256, 32)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            query = torch.empty(1, 1, 1, head_dim, dtype=dtype, device="meta")
            rows = FP32 if dtype == torch.float32 else number
            assert attention_tiles.choose(tiles, query) == Tile(rows, columns, 8, 2)
