"""Tests that misbehave on the GPU that the CPU stands in for; run by test_gpu.py."""

import time

import torch

from tests.trainer.kernels import backends


def test_before(backend: str) -> None:
    assert torch.empty(8).isnan().all()


def test_loses_the_device(backend: str) -> None:
    """As after an illegal access."""

    def answer() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    if backend == "triton":
        backends.synchronize = answer


def test_between(backend: str) -> None:
    backends.synchronize()


def test_hangs(backend: str) -> None:
    if backend == "triton":
        time.sleep(600)


def test_after(backend: str) -> None:
    backends.synchronize()
