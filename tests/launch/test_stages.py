"""Stages: once per settings, resumed, several at once; commands and their errors."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data.errors import InputError
from launch.commands import CommandError, command
from launch.stages import Stages, Task, require_own, run_tasks, seconds_left


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


def test_markers_of_earlier_versions_count(tmp_path: Path) -> None:
    """Folders of demos and comparisons that are finished stay finished."""
    marker = {
        "identity": "0182e55c77ffb95803bfe4d9900fcb42179261cdae64db4985614402a95537f6",
        "finished": True,
        "seconds": 3.25,
    }
    (tmp_path / "a").mkdir()
    (tmp_path / ".stages").mkdir()
    (tmp_path / ".stages" / "a.json").write_text(json.dumps(marker) + "\n")
    recorder = Recorder(tmp_path)
    assert [name for name, _ in recorder.go()] == ["b"]


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


class Runner:
    """Runs tasks below one output folder and records what happened."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.started: list[str] = []
        self.finished: list[str] = []
        self.running: set[subprocess.Popen[bytes]] = set()
        self.failing: set[str] = set()

    def task(self, name: str, *after: str, kind: str = "kind") -> Task:
        return Task(name, kind, {}, after, self.output / name, lambda: self.act(name))

    def act(self, name: str) -> None:
        self.started.append(name)
        if name in self.failing:
            raise CommandError(f"{name}.log says no luck", "no luck")

    def go(self, tasks: list[Task], jobs: int = 1) -> None:
        self.started, self.finished = [], []
        run_tasks(
            tasks,
            Stages(self.output, number=len(tasks)),
            jobs=jobs,
            running=self.running,
            finished=lambda task: self.finished.append(task.name),
        )


def test_tasks_wait_for_what_they_build_on_and_are_reused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = Runner(tmp_path)
    names = ["c", "a", "x/b"]
    tasks = [runner.task("c", "x/b"), runner.task("a"), runner.task("x/b", "a")]
    runner.go(tasks)
    assert runner.started == runner.finished == ["a", "x/b", "c"]
    assert "2 of 3 stages left, about 0 min" in capsys.readouterr().out
    runner.go(tasks)
    assert runner.started == [] and sorted(runner.finished) == sorted(names)
    assert "stages left" not in capsys.readouterr().out


def test_a_failure_leaves_out_only_what_builds_on_it(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    tasks = [runner.task("a"), runner.task("b", "a"), runner.task("c", "b"), runner.task("d")]
    runner.failing = {"a", "d"}
    with pytest.raises(InputError, match=r"2 of 4 stages failed, .* left out: a, d: no luck$"):
        runner.go(tasks)
    runner.failing = {"a"}
    with pytest.raises(InputError, match=r"1 of 4 stages failed, and 2 .* out: a: no luck"):
        runner.go(tasks)
    assert runner.finished == ["d"]
    runner.failing = set()
    runner.go(tasks)
    assert runner.started == ["a", "b", "c"]


def test_as_many_run_at_once_as_there_are_jobs(tmp_path: Path) -> None:
    meeting = threading.Barrier(2, timeout=10)
    tasks = [
        Task(name, "kind", {}, (), tmp_path / name, lambda: void(meeting.wait()))
        for name in ("a", "b")
    ]
    Runner(tmp_path).go(tasks, jobs=2)
    with pytest.raises(threading.BrokenBarrierError):
        alone = threading.Barrier(2, timeout=0.2)
        lonely = Task("c", "kind", {}, (), tmp_path / "c", lambda: void(alone.wait()))
        Runner(tmp_path).go([lonely, Runner(tmp_path).task("d")], jobs=1)


def void(_: object) -> None:
    pass


def test_a_stop_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    """The process of a stage notes that it was asked to stop, and no other stage starts."""
    runner = Runner(tmp_path)
    code = f"""
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.4)
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(tmp_path / "started")!r}).touch()
time.sleep(30)
"""
    words = [sys.executable, "-c", code]

    def work() -> None:
        command(words, makes=tmp_path / "made", log=tmp_path / "log", running=runner.running)

    def stop_when_started() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    before = signal.getsignal(signal.SIGTERM)
    # Tests before this one may have left a handler.
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    tasks = [Task("long", "kind", {}, (), tmp_path / "long", work), runner.task("next")]
    threading.Thread(target=stop_when_started, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.go(tasks)
        assert (tmp_path / "saved").exists()
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
    assert runner.started == [] and not runner.running
    assert signal.getsignal(signal.SIGTERM) == before


def test_time_left_is_estimated_by_kind(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    kinds = {"a": "slow", "b": "slow", "c": "fast", "d": "slow", "e": "fast", "f": "new"}
    tasks = [runner.task(name, kind=kind) for name, kind in kinds.items()]
    seconds = {"a": 10.0, "b": 14.0, "c": 2.0}
    assert seconds_left(tasks, tasks[3:4], seconds, 2) == 12
    assert seconds_left(tasks, tasks[3:5], seconds, 2) == 7
    assert seconds_left(tasks, tasks[5:], seconds, 1) == pytest.approx(26 / 3)
    assert seconds_left(tasks, tasks, {}, 1) is None


@pytest.mark.parametrize(
    "content", ["", "5", "[]", '{"identity": 5}', '{"identity": "x", "finished": true}', "[" * 9999]
)
def test_a_damaged_marker_makes_its_stage_run_again(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    for _ in range(2):
        Stages(tmp_path, number=1).run(
            "a", settings={}, folder=tmp_path / "a", action=lambda: calls.append("a")
        )
    assert calls == ["a"]
    (tmp_path / ".stages" / "a.json").write_text(content)
    Stages(tmp_path, number=1).run(
        "a", settings={}, folder=tmp_path / "a", action=lambda: calls.append("a")
    )
    assert calls == ["a", "a"]
    assert "a.json: " in capsys.readouterr().err


def test_a_folder_of_others_is_not_filled_with_stages(tmp_path: Path) -> None:
    require_own(tmp_path / "new")
    (tmp_path / ".lock").touch()
    require_own(tmp_path)
    (tmp_path / "text").mkdir()
    with pytest.raises(InputError, match=r"--output .* holds other files \(text\); name a new"):
        require_own(tmp_path)
    (tmp_path / ".stages").mkdir()
    require_own(tmp_path)
