"""The benchmark's byte counts, ratios and refusals, on a CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import InputError
from launch.bench_kernels import __main__ as bench_kernels
from launch.bench_kernels import cpu as kernel_cpu
from launch.bench_kernels import documents as kernel_documents
from launch.bench_kernels import memory as kernel_memory
from launch.bench_kernels import traffic as kernel_traffic
from launch.bench_kernels.config import BenchKernelsConfig
from launch.bench_kernels.cpu import Weight, index_and_multiply
from launch.bench_kernels.losses import LOSSES, loss_inputs
from launch.bench_kernels.static import compile as static
from launch.bench_kernels.static import cuda as static_cuda
from launch.bench_kernels.static import report as kernel_static
from launch.bench_kernels.traffic import CHANNELS, TOKENS
from tests.trainer.tiny import SHAPE
from trainer.kernels.gather_scale import gather_scale

TINY: dict[str, Any] = {
    "cpu": True,
    "vocabularies": (50, 70),
    "tokens": 12,
    "hidden": 8,
    "repeats": 2,
}
PASS = 2 * TOKENS * CHANNELS


def operator(name: str) -> kernel_traffic.Operator:
    return next(entry for entry in kernel_traffic.OPERATORS if entry.name == name)


def test_eager_bytes_are_those_of_each_aten_kernel() -> None:
    """silu 2 passes, and 3 for the product; backward 3 for silu and 6 for the product."""
    forward, backward = kernel_traffic.count(operator("swiglu"))
    assert forward.eager_bytes == pytest.approx(5 * PASS, rel=1e-3)
    assert backward.eager_bytes == pytest.approx(9 * PASS, rel=1e-3)
    for line in (forward, backward):
        # Inductor may say nothing; what it says is no more than eager's and no less than the least.
        assert line.compiled_bytes is None or 3 * PASS <= line.compiled_bytes <= line.eager_bytes


@pytest.mark.parametrize(("name", "least"), [("cross_entropy", 2), ("distillation", 3)])
def test_a_loss_moves_more_than_its_kernel(name: str, least: int) -> None:
    """The kernel reads the logits (and the teacher's) and leaves the gradient in their place."""
    lines = kernel_traffic.count(operator(name))
    one_pass = 2 * operator(name).inputs()[0].numel()
    assert [line.direction for line in lines] == ["forward", "backward"]
    for line in lines:
        assert line.eager_bytes > 4 * one_pass
    assert sum(line.eager_bytes for line in lines) > 4 * least * one_pass


def test_views_and_allocations_move_nothing() -> None:
    with kernel_traffic.AtenBytes() as counter:
        x = torch.empty(4, 8)
        x.view(8, 4).t()[2:].unsqueeze(0)
        torch.empty_like(x)
        assert counter.total == 0
        x.expand(3, 4, 8) + 1
        assert counter.total == 4 * (32 + 96)


def test_selections_read_what_they_return() -> None:
    x, index = torch.zeros(100, 8), torch.tensor([1, 5])
    with kernel_traffic.AtenBytes() as counter:
        x.index_select(0, index)
    assert counter.total == 2 * 4 * 16 + 16


def test_static_report_prints_and_writes_every_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = static.Record(
        kernel="swiglu.forward",
        backend="triton",
        arch="sm_90",
        shape="[8192, 11008]",
        registers=36,
        spill_bytes=0,
        shared_bytes=4096,
        threads=256,
        occupancy=0.75,
        limited_by="registers",
        instructions=100,
        load_bits=128,
        store_bits=None,
        load_widths={128: 3},
        store_widths={},
        has_dot=True,
        tensor_core="HGMMA",
        loops=[static.Loop(90, 16, 4, 0, 1)],
        bytes_moved=3 * PASS,
        minimum_bytes=3 * PASS,
        bytes_over_minimum=1.0,
        predicted_us=179.5,
    )
    # A pass of two kernels moves what both do.
    parts = [replace(record, kernel=f"swiglu.backward_{name}") for name in ("gate", "up")]
    failure = static.Failure("rope.forward", "sm_90", "[no] such type")
    monkeypatch.setattr(static, "require_triton", lambda: Path())
    monkeypatch.setattr(static, "compile_triton", lambda *_: ([record, *parts], [failure]))
    monkeypatch.setattr(static_cuda, "compile_cuda", lambda *_: ([], []))
    monkeypatch.setattr(kernel_traffic, "OPERATORS", (operator("swiglu"),))
    path = tmp_path / "kernels.json"
    with pytest.raises(SystemExit) as exit_request:
        kernel_static.run(BenchKernelsConfig(static=True, archs=(90,), json=str(path)))
    assert exit_request.value.code == 1
    printed = capsys.readouterr().out
    for text in ("HGMMA 16/4", "75% registers", "179.5", "3.02 TB/s", "A prediction, not a"):
        assert text in printed
    assert "rope.forward does not compile for sm_90: [no] such type" in printed
    written = json.loads(path.read_text())
    entry = written["records"][0]
    assert entry["tensor_core"] == "HGMMA" and entry["loops"][0]["bulk_loads"] == 4
    assert [line["kernel_bytes"] for line in written["traffic"]] == [3 * PASS, 6 * PASS]
    assert written["versions"]["triton"] and written["failures"][0]["kernel"] == "rope.forward"


def test_both_losses_are_the_same_function() -> None:
    gradients = []
    for loss in LOSSES.values():
        states, weight, targets, token_weights = loss_inputs(50, 12, 8)
        loss(states, weight, targets, token_weights)
        gradients.append((states.grad, weight.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_both_gathers_are_the_same_function() -> None:
    found = []
    for function in (gather_scale, index_and_multiply):
        weight = torch.arange(12.0).view(3, 4).requires_grad_()
        scales = [torch.rand(size, generator=torch.Generator().manual_seed(0)) for size in (3, 4)]
        rows, columns = torch.tensor([0, 2]), torch.tensor([1, 2, 3])
        arguments = [scale.requires_grad_() for scale in scales]
        result = function(weight, rows, arguments[0], columns, arguments[1])
        found.append((result, *torch.autograd.grad(result.sum(), (weight, *arguments))))
    torch.testing.assert_close(found[0], found[1])


def test_ratios_are_the_worst_of_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def peak(kind: str, vocabulary: int, **sizes: int) -> int:
        return {"full": 10000, "fused": 10 * vocabulary}[kind]

    layers = {"one": (Weight("a", 16, 8, 4), Weight("b", 8, 16)), "two": (Weight("a", 8, 8),)}
    layers[kernel_cpu.SMALL] = (Weight("a", 4, 4),)
    monkeypatch.setattr(kernel_cpu, "peak_bytes", peak)
    monkeypatch.setattr(kernel_cpu, "LAYERS", layers)
    monkeypatch.setattr(kernel_documents, "SHAPE", SHAPE)
    monkeypatch.setattr(kernel_documents, "LENGTH", 128)
    result = kernel_cpu.measure(BenchKernelsConfig(**TINY))
    assert result["linear_ce_memory_ratio"] == 0.07
    assert [loss["vocabulary"] for loss in result["linear_ce"]] == [50, 70]
    ratios = [loss["time_ratio"] for loss in result["linear_ce"]]
    assert result["linear_ce_time_ratio"] == max(ratios) > 0
    *speedups, small = [layer["speedup"] for layer in result["gather_scale"]]
    assert result["gather_scale_speedup"] == min(speedups) > 0
    assert result["gather_scale_speedup_small"] == small > 0
    assert [row["documents"] for row in result["documents"]] == [1, 8, 64]
    assert result["documents_time_ratio"] == result["documents"][0]["time_ratio"] > 0
    json.dumps(result)
    kernel_cpu.print_result(result)
    printed = capsys.readouterr().out
    assert "gather_scale_speedup" in printed and "documents apart in samples of 128" in printed


def test_sizes_too_small_to_show_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cpu, "peak_bytes", lambda kind, **sizes: 0)
    with pytest.raises(InputError, match=r"--tokens 12 and --vocabularies 50 .* --tokens 335545$"):
        kernel_cpu.measure(BenchKernelsConfig(**TINY))


@pytest.mark.slow
def test_peak_memory_is_that_of_the_logits() -> None:
    """Logits, softmax and gradient at least; the fused loss holds a part of them at a time."""
    sizes = {"vocabulary": 32000, "tokens": 2048, "hidden": 16, "threads": 1}
    logits = 4 * sizes["vocabulary"] * sizes["tokens"]
    full = kernel_memory.peak_bytes("full", **sizes)
    assert 1.9 * logits < full < 4 * logits
    assert kernel_memory.peak_bytes("fused", **sizes) < 0.05 * full


@pytest.mark.slow
def test_the_loss_meets_its_memory_goal() -> None:
    """Its peak is the gradient of the head and one chunk."""
    sizes = {"vocabulary": 32000, "tokens": 2048, "hidden": 512, "threads": 1}
    assert kernel_memory.peak_bytes("fused", **sizes) < 0.15 * kernel_memory.peak_bytes(
        "full", **sizes
    )


def test_a_measurement_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"full logits .* lower --tokens"):
        kernel_memory.require_memory(10**9, 10**6, 64)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget_seconds": 0.0}, "--budget-seconds 0.0"),
        ({"static": True, "cpu": True}, "either --static or --cpu"),
        ({"static": True, "archs": (70,)}, "--archs 70"),
        ({"static": True, "archs": ()}, "--archs needs"),
        ({"cpu": True, "tokens": 0}, "--tokens 0"),
        ({"cpu": True, "vocabularies": (100, 0)}, "--vocabularies 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        BenchKernelsConfig(**options)


def test_the_command_refuses_before_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["bench_kernels", "--static", "--json", str(tmp_path)])
    monkeypatch.delattr(kernel_static, "measure")
    with pytest.raises(InputError, match=r"--json .* is a folder"):
        bench_kernels.main()
