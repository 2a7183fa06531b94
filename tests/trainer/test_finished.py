"""Finished runs whose model is elsewhere by now."""

from pathlib import Path

import pytest

from data.errors import InputError
from tests.factories import write_model
from trainer.cpt import find_model
from trainer.models.sources import resolve_model


@pytest.mark.parametrize("report", ["shear.json", "cpt.json", "finetune.json"])
@pytest.mark.parametrize("named", ["run", "run/model", "link", "run/checkpoints"])
def test_a_model_that_was_moved_is_asked_for(tmp_path: Path, report: str, named: str) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / report).write_text('{"steps": 1}')
    (tmp_path / "link").symlink_to(run / "model")
    for find in (find_model, resolve_model):
        with pytest.raises(
            InputError, match="a run that is finished, but its model/ is gone: name "
        ):
            find(str(tmp_path / named))
    write_model(tmp_path / "moved")
    assert find_model(str(tmp_path / "moved")) == tmp_path / "moved"
    (run / report).write_text("")  # cut off
    for find in (find_model, resolve_model):
        with pytest.raises(InputError, match=r"has not finished, .* --output \S*/run$"):
            find(str(tmp_path / named))


def test_checkpoints_that_are_left_are_told_of(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    for path in (tmp_path / "run.json", tmp_path / "cpt.json", step / "COMMITTED"):
        path.write_text('{"steps": 2}')
    with pytest.raises(InputError, match=r"delete \S*cpt\.json to have the run's command write it"):
        resolve_model(tmp_path)
