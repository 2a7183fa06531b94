"""Timings of all operators on a CPU, and what becomes of them where one fails."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import InputError
from launch.bench_kernels.config import BenchKernelsConfig
from launch.bench_kernels.gpu import report as gpu_report
from launch.bench_kernels.gpu import run as gpu_run
from launch.bench_kernels.gpu.benchmarks import MODELS
from launch.bench_kernels.gpu.run import backends, measure, plan
from tests.launch.bench_kernels.gpu.test_timing import TINY
from trainer.kernels import registry

ROPE = ("eager", "triton", "torch.compile", "liger")
SIDES = ["copy eager", *(f"rope {side}" for side in ROPE)]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each side of copy and rope does instead of being timed: raise this, or nothing."""
    planted: dict[str, Any] = {}

    def timed(side: dict[str, Any], device: torch.device) -> dict[str, Any]:
        error = planted.get(f"{side['operator']} {side['side']}")
        if error is not None:
            raise error
        entry = {"pass": "forward", "work": 1, "seconds": 1e-6, "repeats": 9}
        return {"passes": [entry], "unit": "bytes", "sets": 2}

    sides = [dict(zip(("operator", "side"), name.split(" "), strict=True)) for name in SIDES]
    plans = [
        side | {"model": asdict(TINY), "comparison": side["side"] != "triton"} for side in sides
    ]
    monkeypatch.setattr(gpu_run, "plan", lambda *_: plans)
    monkeypatch.setattr(gpu_run.timing, "measure", timed)
    return planted


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {f"{line['operator']} {line['side']}": line["status"] for line in report["timings"]}


def test_operators_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    report = measure("cpu", 400, models=[TINY], seconds=0.0, operators=("copy", "rope"))
    assert report["passed"] and report.keys() == {"passed", "facts", "timings"}
    timings = report["timings"]
    sides = {(line["operator"], line["side"]) for line in timings if line["status"] == "ok"}
    assert sides == {("copy", "eager"), ("rope", "eager"), ("rope", "torch.compile")}
    json.dumps(report)
    gpu_report.write_csv(tmp_path / "gpu.csv", report["facts"], timings)
    with (tmp_path / "gpu.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(timings)


def test_what_fails_is_named_and_the_rest_goes_on(
    planned: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    planned["rope triton"] = ValueError("no such\nthing" + "!" * 1000)
    planned["rope liger"] = ModuleNotFoundError("no liger")
    report = measure("cpu", 400, models=[TINY], operators=("copy", "rope"))
    assert not report["passed"]
    assert list(statuses(report).values()) == ["ok", "ok", "failed", "ok", "not comparable"]
    message = report["timings"][2]["message"]
    assert message.startswith("ValueError: no such thing!!!") and len(message) < 700
    told = capsys.readouterr().err
    assert "failed   rope triton, tiny  ValueError: no such thing" in told
    assert "5/5 timing" in told


def test_the_code_of_others_may_fail(planned: dict[str, Any]) -> None:
    planned["rope liger"] = RuntimeError("out of memory")
    assert measure("cpu", 400, models=[TINY], operators=("copy", "rope"))["passed"]


@pytest.mark.parametrize("culprit", ["rope triton", "rope torch.compile"])
def test_nothing_runs_on_a_device_that_was_lost(
    culprit: str, planned: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an illegal access; the report is complete, and does not pass."""
    planned[culprit] = RuntimeError("CUDA error: an illegal memory access was encountered")
    answers = iter([True] * SIDES.index(culprit) + [False])
    monkeypatch.setattr(gpu_run, "is_usable", lambda device: next(answers))
    report = measure("cpu", 400, models=[TINY], operators=("copy", "rope"))
    assert not report["passed"] and list(statuses(report)) == SIDES
    after = report["timings"][SIDES.index(culprit) + 1 :]
    assert {line["status"] for line in after} == {"skipped"}
    reason = f"not run: the device answers no more after {culprit}, tiny"
    assert {line["message"] for line in after} == {reason}


def test_an_interrupted_run_has_its_report(planned: dict[str, Any]) -> None:
    planned["rope triton"] = KeyboardInterrupt()
    report = measure("cpu", 400, models=[TINY], operators=("copy", "rope"))
    assert not report["passed"]
    assert list(statuses(report).values()) == ["ok", "ok", *["skipped"] * 3]
    assert {line["message"] for line in report["timings"][2:]} == {"not run: interrupted"}


def test_a_device_that_fails_later_calls_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert gpu_run.is_usable(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert gpu_run.is_usable(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert not gpu_run.is_usable(torch.device("cuda"))


def test_what_the_budget_does_not_reach_is_skipped(planned: dict[str, Any]) -> None:
    report = measure("cpu", 0.0, models=[TINY], operators=("copy", "rope"))
    assert set(statuses(report).values()) == {"skipped"}
    assert {line["message"] for line in report["timings"]} == {gpu_run.OUT_OF_TIME}


@pytest.mark.parametrize("passed", [True, False])
def test_the_command_writes_and_ends_with_its_status(
    passed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And says which operators it cannot time."""
    asked: list[tuple[Any, ...]] = []

    def found(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments)
        return {"passed": passed, "facts": {"gpu": "NVIDIA H100"}, "timings": []}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_run, "is_usable", lambda device: True)
    monkeypatch.setattr(gpu_run, "measure", found)
    monkeypatch.setattr(registry.library, "_loaded", {"cuda"} if passed else set())
    paths = {name: str(tmp_path / f"gpu.{name}") for name in ("json", "csv")}
    config = BenchKernelsConfig(budget_seconds=12.0, **paths)  # type: ignore[arg-type]
    if passed:
        gpu_run.run(config)
    else:
        with pytest.raises(SystemExit) as exit_request:
            gpu_run.run(config)
        assert exit_request.value.code == 1
    assert ("the CUDA operators are not timed" in capsys.readouterr().err) is not passed
    assert asked == [("cuda", 12.0)]
    assert json.loads(Path(paths["json"]).read_text())["passed"] is passed
    assert Path(paths["csv"]).exists()


def test_without_a_gpu_the_error_says_what_runs_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"no GPU.*--static.*--cpu"):
        gpu_run.run(BenchKernelsConfig())


def test_files_that_cannot_be_written_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--csv .* is a folder"):
        gpu_run.run(BenchKernelsConfig(csv=str(tmp_path)))


def test_on_a_gpu_every_implementation_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would be planned where Triton and the CUDA library are."""
    monkeypatch.setattr(registry, "_has_triton", lambda kind: True)
    monkeypatch.setattr(registry.library, "_loaded", {"cuda"})
    registry.operators()
    registry._decide()
    names = {"gather_scale": ["reference", "triton", "cuda"], "swiglu": ["reference", "triton"]}
    try:
        for name, expected in names.items():
            assert list(backends(name, "cuda")) == expected
        planned = plan(["copy", "gather_scale", "swiglu"], "cuda", MODELS, 0.3)
        first = planned[: len(planned) // 2]
        assert [side["model"] for side in first] == [asdict(MODELS[0])] * 9
        assert [(side["operator"], side["side"]) for side in first] == [
            ("copy", "eager"),
            *(("gather_scale", side) for side in ("eager", "triton", "cuda")),
            *(("swiglu", side) for side in ("eager", "triton", "liger")),
            *((name, "torch.compile") for name in ("gather_scale", "swiglu")),
        ]
        ours = {side["side"] for side in planned if not side.get("comparison")}
        assert ours == {"triton", "cuda"}
        assert list(backends("copy", "cuda")) == ["pytorch"]
    finally:
        monkeypatch.undo()
        registry._decide()
