"""Files and folders are replaced whole or not at all, with usual permissions."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.errors import InputError
from data.files import follow_umask, replace_folder, require_distinct, require_writable
from trainer.models.hf import save_tensors


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_permissions_follow_the_umask(umask: int, tmp_path: Path) -> None:
    previous = os.umask(umask)
    try:
        file = tmp_path / "weights.safetensors"
        save_tensors({"x": torch.arange(6).view(2, 3).T}, file, {"key": "value"})
        folder = tmp_path / "private"
        folder.mkdir(mode=0o700)
        (folder / "inner").touch(mode=0o600)
        follow_umask(folder)
        assert os.umask(umask) == umask
    finally:
        os.umask(previous)
    assert mode(file) == mode(folder / "inner") == 0o666 & ~umask
    assert mode(folder) == 0o777 & ~umask
    assert torch.equal(load_file(file)["x"], torch.arange(6).view(2, 3).T)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["private", "weights.safetensors"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("new", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


def test_a_writable_file_is_accepted_and_nothing_is_left_behind(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("kept")
    before = old.stat().st_mtime_ns
    for path in (old, tmp_path / "new.json", tmp_path / "a" / "b" / "new.json"):
        require_writable(path, "--json")
    assert list(tmp_path.iterdir()) == [old]
    assert (old.read_text(), old.stat().st_mtime_ns) == ("kept", before)


@pytest.mark.parametrize(
    ("name", "content", "replaced"),
    [
        ("page", b"<!doctype html>\n<html>", True),
        ("numbers", b'{"a": 1}\n', True),
        ("old.json", b"cut of", True),
        ("empty", b"", True),
        ("docs.jsonl", b'{"text": "a"}\n{"text": "b"}\n', False),
        ("notes.txt", b"some text", False),
        ("program", b"\x7fELF\0", False),
    ],
)
def test_only_what_commands_write_is_replaced(
    tmp_path: Path, name: str, content: bytes, replaced: bool
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if replaced:
        require_writable(path, "--output")
        return
    with pytest.raises(InputError, match=f"^--output .*{name}: would replace a file that is no"):
        require_writable(path, "--output")


def test_a_table_is_replaced_by_a_table_alone(tmp_path: Path) -> None:
    path = tmp_path / "times"
    path.write_text("kernel,seconds\nrope,1\n")
    require_writable(path, "--csv")
    with pytest.raises(InputError, match="no result"):
        require_writable(path, "--json")


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"^--json .*: cannot write there: part of the path is a file"
    ):
        require_writable(tmp_path / "file" / "below" / "report.json", "--json")
    with pytest.raises(InputError, match=r"^--copy .* is a folder; name a file in it"):
        require_writable(tmp_path, "--copy")
    with pytest.raises(InputError, match="cannot write there: the name is too long"):
        require_writable(tmp_path / ("x" * 300), "--json")
    with pytest.raises(InputError, match="cannot write there"):
        require_writable(Path("/proc/report.json"), "--json")


def test_no_file_takes_the_place_of_a_device_or_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "stream").symlink_to("/proc/self/fd/1")
    for path in (tmp_path / "pipe", tmp_path / "stream", Path("/dev/null"), Path("/dev/stdout")):
        with pytest.raises(InputError, match="is a device or a pipe, which a file would replace"):
            require_writable(path, "--json")


@pytest.mark.parametrize(
    "name",
    ["config.json", "run.json", "manifest.json", "model-00001-of-00002.safetensors", "00000.bin"],
)
def test_no_file_takes_the_place_of_a_record(name: str, tmp_path: Path) -> None:
    require_writable(tmp_path / name, "--json")
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=f"^--json .*{name}: would replace a file that a run"):
        require_writable(tmp_path / name, "--json")


def test_two_options_name_two_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("text")
    require_distinct({"--text": tmp_path / "text", "--json": tmp_path / "json", "--csv": None})
    for other in (tmp_path / "text", tmp_path / "link", f"{tmp_path}/x/../text"):
        with pytest.raises(InputError, match=r"^--text and --json name one file"):
            require_distinct({"--text": tmp_path / "text", "--json": other})
