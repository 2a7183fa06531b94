"""What a measurement was made on is told, also where the driver tells nothing."""

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.bench_kernels.gpu import facts as gpu_facts
from launch.bench_kernels.gpu.facts import facts


def card(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0, **more)


def answers(monkeypatch: pytest.MonkeyPatch, smi: str | None, **more: Any) -> list[list[str]]:
    """A machine with one GPU whose nvidia-smi prints `smi`, or fails; the commands it was asked."""
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, "abc1234\n")
        if smi is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, smi)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card(**more))
    monkeypatch.setattr(gpu_facts.linear_cross_entropy, "adds_to", lambda *_: True)
    return asked


def test_the_driver_is_asked_about_this_card(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, "700.00 W, 580.65.06\n", uuid="1234-ab")
    found = facts(torch.device("cuda"))
    assert "--id=GPU-1234-ab" in asked[0]
    assert (found["gpu"], found["power cap"], found["driver"]) == (
        "NVIDIA H100",
        "700.00 W",
        "580.65.06",
    )
    assert found["memory"] == "80 GiB" and found["capability"] == "9.0"
    assert found["head's gradient"] == "summed by products"
    assert found["commit"] == "abc1234 with changes" and torch.__version__.startswith(
        found["torch"]
    )


@pytest.mark.parametrize("smi", [None, ""])
def test_a_silent_driver_is_no_error(smi: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, smi)
    found = facts(torch.device("cuda"))
    assert found["power cap"] == found["driver"] == gpu_facts.UNKNOWN


@pytest.mark.parametrize("built", [True, False])
def test_compiled_operators_are_told_from_missing_ones(
    built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, None)
    monkeypatch.setattr(gpu_facts.library, "_loaded", {"cuda"} if built else {"cpu"})
    monkeypatch.setattr(gpu_facts.library, "_problems", {})
    assert facts(torch.device("cuda"))["csrc"] == ("built" if built else "not built")
    monkeypatch.setattr(gpu_facts.library, "_problems", {"cuda": "does not load (old)"})
    assert facts(torch.device("cuda"))["csrc"].endswith("_shorn_cuda.so does not load (old)")


def test_a_lost_device_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(device: torch.device) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    answers(monkeypatch, None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lose)
    found = facts(torch.device("cuda"))
    assert found["gpu"] == "unknown (CUDA error: unspecified launch failure)"
    assert found["commit"].startswith("abc1234")


def test_without_a_gpu_and_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_facts, "_output", lambda command: "")
    found = facts(torch.device("cpu"))
    assert found["head's gradient"] == "summed apart"
    assert found["gpu"].startswith("none") and found["commit"] == gpu_facts.UNKNOWN
