"""Command lines mean the same with tyro and without."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from data.cli import parse
from data.errors import InputError
from data.options import Name, Positional
from launch.shorn.commands import COMMANDS
from tests.conftest import ROOT


@dataclass(frozen=True, kw_only=True, slots=True)
class Nested:
    kind: Annotated[Literal["dynamic", "fixed"], Name("mixture")] = "dynamic"
    clip: bool = True
    min_ratio: float | None = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    runs: Annotated[tuple[str, ...], Positional("RUN ...")] = ("runs/a",)
    data: Path
    seeds: tuple[int, ...] = (0, 1)
    names: tuple[str, ...] = ()
    fast: bool = False
    limit: int | None = None
    nested: Nested = field(default_factory=lambda: Nested(min_ratio=0.25))


def outcome(line: str) -> Any:
    """What a command line gives: the config's values, or that it is refused."""
    try:
        return dataclasses.asdict(parse(Config, section="x", argv=line.split()))
    except (InputError, SystemExit) as error:
        return error.code if isinstance(error, SystemExit) else 2


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "--data d",
        "--data=d --seeds=3",
        "--data d --seeds 1 2 3 --names a b --fast",
        "--data d --seeds --names",
        "--data d --no-clip --no-fast --mixture fixed",
        "--data d --min-ratio None --limit 5",
        "--data d --min_ratio 1e-3 --limit None",
        "--data d --limit -5 --min-ratio -0.5",
        "--data d --data e",
        "runs/x --data d",
        "runs/x runs/y --data d --fast",
        "--fast runs/x --data d",
        "--data a=b",
    ],
)
def test_the_same_values(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outcome(line)
    assert isinstance(expected, dict)
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert outcome(line) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--data is missing: give --data PATH"),
        ("--data", "expected one argument"),
        ("--data d --limit x", "--limit x: expected INT"),
        ("--data d --limit 1.5", "--limit 1.5: expected INT"),
        ("--data d --seeds 1 b", "--seeds 1 b: expected INT ..."),
        ("--data d --mixture other", "--mixture other: expected dynamic|fixed"),
        ("--data d --mixtur fixed", "unknown option --mixtur; did you mean --mixture?"),
        ("--data d --zzz", "unknown option --zzz; --help-all lists all options"),
        ("--data d --mix fixed", "unknown option --mix"),
        ("--data d --log-level loud", "--log-level loud: expected debug|info|warning|error"),
    ],
)
def test_the_same_refusals(line: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(line) == 2
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(InputError) as caught:
        parse(Config, section="x", argv=line.split())
    assert message in str(caught.value)


WITHOUT = """
import sys
for name in ("tyro", "zstandard", "gguf", "docstring_parser", "shtab"):
    sys.modules[name] = None  # as if it was not installed
import runpy
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run_without(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def python_without(code: str) -> subprocess.CompletedProcess[str]:
    blocked = WITHOUT.partition("import runpy")[0]
    command = [sys.executable, "-c", blocked + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


EVERY = """
import importlib
from data import cli
from launch.shorn.commands import COMMANDS
for name, command in COMMANDS.items():
    main = importlib.import_module(command.module).main
    for words in (["--help"], ["--help-all"], ["--no-such-option", "x"]):
        print("##", name, *words, flush=True)
        try:
            cli.run(lambda: main(words))
            print("status 0", flush=True)
        except SystemExit as stop:
            print("status", stop.code, flush=True)
"""


def test_every_command_starts_without_tyro() -> None:
    result = python_without(EVERY)
    assert result.returncode == 0, result.stderr
    outcomes = result.stdout.split("## ")[1:]
    assert len(outcomes) == 3 * len(COMMANDS)
    for outcome in outcomes:
        if "--no-such-option" in outcome:
            assert outcome.endswith("\nstatus 2\n"), outcome
        else:
            assert "examples:" in outcome and outcome.endswith("\nstatus 0\n"), outcome
    complaints = result.stderr.splitlines()
    assert len(complaints) == len(COMMANDS)
    assert all(line.startswith("error: unknown option --no-such-option; ") for line in complaints)


def test_help_is_the_same_without_docstrings() -> None:
    command = [sys.executable, "-m", "data.tokenize", "--help-all"]
    plain, stripped = (
        subprocess.run([*command[:1], *flags, *command[1:]], cwd=ROOT, capture_output=True)
        for flags in ([], ["-OO"])
    )
    assert (
        b"Turns text, or conversations, into token shards" in plain.stdout
        and stripped.stdout == plain.stdout
    )


IMPORTS = """
import importlib, pathlib
for package in ("data", "trainer", "pruner", "launch"):
    for path in pathlib.Path(package).rglob("*.py"):
        # The one file that needs lm-eval, an extra, is imported where tasks are asked for.
        if path.as_posix() == "launch/evaluate/harness.py":
            continue
        importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
"""


def test_every_module_imports_without_tyro_zstandard_and_gguf() -> None:
    result = python_without(IMPORTS)
    assert result.returncode == 0, result.stderr


def test_an_unknown_option_is_one_line_without_tyro() -> None:
    result = run_without("launch.bench_kernels", "--jsno", "x")
    assert result.returncode == 2
    assert result.stderr == "error: unknown option --jsno; did you mean --json?\n"
