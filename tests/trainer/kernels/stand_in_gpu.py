"""Pytest plugin: the CPU stands in for the GPU that `pytest -m gpu` asks for (test_gpu.py)."""

import pytest

from tests.trainer.kernels import backends

backends.has_gpu = lambda: True


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    backends.DEVICE = "cpu"
