"""Stages run once per settings, resume when interrupted, start afresh when settings change."""

import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import InputError
from launch.stages import CommandError, Stages, command


class Recorder:
    """Runs two dependent stages and records which of them worked and what they found."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.calls: list[tuple[str, list[str]]] = []

    def go(
        self, first: int = 1, second: int = 1, fail: bool = False
    ) -> list[tuple[str, list[str]]]:
        self.calls = []
        stages = Stages(self.output, number=2)
        stages.run(
            "a", settings={"x": first}, folder=self.output / "a", action=lambda: self.do("a")
        )
        stages.run(
            "b",
            settings={"x": second},
            after=("a",),
            folder=self.output / "b",
            action=lambda: self.do("b", fail),
        )
        return self.calls

    def do(self, name: str, fail: bool = False) -> None:
        folder = self.output / name
        self.calls.append((name, sorted(path.name for path in folder.iterdir())))
        (folder / "result").touch()
        if fail:
            raise RuntimeError("power cut")


def test_finished_stages_are_reused(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    assert recorder.go() == [("a", []), ("b", [])]
    assert recorder.go() == []


def test_changed_settings_rerun_the_stage_and_what_builds_on_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.go()
    assert recorder.go(second=2) == [("b", [])]
    assert recorder.go(first=2, second=2) == [("a", []), ("b", [])]


def test_an_interrupted_stage_finds_what_it_left(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        recorder.go(fail=True)
    assert recorder.go() == [("b", ["result"])]


def test_a_removed_folder_is_made_again(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.go()
    (tmp_path / "b" / "result").unlink()
    (tmp_path / "b").rmdir()
    assert recorder.go() == [("b", [])]


def test_command_prints_itself_and_ignores_the_users_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHORN_LR", "7")
    settings = tmp_path / "shorn.toml"
    code = (
        "import os; print('SHORN_LR' in os.environ, os.environ['SHORN_CONFIG']);"
        f"open({str(tmp_path / 'made')!r}, 'w').close()"
    )
    command([sys.executable, "-c", code], makes=tmp_path / "made", settings_file=settings)
    output = capfd.readouterr().out
    assert output.startswith(f"$ {sys.executable} -c ")
    assert f"False {settings}" in output


@pytest.mark.parametrize(("code", "reason"), [("exit(3)", "status 3"), ("", "stopped before")])
def test_a_failing_or_stopped_command_is_an_error(tmp_path: Path, code: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        command([sys.executable, "-c", code], makes=tmp_path / "made")


def test_a_logged_command_prints_nothing_and_is_known_while_it_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    running: set[subprocess.Popen[bytes]] = set()
    log = tmp_path / "logs" / "log"
    code = f"import sys; print('out'); print('err', file=sys.stderr); open({str(log)!r})"
    for _ in range(2):
        command([sys.executable, "-c", code], makes=log, log=log, running=running)
    assert capfd.readouterr().out == "" and not running
    assert log.read_text().count(f"$ {sys.executable} -c ") == 2
    assert log.read_text().count("\nout\n") == log.read_text().count("\nerr\n") == 2
    with pytest.raises(InputError, match=rf"last command in {log} exited with status 3"):
        command([sys.executable, "-c", "exit(3)"], makes=log, log=log)
    code = (
        "import sys; print('no'); print('error: too hot\\nerror: too cold'); print('by'); exit(2)"
    )
    with pytest.raises(CommandError, match=r"status 2: too cold; finished stages") as caught:
        command([sys.executable, "-c", code], makes=log, log=log)
    assert caught.value.reason == "too cold"
    with pytest.raises(InputError, match=r"status 3; finished") as later:
        command([sys.executable, "-c", "exit(3)"], makes=log, log=log)
    assert not isinstance(later.value, CommandError)
