"""Fixtures of the tests of operators."""

import importlib
import os
from collections.abc import Iterator

import pytest
import torch

from data.machine import available_cores
from tests.conftest import asks_for_gpu
from tests.trainer.kernels import backends
from tests.trainer.kernels.backends import INTERPRETED, TILES, on_device, running

GPU_PROCESSES = 12
NO_GPU = f"needs a GPU, and PyTorch {torch.__version__} sees none"


def pytest_configure(config: pytest.Config) -> None:
    if asks_for_gpu(config) and backends.has_gpu():
        backends.DEVICE = "cuda"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """-n auto on a GPU: tests wait for the compiler rather than for the GPU, so that many processes
    share it; one where the driver lets no more."""
    if not asks_for_gpu(config):
        return None
    return max(1, min(GPU_PROCESSES, available_cores() - 2)) if backends.can_be_shared() else 1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The implementations that a test with the fixture `backend` runs: on a GPU those of the
    operator its module is named for, on a CPU BACKENDS of the module. Tests marked "cpu" stay on
    the CPU."""
    if "backend" not in metafunc.fixturenames:
        return
    names = getattr(metafunc.module, "BACKENDS", ("reference",))
    marks: list[pytest.MarkDecorator] = []
    if asks_for_gpu(metafunc.config) and not metafunc.definition.get_closest_marker("cpu"):
        names, marks = backends.on_gpu(operator_of(metafunc.module.__name__)), [pytest.mark.gpu]
        if not backends.has_gpu():
            marks.append(pytest.mark.skip(reason=NO_GPU))
    elif INTERPRETED:
        names = ("triton",)
    metafunc.parametrize(
        "backend", [pytest.param(name, marks=marks) for name in names], indirect=True
    )


def operator_of(module: str) -> str:
    """swiglu for tests.trainer.kernels.test_swiglu."""
    return module.rpartition(".test_")[2]


@pytest.fixture(autouse=INTERPRETED)
def strict_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are checked, and divided among several programs."""
    from tests.trainer.kernels import interpreter

    interpreter.install()
    for name, tile in TILES.items():
        module = importlib.import_module(f"trainer.kernels.{name}_triton")
        for constant, value in tile.items():
            monkeypatch.setattr(module, constant, value)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The implementation a test runs, see `running`; the tensors it makes are on DEVICE."""
    if backends.is_missing(operator_of(request.module.__name__), request.param):
        pytest.skip("csrc/ is not built: pip install --no-build-isolation -e .")
    with on_device(), running(request.param):
        yield request.param
    try:
        backends.synchronize()
    except RuntimeError as error:
        # Nothing works any more in this process. Where there are several, a new one goes on.
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the GPU answers no more: {error}\nWith -n 1 a new process would go on", 1)
