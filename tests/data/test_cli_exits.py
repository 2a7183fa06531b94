"""How commands end: one message, one status, and who of several ranks speaks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from data import cli
from data.cli import run
from data.errors import InputError
from data.log import logger
from tests.data.helpers import group, join

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("clean")


def raise_error(error: BaseException) -> None:
    raise error


def test_run_prints_input_errors_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(lambda: raise_error(InputError("steps 0 is below 1; raise it")))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: steps 0 is below 1; raise it\n"


ALLOCATOR = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nframe #0"
NO_ROOM = "failed to map segment from shared object"


def nested() -> None:
    nested()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Path("none/x").read_text(), "none/x: no such file or folder; correct the path"),
        (lambda: Path().write_text(""), ".: is a folder, not a file"),
        (lambda: Path("none").rename("other"), "none -> other: no such file or folder"),
        (lambda: raise_error(OSError("the mount is gone")), "the mount is gone"),
        (lambda: b"caf\xe9".decode(), "text is not utf-8 (byte 3: unexpected end of data, in b'"),
        (lambda: "café".encode("ascii"), "'é' cannot be written as ascii; set PYTHONUTF8=1"),
        (lambda: "caf\udce9".encode(), "'caf\\udce9': not UTF-8; rename the file or folder"),
        (lambda: raise_error(MemoryError()), "out of memory (MemoryError); ask for less at once"),
        (lambda: raise_error(RuntimeError(ALLOCATOR)), f"out of memory ({ALLOCATOR[:40]}"),
        (
            lambda: raise_error(ImportError("x.so: failed to map segment from shared object")),
            "out of",
        ),
        (nested, "something is nested too deeply (maximum recursion depth exceeded"),
    ],
)
def test_failures_of_the_system_are_one_line(
    action: Callable[[], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(action)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"error: {message}")


def test_the_traceback_of_a_failure_is_for_debugging(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "level", lambda: "debug")
    with pytest.raises(SystemExit):
        run(lambda: raise_error(PermissionError(13, "Permission denied", "here")))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("error: here: permission den")


def test_a_reader_that_has_seen_enough_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(lambda: raise_error(BrokenPipeError(32, "Broken pipe")))
    assert stop.value.code == 141 and capsys.readouterr().err == ""


def test_a_full_disk_under_stdout_ends_no_command() -> None:
    code = (
        "from data.cli import run; from data.log import logger\n"
        "def main():\n    logger.info('one')\n    logger.info('two')\n"
        "run(main)"
    )
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 0
    assert result.stderr == (
        "warning: stdout cannot be written (no space left on the disk, or its quota is used up; "
        "free some space)\n"
    )


def test_a_rank_that_lost_its_peers_lets_the_one_that_knows_speak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer\nmore")
    with pytest.raises(RuntimeError):
        run(lambda: raise_error(lost))
    left: list[int] = []
    monkeypatch.setattr(cli, "_has_process_group", lambda: True)
    monkeypatch.setattr(cli, "SECONDS_FOR_RANK_ZERO", 0.2)
    monkeypatch.setattr(cli.os, "_exit", left.append)
    start = time.monotonic()
    with pytest.raises(SystemExit):
        run(lambda: raise_error(lost))
    assert time.monotonic() - start >= 0.2 and left == [1]
    assert capsys.readouterr().err.startswith("error: lost the connection to another rank ([gloo")


def test_a_defect_on_one_rank_is_shown_and_left_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    join(monkeypatch, 2)
    left: list[int] = []
    monkeypatch.setattr(cli, "_has_process_group", lambda: True)
    monkeypatch.setattr(cli.os, "_exit", left.append)
    with pytest.raises(SystemExit):
        run(lambda: raise_error(ZeroDivisionError("here")))
    lines = capsys.readouterr().err.splitlines()
    assert left == [1] and lines[:2] == ["rank 2 failed:", "Traceback (most recent call last):"]
    assert lines[-1] == "ZeroDivisionError: here"


def test_a_command_that_runs_alone_waits_for_no_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    join(monkeypatch, 3)
    start = time.monotonic()
    with pytest.raises(SystemExit):
        run(lambda: raise_error(InputError("bad")), alone=True)
    assert time.monotonic() - start < 5 and capsys.readouterr().err == "error: bad\n"


def test_run_keeps_the_statuses_of_commands() -> None:
    for code in (cli.STOPPED, 1, 3):
        with pytest.raises(SystemExit) as stop:
            run(partial(sys.exit, code))
        assert stop.value.code == code
    run(lambda: sys.exit(0))
    run(sys.exit)


def test_a_reader_who_has_seen_enough_is_no_failed_check() -> None:
    """rich leaves the program with status 1 then."""
    script = (
        "import sys; from data.cli import run; from rich.console import Console\n"
        "from data.terminal import passing_over_what_is_not_shown\n"
        "def table():\n"
        "    for _ in range(3): Console().print('a row')\n"
        "def work():\n"
        "    if sys.argv[1] == 'done':\n"
        "        with passing_over_what_is_not_shown(): table()\n"
        "        print('all done', file=sys.stderr)\n"
        "    else:\n"
        "        table()\n"
        "run(work)\n"
    )
    for word, status, said in (("done", 0, "all done\n"), ("left", 128 + signal.SIGPIPE, "")):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-c", script, word]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=ROOT, text=True)
        os.close(writing)
        assert (done.returncode, done.stderr) == (status, said)


def test_another_python_than_the_one_with_our_packages_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(lambda: raise_error(ModuleNotFoundError("No module named 'torch'", name="torch")))
    assert stop.value.code == 2
    assert f"error: {sys.executable} has no package torch; use" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):  # a defect
        run(lambda: raise_error(ModuleNotFoundError("none", name="trainer.none")))


def test_run_lets_other_errors_and_results_through() -> None:
    run(lambda: None)
    with pytest.raises(ZeroDivisionError):
        run(lambda: raise_error(ZeroDivisionError()))


def test_run_exits_with_130_on_ctrl_c() -> None:
    with pytest.raises(SystemExit) as stop:
        run(lambda: raise_error(KeyboardInterrupt()))
    assert stop.value.code == 130


def test_other_ranks_let_rank_zero_speak_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    join(monkeypatch, 3)
    monkeypatch.setattr(cli, "SECONDS_FOR_RANK_ZERO", 0.2)
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        run(lambda: raise_error(InputError("bad")))
    assert stop.value.code == 2 and time.monotonic() - start >= 0.2
    assert capsys.readouterr().err == "error (rank 3): bad\n"
    logger.warning("not shown")
    assert capsys.readouterr().err == ""


def test_waiting_rank_obeys_sigterm_despite_a_graceful_handler() -> None:
    code = (
        "import signal; from data.cli import run; from data.errors import InputError\n"
        "signal.signal(signal.SIGTERM, lambda *a: None)\n"
        "def main():\n    print('ready', flush=True)\n    raise InputError('bad')\n"
        "run(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | group(1),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    process.terminate()
    assert process.wait(10) < 0
    process.stdout.close()


def test_an_error_with_a_process_group_skips_the_interpreters_teardown() -> None:
    code = (
        "import atexit; import torch.distributed as dist\n"
        "from data.cli import run; from data.errors import InputError\n"
        "atexit.register(print, 'teardown')\n"
        "def main():\n"
        "    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "    print('buffered')\n    raise InputError('bad')\n"
        "run(main)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (2, "buffered\n")
    assert result.stderr.endswith("error: bad\n")


def test_a_working_folder_that_is_gone_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"

    def lose() -> None:
        here.rmdir()
        Path("x").absolute()

    here.mkdir()
    os.chdir(here)
    for action in (lose, lambda: None):  # meanwhile; before the start
        with pytest.raises(SystemExit) as stop:
            run(action)
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("error: the working folder does not exist any")


@pytest.mark.parametrize("closed", ["1", "2", "0 1 2"])
def test_streams_closed_before_the_start_do_not_decide_the_status(closed: str) -> None:
    program = "from data.cli import run; from data.log import logger\n"
    program += "run(lambda: (print(5), logger.info('said'), logger.warning('warned')))"
    command = " ".join([f"{sys.executable} -c '{program.replace(chr(39), chr(34))}'"])
    command += "".join(f" {stream}>&-" for stream in closed.split())
    ended = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False)
