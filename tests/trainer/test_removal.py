"""Checkpoints of finished runs: what a kill before their removal leaves, and what stays."""

import shutil
from pathlib import Path

import pytest

from data.errors import InputError
from tests.trainer.test_output import names, run
from trainer import cpt
from trainer.checkpoint_files import RECORD


@pytest.mark.parametrize("keep", [0, 1])
def test_checkpoints_that_a_kill_left_go_at_the_next_start(
    keep: int, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpt, "remove_checkpoints", lambda *_: None)
        run(workspace, tmp_path, keep_last_checkpoint=bool(keep))
    left = names(tmp_path)
    assert len(left) == 2
    # Another configuration removes nothing.
    with pytest.raises(InputError, match="another configuration"):
        run(workspace, tmp_path, seed=3)
    assert names(tmp_path) == left
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "copy")
    # What was asked for when the run ended counts.
    assert run(workspace, tmp_path, keep_last_checkpoint=not keep) is None
    assert "that it left when it was cut off at its end are removed" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*")) == left[2 - keep :]
    shutil.copytree(tmp_path / "copy", tmp_path / "checkpoints", dirs_exist_ok=True)
    run(workspace, tmp_path)
    assert names(tmp_path) == left


def test_checkpoints_of_a_run_that_a_former_version_finished_stay(
    workspace: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpt, "remove_checkpoints", lambda *_: None)
        run(workspace, tmp_path)
    left = names(tmp_path)
    for content in (b"", b"[]", b'{"step": 6}', b'{"step": 6, "keep": "0"}'):
        (tmp_path / RECORD).write_bytes(content)
        run(workspace, tmp_path)
        assert names(tmp_path) == left
