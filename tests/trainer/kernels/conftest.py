"""Fixtures of the tests of operators."""

import importlib
from collections.abc import Iterator

import pytest

from tests.trainer.kernels.backends import INTERPRETED, TILES, running


@pytest.fixture(autouse=INTERPRETED)
def strict_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are checked, and divided among several programs."""
    from tests.trainer.kernels import interpreter

    interpreter.install()
    for name, tile in TILES.items():
        module = importlib.import_module(f"trainer.kernels.{name}_triton")
        for constant, value in tile.items():
            monkeypatch.setattr(module, constant, value)


@pytest.fixture(params=("triton",) if INTERPRETED else ("reference", "operator"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The implementation a test runs, see `running`."""
    with running(request.param):
        yield request.param
