"""Timings: every side of every benchmark runs, and seconds are seconds."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.bench_kernels.gpu import benchmarks as gpu_benchmarks
from launch.bench_kernels.gpu import timing as gpu_timing
from launch.bench_kernels.gpu.benchmarks import BENCHMARKS, BOTH, FORWARD, MODELS, Benchmark, Model
from launch.bench_kernels.gpu.timing import CudaTimer, DifferentResultError, measure, rotations
from trainer.kernels import attention_flash, registry
from trainer.kernels.attention import attention

CPU = torch.device("cpu")
TINY = Model(
    name="tiny", width=32, heads=2, channels=48, head_dim=16, vocabulary=50, batch=2, length=8
)


def unit(name: str, side: str) -> dict[str, Any]:
    model = asdict(TINY)
    return {"operator": name, "side": side, "choice": "auto", "model": model, "seconds": 0.0}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_eager_and_the_operator_are_timed_in_every_pass(name: str) -> None:
    for side in ("eager", "operator") if BENCHMARKS[name].ours else ("eager",):
        result = measure(unit(name, side), CPU)
        assert [entry["pass"] for entry in result["passes"]] == list(BENCHMARKS[name].work(TINY))
        assert result["sets"] == 2
        for entry in result["passes"]:
            assert 0 < entry["fastest"] <= entry["seconds"] <= entry["slowest"]
            assert entry["repeats"] == gpu_timing.LEAST_REPEATS and entry["work"] > 0


def test_every_operator_is_timed() -> None:
    assert {operator.name for operator in registry.operators()} <= BENCHMARKS.keys()


@pytest.mark.parametrize(
    ("name", "side"),
    [("rms_norm", "F.rms_norm"), pytest.param("swiglu", "torch.compile", marks=pytest.mark.slow)],
)
def test_what_pytorch_has_itself_is_timed(name: str, side: str) -> None:
    result = measure(unit(name, side), CPU)
    assert [entry["pass"] for entry in result["passes"]] == [FORWARD, BOTH]


@pytest.mark.parametrize("name", [n for n, row in BENCHMARKS.items() if "liger" in row.others])
def test_a_package_that_is_missing_says_so(name: str) -> None:
    if importlib.util.find_spec("liger_kernel") is not None:
        pytest.skip("liger-kernel is installed")
    with pytest.raises(ModuleNotFoundError, match="liger_kernel"):
        measure(unit(name, "liger"), CPU)


def test_flash_attention_is_timed_without_a_mask_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, ...]] = []

    def attend(library: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        calls.append((library, *rest))
        return attention(query, key, value)

    found = [None, attention_flash.LIBRARIES[0]]
    monkeypatch.setattr(attention_flash, "find", lambda query, **options: found[-1])
    monkeypatch.setattr(attention_flash, "attend", attend)
    result = measure(unit("attention", "flash-attn"), CPU)
    assert [entry["pass"] for entry in result["passes"]] == [FORWARD, BOTH]
    assert set(calls) == {(attention_flash.LIBRARIES[0], None, TINY.head_dim**-0.5)}
    found.pop()
    with pytest.raises(ModuleNotFoundError, match="FlashAttention"):
        measure(unit("attention", "flash-attn"), CPU)


@pytest.mark.parametrize("wrong", [lambda x: x * 1.2, lambda x: x[1:], lambda x: x * torch.nan])
def test_a_side_that_computes_something_else_is_not_timed(
    wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = BENCHMARKS["copy"]
    row = Benchmark(inputs=copy.inputs, eager=torch.clone, ours=wrong, work=copy.work)
    monkeypatch.setitem(BENCHMARKS, "planted", row)
    with pytest.raises(DifferentResultError, match="result 0"):
        measure(unit("planted", "operator"), CPU)


def test_work_is_what_the_kernels_move() -> None:
    """At a 7B model's shapes; vectors and tables hardly count."""
    pytest.importorskip("triton")
    from launch.bench_kernels.static.kernels import launches
    from launch.bench_kernels.static.record import record, traffic

    least = {entry.name: traffic(record(entry, 90)[1])["minimum_bytes"] for entry in launches()}
    for operator in registry.operators():
        row = BENCHMARKS[operator.name]
        if row.unit == "bytes":
            work, name = row.work(MODELS[0]), operator.name
            assert work[FORWARD] == pytest.approx(least[f"{name}.forward"], rel=0.02)
            both = least[f"{name}.forward"] + least[f"{name}.backward"]
            assert work[BOTH] == pytest.approx(both, rel=0.02)


@pytest.mark.parametrize(
    ("size", "cache", "free", "expected"),
    [(100, 0, 10**6, 2), (100, 1000, 10**6, 20), (100, 1000, 2000, 5), (10**9, 1000, 0, 2)],
)
def test_sets_of_arguments_exceed_the_cache(
    size: int, cache: int, free: int, expected: int
) -> None:
    assert rotations(size, cache, free) == expected


class FakeEvent:
    """A CUDA event on a clock that every call moves on."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


def test_cuda_events_give_seconds_behind_queued_work(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fills: list[int] = []

    def call(index: int) -> None:
        calls.append(index)
        FakeEvent.now += 2.0

    def fill(filler: Tensor) -> None:
        assert filler.numel() == 2
        fills.append(len(calls))
        FakeEvent.now += 1.0

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(gpu_timing, "FILLER_BYTES", 8)
    monkeypatch.setattr(Tensor, "sum", fill)
    timer = CudaTimer(CPU)
    assert timer.times(call, 3) == [0.002] * 3
    # The first call tells how long launching takes.
    assert calls == [0, 0, 1, 2]
    assert set(fills[-3:]) >= {3} and len(fills) >= gpu_timing.FIRST_FILLS + 3


def test_a_loss_is_differentiated_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.float().sum()
        total.register_hook(lambda gradient: given.append(gradient))
        return total, x * 1

    row = Benchmark(
        inputs=lambda model, device: (torch.ones(7, requires_grad=True),),
        eager=loss,
        work=lambda model: {BOTH: 1},
    )
    monkeypatch.setitem(BENCHMARKS, "planted", row)
    measure(unit("planted", "eager"), CPU)
    assert given and all(gradient == 1 for gradient in given)


def test_shapes_are_those_of_the_models() -> None:
    assert [model.tokens for model in MODELS] == [8192, 8192]
    assert all(model.heads * model.head_dim == model.width for model in MODELS)
    assert gpu_benchmarks.function_of("copy", "eager") is torch.clone
