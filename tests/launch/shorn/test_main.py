"""`shorn`: its commands, what it says about itself, and what it refuses."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.cli import STOPPED
from data.errors import InputError
from launch.shorn import overview
from launch.shorn.__main__ import main, start
from launch.shorn.commands import COMMANDS
from launch.shorn.completion import flags_of
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the machine, and 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["shorn"])


def status(*words: str) -> int:
    """The exit status of `shorn WORDS`."""
    try:
        main(list(words))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_alone_it_lists_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*words) == 0
    printed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in printed and command.summary in printed
    assert "examples:" in printed and max(map(len, printed.splitlines())) <= 80


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise PackageNotFoundError(name)

    assert status("--version") == 0
    monkeypatch.setattr(overview, "installed_version", unknown)
    assert status("--version") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("shorn ") and second == "shorn 0.1.0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shera"], "unknown command 'shera'; did you mean `shorn shear`?"),
        (["train"], "unknown command 'train'; known: tokenize, shear"),
        (["--rank", "2", "cpt"], "unknown option --rank; did you mean --ranks?"),
        (["--ranks", "0", "cpt"], "--ranks 0: must be at least 1"),
        (["--ranks", "2", "report"], "shorn report runs as one process: leave out --ranks 2"),
        (["tokenize", "--ranks=2"], "shorn tokenize runs as one process: leave out --ranks 2"),
        (["--ranks", "2", "demo"], "shorn demo runs as one process"),
        (["demo", "--ranks", "3", "--batch", "8"], "--batch 8: must be a multiple of --ranks 3"),
    ],
)
def test_what_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*words) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_of_every_command(name: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(name, flag) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: shorn {name} ")
    assert ("--ranks N" in printed.splitlines()[0]) == COMMANDS[name].on_ranks
    examples = printed.partition("\nexamples:\n")[2]
    assert examples.startswith(f"  shorn {name}") and "python" not in examples.split("\n\n")[0]
    assert max(map(len, printed.splitlines())) <= 80
    if flag == "--help-all":
        missing = [word for word in flags_of(name) if word not in printed]
        assert all(word.startswith(("--no-", "--help")) for word in missing), missing
    assert ("--help-all shows" in printed.splitlines()[-1]) == (
        flag == "--help" and name != "report"
    )


def test_help_of_ranks_starts_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--ranks", "2", "cpt", "--help") == 0
    assert "usage: shorn cpt" in capsys.readouterr().out


def test_only_the_command_that_runs_is_imported() -> None:
    code = (
        "import sys; from launch.shorn.__main__ import main\n"
        "try: main(['tokenize', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'pruner', 'launch.cpt'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_completion_in_bash(tmp_path: Path) -> None:
    def shell(script: str) -> list[str]:
        result = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        return result.stdout.split()

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.shorn", "--completion", "bash"]
    script = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (tmp_path / "shorn.bash").write_text(script.stdout)
    ask = 'source shorn.bash; COMP_WORDS=({}); COMP_CWORD={}; _shorn; echo "${{COMPREPLY[@]}}"'
    assert shell("bash -n shorn.bash") == []
    assert shell(ask.format("shorn", 1) + " ; true") == list(COMMANDS)
    assert shell(ask.format("shorn b", 1)) == ["bench-kernels", "bench-shear", "bench-scoring"]
    assert shell(ask.format("shorn --r", 1)) == ["--ranks"]
    assert shell(ask.format("shorn --ranks 2 cpt --mixture-c", 4)) == [
        "--mixture-ceiling",
        "--mixture-clip",
    ]
    assert shell(ask.format("shorn cpt --model ru", 3)) == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_in_other_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--completion", shell) == 0
    printed = capsys.readouterr().out
    for word in ("bench-shear", "global-batch", "no-compact"):
        assert word in printed


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("shear", "pruner.run.shear"),
        ("cpt", "trainer.cpt.continue_pretraining"),
        ("finetune", "trainer.finetune.finetune"),
    ],
)
def test_a_run_that_was_stopped_ends_with_75(
    command: str, function: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that `shorn shear && shorn cpt` goes no further."""
    monkeypatch.chdir(tmp_path)
    outcome: list[object] = [SimpleNamespace(stopping=True)]
    monkeypatch.setattr(function, lambda _: outcome[0])
    with pytest.raises(SystemExit) as stop:
        start([command])
    assert stop.value.code == STOPPED == 75
    for outcome[0] in (SimpleNamespace(stopping=False), None):
        start([command])


def test_memory_that_runs_out_before_training_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pruner.run.shear", measure)
    with pytest.raises(InputError, match="out of memory at --micro-batch 4, --seq-len 4096; run"):
        start(["shear"])
