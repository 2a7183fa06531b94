"""`make gpu-check` on a CPU: the same processes, cases and timings, kernels in the interpreter."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import InputError
from launch.bench_kernels.config import BenchConfig
from launch.bench_kernels.gpu import report as gpu_report
from launch.bench_kernels.gpu import run as gpu_check
from launch.bench_kernels.gpu.benchmarks import MODELS
from launch.bench_kernels.gpu.cases import cases
from launch.bench_kernels.gpu.run import backends, check_jobs, measure, time_job
from tests.launch.bench_kernels.gpu.test_timing import TINY
from trainer.kernels import registry

WORKER = "tests.launch.bench_kernels.gpu.planted_worker"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers interpret Triton's kernels; torch.compile hands back what it is given."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")


def run(**options: Any) -> dict[str, Any]:
    return measure("cpu", 400, models=[TINY], seconds=0.0, worker=WORKER, **options)


def test_operators_are_checked_and_timed(
    interpreted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "_CHOICES", ("triton",))
    report = run(largest=8000, operators=("rope", "copy"))
    assert report["passed"], report["checks"]
    assert {check["backend"] for check in report["checks"]} == {"triton"}
    assert len(report["checks"]) == 6
    timings = report["timings"]
    sides = {line["side"] for line in timings if line["status"] == "ok"}
    assert sides >= {"eager", "triton", "torch.compile"}
    assert {line["operator"] for line in timings} == {"rope", "copy"}
    json.dumps(report)
    gpu_report.write_csv(tmp_path / "gpu.csv", report["facts"], timings)
    with (tmp_path / "gpu.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(timings)


def test_a_wrong_kernel_is_named(
    interpreted: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also what runs after it is reported."""
    monkeypatch.setenv("PLANTED", "1")
    monkeypatch.setattr(gpu_check, "_CHOICES", ("triton",))
    monkeypatch.setattr(gpu_check.gpu_benchmarks, "BENCHMARKS", {})
    report = run(largest=300, operators=("swiglu",))
    assert not report["passed"]
    failed = [check for check in report["checks"] if check["status"] == "failed"]
    assert {check["case"]["mask"] for check in failed} >= {"ones"}
    assert "none" not in {check["case"]["mask"] for check in failed}
    assert all(check["message"].startswith("WrongResultError: gradient 2") for check in failed)
    assert "failed   swiglu triton 7x33" in capfd.readouterr().err


@pytest.mark.slow
def test_every_kernel_passes_in_the_interpreter(interpreted: None) -> None:
    report = run(largest=1200)
    assert report["passed"], [check for check in report["checks"] if check["status"] != "ok"]


def recorded(passed: bool) -> dict[str, Any]:
    return {"passed": passed, "facts": {"gpu": "NVIDIA H100"}, "checks": [], "timings": []}


@pytest.mark.parametrize("passed", [True, False])
def test_the_command_writes_and_ends_with_its_status(
    passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def found(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments)
        return recorded(passed)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "measure", found)
    paths = {name: str(tmp_path / f"gpu.{name}") for name in ("json", "csv")}
    config = BenchConfig(budget_seconds=12.0, **paths)  # type: ignore[arg-type]
    if passed:
        gpu_check.run(config)
    else:
        with pytest.raises(SystemExit) as exit_request:
            gpu_check.run(config)
        assert exit_request.value.code == 1
    assert asked == [("cuda", 12.0)]
    assert json.loads(Path(paths["json"]).read_text())["passed"] is passed
    assert Path(paths["csv"]).exists()


@pytest.mark.parametrize(("several", "expected"), [(True, 6), (False, 1)])
def test_checks_run_together_where_the_gpu_allows_it(
    several: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def run_all(runner: Any, jobs: Any, at_once: int = 1) -> list[Any]:
        asked.append(at_once)
        return []

    monkeypatch.setattr(gpu_check, "available_cores", lambda: 64)
    monkeypatch.setattr(gpu_check, "takes_several_processes", lambda: several)
    monkeypatch.setattr(gpu_check.Runner, "run_all", run_all)
    measure("cpu", 1)
    assert asked == [expected, 1]


def test_without_a_gpu_the_error_says_what_runs_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"no GPU.*--static.*--cpu"):
        gpu_check.run(BenchConfig())


def test_files_that_cannot_be_written_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--csv .* is a folder"):
        gpu_check.run(BenchConfig(csv=str(tmp_path)))


def test_on_a_gpu_every_implementation_is_checked_and_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they would be planned where Triton and the CUDA library are."""
    monkeypatch.setattr(registry, "_has_triton", lambda kind: True)
    monkeypatch.setattr(registry.library, "_loaded", {"cuda"})
    registry.operators()
    registry._decide()
    names = {"gather_scale": ["reference", "triton", "cuda"], "swiglu": ["reference", "triton"]}
    try:
        for name, expected in names.items():
            assert list(backends(name, "cuda")) == expected
        jobs = check_jobs("gather_scale", "cuda")
        assert [job.name.split(", ")[1] for job in jobs] == names["gather_scale"]
        assert {len(job.units) for job in jobs} == {len(cases("gather_scale"))}
        units = time_job(["copy", "gather_scale", "swiglu"], "cuda", MODELS, 0.3).units
        assert [unit["model"] for unit in units[: len(units) // 2]] == [asdict(MODELS[0])] * 9
        sides = [(unit["operator"], unit["side"]) for unit in units[: len(units) // 2]]
        assert sides == [
            ("copy", "eager"),
            *(("gather_scale", side) for side in ("eager", "triton", "cuda")),
            *(("swiglu", side) for side in ("eager", "triton", "liger")),
            *((name, "torch.compile") for name in ("gather_scale", "swiglu")),
        ]
        ours = {unit["side"] for unit in units if not unit.get("comparison")}
        assert ours == {"triton", "cuda"}
        assert list(backends("copy", "cuda")) == ["pytorch"]
    finally:
        monkeypatch.undo()
        registry._decide()
