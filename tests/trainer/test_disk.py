"""Room on the disk is looked at before the first step, for all that a run will write."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from tests.trainer.test_output import run
from tests.trainer.tiny import options
from trainer import cpt, disk, output
from trainer.config import CptConfig
from trainer.disk import room_problem, size_text


def test_room_is_looked_at_before_the_first_step(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=500_000))
    monkeypatch.delattr(cpt, "build_model")
    pattern = r"no room .*: \d+ kB are needed .*500 kB are free.*--keep-checkpoints \(now 2\)"
    with pytest.raises(InputError, match=pattern):
        run(workspace, tmp_path)
    # It fits where less is kept at a time.
    with pytest.raises(NameError):
        run(workspace, tmp_path, save_interval=0)


def test_only_what_makes_room_is_advised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: 1)
    once = room_problem(tmp_path, checkpoint=9, saves=1, existing=0, keep=1, model=9)
    assert once is not None and once.endswith("; free some space or name another --output")
    often = room_problem(tmp_path, checkpoint=9, saves=5, existing=0, keep=1, model=9)
    assert often is not None and "--save-interval 0" in often and "--keep-ch" not in often


@pytest.mark.parametrize(("name", "size"), [("float32", 4), ("bfloat16", 2), (None, 4)])
def test_room_is_counted_in_the_type_that_is_written(
    name: Any, size: int, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: list[dict[str, int]] = []

    def note(_: Path, **sizes: int) -> str:
        needs.append(sizes)
        return "full"

    monkeypatch.setattr(output, "room_problem", note)
    settings: dict[str, Any] = {"model": str(workspace / "model")}
    settings["data"] = str(workspace / "tokens")
    config = CptConfig(**settings, output=str(tmp_path), save_dtype=name, train=options(steps=6))
    with pytest.raises(InputError, match="full"):
        cpt.continue_pretraining(config)
    # The model is stored in float32, and nothing else says what the original's type was.
    assert needs[0]["checkpoint"] * size == needs[0]["model"] * disk.CHECKPOINT_BYTES


def test_what_a_run_will_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needed(saves: int, existing: int, keep: int, model: int = 0) -> int:
        for free in range(1000):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(disk, "free_bytes", lambda _, free=free: free)
                sizes = {"saves": saves, "existing": existing, "keep": keep}
                if not room_problem(tmp_path, checkpoint=100, model=model, **sizes):
                    return free
        raise AssertionError

    assert needed(10, 0, 2) == 300
    assert needed(10, 2, 2) == 100
    assert needed(1, 0, 2) == 100
    assert needed(1, 0, 2, model=40) == 140
    assert needed(10, 0, 2, model=140) == 340
    assert needed(0, 2, 2, model=40) == 40
    assert needed(10, 7, 2) == 0
    assert [size_text(n) for n in (0, 12, 1234, 999_900, 3e9, 2.5e13)] == [
        "0 bytes",
        "12 bytes",
        "1.23 kB",
        "1 MB",
        "3 GB",
        "25 TB",
    ]


@pytest.mark.parametrize(
    ("number", "full", "large"), [(errno.ENOSPC, True, False), (errno.EFBIG, False, True)]
)
def test_a_limit_on_files_is_no_full_disk(
    number: int, full: bool, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a library hides what the system said."""
    told = {errno.ENOSPC: "no space left", errno.EFBIG: "`ulimit -f` allows; raise it"}[number]
    for hidden in (False, True):
        error = OSError("600 requested and 2 written") if hidden else OSError(number, "")
        refused = OSError(number, "") if hidden else None
        monkeypatch.setattr(disk, "_refusal", lambda folder, refused=refused: refused)
        assert disk.is_out_of_space(error, tmp_path) is full
        assert disk.is_too_large(error, tmp_path) is large
        assert told in disk.why_unwritten(error, tmp_path)
    monkeypatch.setattr(disk, "_refusal", lambda folder: None)
    assert disk.why_unwritten(OSError("other"), tmp_path) == "other"
