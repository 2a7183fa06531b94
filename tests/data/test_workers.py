"""Worker processes end on Ctrl-C, and with their parent, whatever they are at."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.workers import CONTEXT, worker_pool
from tests.conftest import ROOT

WORK = """
import sys
import time
from ctypes import c_bool
from pathlib import Path
from data import cli
from data.workers import CONTEXT, worker_pool

FOLDER = Path(sys.argv[1])

def begin(stop):
    global STOP
    STOP = stop

def work(name, heeds):
    (FOLDER / name).touch()
    while not (heeds and STOP.value):
        time.sleep(0.01)
    (FOLDER / f"{name} ended").touch()

def main():
    stop = CONTEXT.RawValue(c_bool, False)
    kind = sys.argv[2]
    with worker_pool(2, begin, (stop,), lambda: setattr(stop, "value", True)) as submit:
        print("starting", flush=True)
        calls = [] if kind == "idle" else [(str(n), kind == "heeds") for n in range(5)]
        for future in submit(work, calls) | submit(time.sleep, [(0,), (0,)]):
            future.result()
        print("idle", flush=True)
        time.sleep(60)

if __name__ == "__main__":
    cli.run(main)
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Starts a process whose two workers are at work for ever ("deaf"), until they are told to stop
    ("heeds"), or wait for work ("idle")."""

    def begin(kind: str) -> subprocess.Popen[str]:
        script = tmp_path / "work.py"
        script.write_text(WORK)
        process = subprocess.Popen(
            [sys.executable, script, tmp_path, kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
            process_group=0,
            # A shell starts background processes with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert process.stdout is not None and process.stdout.readline() == "starting\n"
        return process

    return begin


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def ends(process: subprocess.Popen[str]) -> str:
    """What it said; no process of its group holds the pipes any more."""
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said.splitlines()[-1] == "interrupted"
    return said


def test_the_first_ctrl_c_waits_for_what_runs(
    start: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("heeds")
    wait_for(lambda: (tmp_path / "0").exists())
    os.killpg(process.pid, signal.SIGINT)
    assert "Traceback" not in ends(process)
    assert (tmp_path / "0 ended").exists() and not (tmp_path / "4").exists()


def test_the_second_ctrl_c_kills_what_runs(
    start: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("deaf")
    wait_for(lambda: (tmp_path / "1").exists())
    os.killpg(process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    os.killpg(process.pid, signal.SIGINT)
    assert "Traceback" not in ends(process)


@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_workers_that_start_say_nothing_of_it(
    start: Callable[[str], subprocess.Popen[str]], tmp_path: Path, seconds: float
) -> None:
    process = start("heeds")
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    assert "Traceback" not in ends(process)


def test_idle_workers_end_with_their_parent(start: Callable[[str], subprocess.Popen[str]]) -> None:
    process = start("idle")
    assert process.stdout is not None and process.stdout.readline() == "idle\n"
    process.kill()
    process.communicate(timeout=30)  # the pipes close with the last process


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C as Python has it: a shell's background processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_is_the_callers_again_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with worker_pool(1, print, (), lambda: None) as submit:
        assert signal.getsignal(signal.SIGINT) is not before
        (future,) = submit(abs, [(-3,)])
        assert future.result() == 3
    assert signal.getsignal(signal.SIGINT) is before
    assert not CONTEXT.active_children()
    # One that comes while the pool ends is not lost.
    with (
        pytest.raises(KeyboardInterrupt),
        worker_pool(1, print, (), lambda: signal.raise_signal(signal.SIGINT)),
    ):
        pass
