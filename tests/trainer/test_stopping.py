"""A run that is asked to stop before it has anything to save says what is kept."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from trainer.stopping import STOP_SIGNALS, kept_is_said

WORK = """
import signal, sys, time
from pathlib import Path
from data import cli
from trainer.stopping import kept_is_said

def main():
    with kept_is_said(Path(sys.argv[1]) / "cpt.json", "shapes", "refit"):
        print("loading", flush=True)
        time.sleep(60)

cli.run(main)
"""


def _heed_signals() -> None:
    """A shell starts background processes with SIGINT ignored, and nohup with SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def stopped(output: Path, number: int, **environment: str) -> tuple[int, str]:
    """Status, as a shell gives it, and messages of a process that a signal meets at its start."""
    with subprocess.Popen(
        [sys.executable, "-c", WORK, str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        preexec_fn=_heed_signals,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    status = process.returncode
    return (status if status >= 0 else 128 - status), said


def test_what_is_measured_is_said_to_be_kept(tmp_path: Path) -> None:
    for name in ("shapes", "refit"):
        (tmp_path / name).mkdir()
    (tmp_path / "shapes" / "abc.json").touch()
    _, said = stopped(tmp_path, signal.SIGTERM)
    assert said.splitlines()[0] == (
        f"stopped by SIGTERM: what is measured is kept in {tmp_path / 'shapes'}; the same command "
        "goes on from it"
    )


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_each_signal_says_that_nothing_was_saved(number: signal.Signals, tmp_path: Path) -> None:
    status, said = stopped(tmp_path / "new", number)
    assert status == 128 + number
    first, *others = said.splitlines()
    assert first == (
        f"stopped by {number.name}: nothing was saved yet; the same command starts again"
    )
    assert others == (["interrupted"] if number == signal.SIGINT else [])
    assert not (tmp_path / "new").exists()


def test_what_is_kept_is_named(tmp_path: Path) -> None:
    for name in ("step-00000003/COMMITTED", "step-00000012/COMMITTED", "step-00000020/state.pt"):
        file = tmp_path / "checkpoints" / name
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    _, said = stopped(tmp_path, signal.SIGTERM)
    assert f"{tmp_path / 'checkpoints' / 'step-00000012'} is kept; run the same" in said
    (tmp_path / "cpt.json").write_text("{}")
    _, said = stopped(tmp_path, signal.SIGTERM)
    assert f"the run is finished, its report is {tmp_path / 'cpt.json'}" in said


def test_one_rank_speaks(tmp_path: Path) -> None:
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert "nothing was saved" in stopped(tmp_path, signal.SIGTERM, RANK="0", **group)[1]
    assert stopped(tmp_path, signal.SIGTERM, RANK="1", **group) == (143, "")


def test_what_is_ignored_stays_so_and_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with kept_is_said(tmp_path / "cpt.json"):
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) not in before
    finally:
        signal.signal(signal.SIGHUP, hang_up)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
