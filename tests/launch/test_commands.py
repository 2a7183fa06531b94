"""Commands that other commands start: their environment, statuses, and that none outlives us."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.cli import INTERRUPTED, STOPPED
from data.errors import InputError
from launch.commands import child_environment, command
from tests.conftest import ROOT


@pytest.mark.parametrize("status", [INTERRUPTED, STOPPED])
def test_a_command_that_was_asked_to_stop_stops_what_started_it(
    status: int, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        command([sys.executable, "-c", f"exit({status})"], makes=tmp_path / "made")
    with pytest.raises(InputError, match="exited with status 1"):
        command([sys.executable, "-c", "exit(1)"], makes=tmp_path / "made")


def test_sigterm_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    code = f"""
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.2)
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit({STOPPED})
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(tmp_path / "started")!r}).touch()
time.sleep(30)
"""

    def stop_when_started() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop_when_started, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        command([sys.executable, "-c", code], makes=tmp_path / "made")
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, whatever handler a test before has left."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("apart", [5.0, 0.0])
def test_a_second_ctrl_c_leaves_no_command_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: float
) -> None:
    """A repetition lets it save; a request of its own kills what would not end."""
    monkeypatch.setattr("launch.commands.SECONDS_OF_ONE_REQUEST", apart)
    code = f"""
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.kill(os.getppid(), signal.SIGINT)
time.sleep(0.3)
os.kill(os.getppid(), signal.SIGINT)
time.sleep(0.3 if {apart} else 30)
pathlib.Path({str(tmp_path / "saved")!r}).touch()
"""
    running: set[subprocess.Popen[bytes]] = set()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        command([sys.executable, "-c", code], makes=tmp_path / "made", running=running)
    assert not running and time.monotonic() - begun < 20
    assert (tmp_path / "saved").exists() == (apart > 0)


def test_a_command_of_ours_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    """Also where that one was killed."""
    child = (
        "import os, time; from data import cli, machine; machine.SECONDS_BETWEEN_LOOKS = 0.05; "
        "cli.run(lambda: (print(os.getpid(), flush=True), time.sleep(60)))"
    )
    code = (
        "import sys; from pathlib import Path; from launch.commands import command\n"
        f"command([sys.executable, '-c', {child!r}], makes=Path('x'), "
        "settings_file=Path(sys.argv[1]))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "shorn.toml")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline().startswith("$ ")
    number = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    # The pipe closes when the last process that writes to it is gone.
    assert parent.stdout.read() == ""
    parent.stdout.close()
    assert not Path(f"/proc/{number}/exe").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder whose own files are called like our packages."""
    for name in ("trainer.py", "data/__init__.py", "pruner.py", "launch/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('the user\\'s own')")
    return tmp_path


def run(folder: Path, *words: str, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("module", ["pruner.shear", "launch.evaluate", "launch.shorn"])
def test_the_working_folder_hides_none_of_our_packages(folder: Path, module: str) -> None:
    package = module.partition(".")[0]
    for name in (f"{package}.py", f"{package}/__init__.py"):  # Python itself would run this one
        (folder / name).unlink(missing_ok=True)
    result = run(folder, "-m", module, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "examples:" in result.stdout


def test_the_installed_command_and_what_it_starts_see_none_of_them(folder: Path) -> None:
    # As the script that pip makes: the working folder is not searched.
    installed = "from launch.shorn.__main__ import main; import sys; main(sys.argv[1:])"
    result = run(folder, "-P", "-c", installed, "shear", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    environment = child_environment()
    assert environment["PYTHONSAFEPATH"] == "1"
    for module in ("data.tokenize", "launch.evaluate"):
        started = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=folder, env=environment
        )
        assert started.returncode == 0


def test_what_hides_our_packages_for_good_is_named(folder: Path, tmp_path: Path) -> None:
    own = folder / "own" / "data"
    own.mkdir(parents=True)
    (own / "__init__.py").touch()
    path = f"{folder / 'own'}{os.pathsep}{ROOT}"
    for module in ("pruner.shear", "launch.evaluate"):
        result = run(tmp_path / "own", "-P", "-m", module, "--help", path=path)
        assert result.returncode == 2
        assert result.stderr.startswith(
            f"error: {own / '__init__.py'} hides Shorn's own `data`, which is in {ROOT}: rename it"
        )


@pytest.mark.parametrize("file", ["data/tokenize.py", "pruner/shear.py", "launch/cpt.py"])
def test_commands_start_as_files_too(file: str, tmp_path: Path) -> None:
    """As torchrun starts them, without an installation: nothing of ours is on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, str(ROOT / file), "--help"]
    result = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert f"usage: python {ROOT / file} [options]" in result.stdout
