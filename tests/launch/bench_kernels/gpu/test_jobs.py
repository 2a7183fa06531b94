"""Jobs survive what their units do."""

import subprocess
import time
from typing import Any

import pytest

from launch.bench_kernels.gpu.jobs import Budget, Job, Result, Runner, Unit, failed

WORKER = "tests.launch.bench_kernels.gpu.planted_worker"


def runner(seen: list[Result], seconds: float = 300.0, **options: Any) -> Runner:
    return Runner(
        device="cpu", budget=Budget(seconds), on_result=seen.append, worker=WORKER, **options
    )


def units(*kinds: str) -> tuple[Unit, ...]:
    return tuple({"kind": kind, "say": index} for index, kind in enumerate(kinds))


def test_units_that_raise_or_crash_or_lose_the_device_fail_alone() -> None:
    """Each gets one result, in order, and what comes after them still runs."""
    seen: list[Result] = []
    kinds = ("complain", "crash", "lose", "echo")
    results = runner(seen).run(Job("planted", units(*kinds)))
    assert [result["kind"] for result in results] == list(kinds)
    assert results == seen
    assert [result["status"] for result in results] == ["failed", "failed", "failed", "ok"]
    assert results[0]["message"] == "ValueError: no such thing"
    assert "ended with status -6" in results[1]["message"]
    assert "illegal memory access" in results[2]["message"]
    assert results[3]["heard"] == 3


def test_a_unit_that_hangs_is_ended() -> None:
    seen: list[Result] = []
    (result,) = runner(seen, unit_seconds=0.5).run(Job("planted", units("hang")))
    assert result["status"] == "failed" and "no answer" in result["message"]


def test_a_worker_that_has_answered_is_not_waited_for() -> None:
    seen: list[Result] = []
    started = time.monotonic()
    (result,) = runner(seen).run(Job("planted", units("linger")))
    assert result["status"] == "ok" and time.monotonic() - started < 60


def test_a_worker_that_stops_talking_is_ended() -> None:
    seen: list[Result] = []
    (result,) = runner(seen, unit_seconds=30.0).run(Job("planted", units("close")))
    assert result["status"] == "failed" and "no answer" in result["message"]


def test_what_the_budget_does_not_reach_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without starting a process, and each unit by name."""
    monkeypatch.delattr(subprocess, "Popen")
    seen: list[Result] = []
    jobs = [Job("one", units("echo", "echo")), Job("two", units("echo"))]
    results = runner(seen, seconds=0.0).run_all(jobs, at_once=2)
    assert [result["status"] for result in results] == ["skipped"] * 3
    assert {result["message"] for result in results} == {"the time budget is spent"}
    assert len(seen) == 3


def test_the_budget_ends_a_unit_that_runs() -> None:
    seen: list[Result] = []
    results = runner(seen, seconds=0.5).run(Job("planted", units("hang", "echo")))
    assert [result["status"] for result in results] == ["skipped", "skipped"]


def test_the_code_of_others_may_fail() -> None:
    assert failed({"comparison": True}) == "not comparable"
    assert failed({}) == "failed"
