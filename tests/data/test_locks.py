"""An output folder has one writer at a time, and the next one learns who that is."""

import subprocess
import sys
from pathlib import Path

import pytest

from data import locks
from data.errors import InputError
from data.locks import folder_lock

HOLD = """
import sys
from pathlib import Path
from data.locks import folder_lock
with folder_lock(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_refused_and_a_killed_owner_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        pattern = f"another process is training there \\(process {owner.pid} on "
        with pytest.raises(InputError, match=pattern), folder_lock(folder, "training"):
            pass
        # The tasks of srun would each wait, or train apart, if they were told to.
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
        pattern += ".*; srun started 8 tasks .*torchrun"
        with pytest.raises(InputError, match=pattern), folder_lock(folder, "training"):
            pass
        owner.kill()
    with folder_lock(folder, "training"):
        pass
    with folder_lock(folder, "training"):
        pass


def test_a_place_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output .*file"), folder_lock(tmp_path / "file", "x"):
        pass
    with pytest.raises(InputError, match="is a file"), folder_lock(tmp_path / "file" / "a", "x"):
        pass
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "far")
    with pytest.raises(InputError, match="dangling"), folder_lock(tmp_path / "dangling", "x"):
        pass
    named = rf"/dangling/run \({tmp_path}/dangling\): exists already, perhaps as a link that leads"
    with pytest.raises(InputError, match=named), folder_lock(tmp_path / "dangling" / "run", "x"):
        pass


FULL = """
import resource, sys
from pathlib import Path
from data.errors import InputError
from data.locks import folder_lock
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    with folder_lock(Path(sys.argv[1]), "training"):
        raise InputError("the run's own message")
except InputError as error:
    print(error)
"""


def test_without_room_for_the_owner_s_name_the_lock_holds_and_hides_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "the run's own message\n"


def test_a_lock_that_is_not_to_stay_goes_with_its_block(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    with folder_lock(folder, "tokenizing", remove=True):
        assert (folder / ".lock").exists()
        with pytest.raises(InputError, match="another process"), folder_lock(folder, "tokenizing"):
            pass
    assert not list(folder.iterdir())
    with pytest.raises(ZeroDivisionError), folder_lock(folder, "tokenizing", remove=True):
        raise ZeroDivisionError
    assert not list(folder.iterdir())


def test_a_lock_removed_before_it_was_held_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = locks.fcntl.flock

    def removed_first(file: int, operation: int) -> None:
        (tmp_path / ".lock").unlink(missing_ok=True)
        original(file, operation)

    monkeypatch.setattr(locks.fcntl, "flock", removed_first)
    with pytest.raises(InputError, match="has just left; try again"), folder_lock(tmp_path, "x"):
        pass


def test_nothing_is_written_where_a_run_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"command": "shear"}')
    for name in ("model", "checkpoints", "model/tokens", "refit"):
        refused = pytest.raises(InputError, match=f"{name}: is where the run in {tmp_path} keeps")
        with refused, folder_lock(tmp_path / name, "tokenizing"):
            pass
        assert not (tmp_path / name).exists()
    for free in (tmp_path, tmp_path / "tokens", tmp_path / "my/model"):
        with folder_lock(free, "tokenizing"):
            pass
