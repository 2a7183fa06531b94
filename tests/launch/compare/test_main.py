"""`python -m launch.compare`: help, and what it refuses before anything is read."""

import pytest

from data.errors import InputError
from launch.compare.__main__ import main


def test_help_shows_methods_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "--variant" in printed and "python -m launch.compare --source" in printed


def test_impossible_calls_are_refused() -> None:
    required = ["--source", "/nowhere/model", "--input", "text"]
    with pytest.raises(InputError, match="--methods best: unknown"):
        main([*required, "--methods", "best"])
    with pytest.raises(InputError, match=r"--source /nowhere/model: no such"):
        main(required)
    with pytest.raises(SystemExit):
        main([*required, "--precision", "fp8"])
