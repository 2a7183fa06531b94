import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.files import follow_umask, replace_folder, save_tensors


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
