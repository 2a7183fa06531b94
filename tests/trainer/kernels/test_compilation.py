"""The Triton kernels compile for GPUs, and are launched as COMPILATIONS says."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.kernels import attention_tiles
from trainer.kernels.attention_tiles import FP32
from trainer.kernels.compilation import (
    CHANNELS,
    ENABLE_FP_FUSION,
    HEAD_DIM,
    HEADS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Compilation,
    Tile,
    compilations,
)
from trainer.kernels.linear_cross_entropy import default_chunk

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
BATCH = 2
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@pytest.mark.parametrize(
    "architecture",
    [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)],
)
def test_compiles_ahead_of_time(architecture: int, tmp_path: Path) -> None:
    compiled = Counter(run("compile_kernels", str(architecture), tmp_path).split())
    assert compiled.keys() == {compilation.name for compilation in compilations()}
    assert min(compiled.values()) >= 4


@pytest.mark.parametrize("largest", ["2400", pytest.param("inf", marks=pytest.mark.slow)])
def test_triton_launches_every_kernel(largest: str, tmp_path: Path) -> None:
    """Every kernel, as its own compiler at run time asks for it."""
    launched = dict(line.split() for line in run("launch_kernels", largest, tmp_path).splitlines())
    assert launched.keys() == {f"{entry.module}.{entry.function}" for entry in compilations()}


def run(script: str, argument: str, cache: Path) -> str:
    """What a script beside this file prints in a process that compiles kernels."""
    command = [sys.executable, "-m", f"tests.trainer.kernels.{script}", argument]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


class Recorder:
    """Stands for a kernel and keeps the arguments of its launch."""

    def __init__(self, kernel: Any) -> None:
        self.names = list(kernel.arg_names)
        # The declared types of integers; one without is a constant where it is 1.
        self.declared = {p.name: p.annotation_type for p in kernel.params if not p.is_constexpr}
        self.given: dict[str, Any] = {}

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            self.given = {**dict(zip(self.names, arguments, strict=False)), **named}

        return launch


def rows(width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(BATCH, TOKENS // BATCH, width, dtype=dtype, device="meta")


def vector(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(width, dtype=dtype, device="meta")


def launch(name: str, module: ModuleType) -> None:
    """Calls what launches a kernel, with the tensors of a LLaMA 2 7B layer on the meta device."""
    half = torch.bfloat16
    scale = torch.empty((), device="meta")
    if name == "rms_norm.forward":
        gain, mask = vector(WIDTH, half), vector(WIDTH)
        module.forward(rows(WIDTH), gain, mask, rows(WIDTH), scale, 1e-5)
    elif name == "rms_norm.backward":
        inverse = torch.empty(BATCH, TOKENS // BATCH, device="meta")
        gain, mask = vector(WIDTH, half), vector(WIDTH)
        module.backward(rows(WIDTH), rows(WIDTH), rows(WIDTH), inverse, gain, mask, scale)
    elif name == "swiglu.forward":
        module.forward(rows(CHANNELS), rows(CHANNELS), vector(CHANNELS))
    elif name == "swiglu.backward":
        module.backward(rows(CHANNELS), rows(CHANNELS), rows(CHANNELS), vector(CHANNELS))
    elif name in ("cross_entropy.forward", "distillation.forward"):
        taught = name.startswith("distillation")
        tokens = default_chunk(TOKENS, (2 if taught else 1) * VOCABULARY, "cuda")
        logits, teacher = (
            vector(tokens * VOCABULARY, half).view(tokens, VOCABULARY) for _ in range(2)
        )
        targets, weights = vector(tokens, torch.int64), vector(tokens)
        module.forward(logits, targets, weights, teacher if taught else None, 0.5, 2.0)
    elif name.startswith("rope"):
        query, key = (rows(WIDTH).unflatten(-1, (HEADS, HEAD_DIM)) for _ in range(2))
        cos, sin = (query.new_empty(TOKENS // BATCH, HEAD_DIM // 2) for _ in range(2))
        results = (torch.empty_like(query), torch.empty_like(key))
        module.rotate(query, key, cos, sin, name == "rope.backward", results)
    elif "attention" in name:
        heads = 8 if name.startswith("grouped") else HEADS
        query, outer = (rows(WIDTH).unflatten(-1, (HEADS, HEAD_DIM)) for _ in range(2))
        key, value = (rows(heads * HEAD_DIM).unflatten(-1, (heads, HEAD_DIM)) for _ in range(2))
        documents = torch.zeros(BATCH, TOKENS // BATCH, dtype=torch.int64, device="meta")
        arguments = (query, key, value, vector(HEADS), documents)
        if name == "attention.forward":
            module.forward(*arguments, None, 0.5)
        else:
            statistic = query.new_empty(BATCH, HEADS, TOKENS // BATCH, dtype=torch.float32)
            module.backward(outer, *arguments, torch.empty_like(query), statistic, None, 0.5)
    else:
        weight, gradient = (vector(WIDTH * CHANNELS, half).view(WIDTH, CHANNELS) for _ in range(2))
        selection = (vector(WIDTH, torch.int64), vector(WIDTH), None, vector(CHANNELS))
        if name == "gather_scale.forward":
            module.forward(weight, *selection)
        else:
            module.backward(gradient, weight, *selection, True, True, True)


def record(compilation: Compilation, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What launched a kernel; others of its module, launched by the same call, do not run."""
    module = sys.modules[compilation.module]
    recorders = {}
    for function in {other.function for other in module.COMPILATIONS}:
        recorders[function] = Recorder(getattr(module, function))
        monkeypatch.setattr(module, function, recorders[function])
    for architecture in compilation.architectures:
        monkeypatch.setattr(attention_tiles, "architecture", lambda _, it=architecture: it)
    launch(compilation.name, module)
    return recorders[compilation.function]


@pytest.mark.parametrize("compilation", compilations(), ids=lambda compilation: compilation.name)
def test_is_launched_as_compiled(compilation: Compilation, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = record(compilation, monkeypatch)
    given = recorder.given
    assert set(recorder.names) == compilation.signature.keys() | compilation.constants.keys()
    assert given["num_warps"] == compilation.num_warps
    assert given["num_stages"] == compilation.num_stages
    assert given["enable_fp_fusion"] == ENABLE_FP_FUSION
    for name, value in compilation.constants.items():
        assert given[name] == value, name
        if name in recorder.declared:
            assert value == 1 and recorder.declared[name] == "", name
    for name, kind in compilation.signature.items():
        value = given[name]
        if isinstance(value, Tensor):
            assert TYPES[value.dtype] == kind, name
        elif isinstance(value, float):
            assert kind == recorder.declared[name] == "fp32", name
        else:
            assert kind == (recorder.declared[name] or "i32"), name
            assert (name in compilation.aligned) == (value % 16 == 0) and value != 1, name


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


@pytest.mark.parametrize("compilation", compilations(), ids=lambda compilation: compilation.name)
def test_bytes_are_those_of_the_tensors(
    compilation: Compilation, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = record(compilation, monkeypatch)
    tensors = {name: t for name, t in recorder.given.items() if isinstance(t, Tensor)}
    distinct = {id(t): t.numel() * t.element_size() for t in tensors.values()}
    # Written and read: partial sums, and logits in place of which the gradient is left.
    again = sum(
        distinct[id(t)] for name, t in tensors.items() if name.endswith(("partial", "logits"))
    )
    moved = sum(distinct.values()) + again
    # Scalars are not counted.
    assert moved - 16 <= compilation.bytes_moved <= moved
    assert compilation.minimum_bytes <= compilation.bytes_moved <= 1.1 * compilation.minimum_bytes
