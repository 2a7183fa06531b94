"""An output folder belongs to one run: nothing is doubled, mixed up, replaced or begun again in
silence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from data.locks import folder_lock
from tests.conftest import ROOT
from tests.distributed import run_ranks
from tests.factories import write_model
from tests.trainer.tiny import losses, options, pretrain
from trainer import conclusion, cpt, output, parallel
from trainer.callbacks.checkpoint import CheckpointCallback
from trainer.checkpoint_files import MARKER, RECORD
from trainer.loop import Trainer
from trainer.output import require_apart, run_of
from trainer.saving import log_finished, require_copy

HOLD = """
import sys
from pathlib import Path
from data.locks import folder_lock
with folder_lock(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    sys.stdin.read()
"""


def run(workspace: Path, place: Path, **changes: Any) -> Trainer | None:
    given = {"model": workspace / "model", "data": workspace / "tokens"}
    given |= {name: changes.pop(name) for name in ("model", "data", "json") if name in changes}
    return pretrain(
        options(**({"steps": 6, "save_interval": 2} | changes)),
        output=place,
        reference_losses="alpha=2.0,beta=5.0",
        **given,
    )


def interrupted(workspace: Path, place: Path, **changes: Any) -> None:
    """A run of which checkpoints of steps 2 and 4 are left, as after a power failure."""

    class Cut(Exception):
        pass

    def cut(callback: CheckpointCallback, trainer: Trainer) -> None:
        on_step_end(callback, trainer)
        if trainer.step == 5:
            raise Cut

    on_step_end = CheckpointCallback.on_step_end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointCallback, "on_step_end", cut)
        patch.setattr(CheckpointCallback, "on_error", lambda *_: None)
        with pytest.raises(Cut):
            run(workspace, place, **changes)
    assert names(place) == ["step-00000002", "step-00000004"]


def names(place: Path) -> list[str]:
    return sorted(path.name for path in (place / "checkpoints").iterdir())


def messages_of_ranks(workspace: Path, place: Path) -> str:
    try:
        run(workspace, place)
    except InputError as error:
        return str(error)
    return ""


def test_a_second_run_is_refused_on_every_rank(workspace: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        messages = run_ranks(messages_of_ranks, 2, workspace, tmp_path / "out")
        owner.kill()
    assert len(set(messages)) == 1
    assert f"another process is training there (process {owner.pid} on" in messages[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_the_lock_is_free_after_a_run_and_after_an_error(workspace: Path, tmp_path: Path) -> None:
    run(workspace, tmp_path)
    with pytest.raises(InputError):
        run(workspace, tmp_path, seed=3)
    with folder_lock(tmp_path, "testing"):
        pass


def test_a_finished_run_leaves_its_model_and_no_checkpoints(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(workspace, tmp_path / "one")
    assert not (tmp_path / "one" / "checkpoints").exists()
    run(workspace, tmp_path / "two", keep_last_checkpoint=True)
    assert names(tmp_path / "two") == ["step-00000006"]
    capsys.readouterr()
    for place in ("one", "two"):
        before = sorted((tmp_path / place).rglob("*"))
        assert run(workspace, tmp_path / place) is None
        assert "this run is finished" in capsys.readouterr().out
        assert sorted((tmp_path / place).rglob("*")) == before


def test_a_finished_run_without_its_model_is_not_passed_over(
    workspace: Path, tmp_path: Path
) -> None:
    run(workspace, tmp_path, keep_last_checkpoint=True)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(InputError, match=r"its model/ is gone.*delete .*cpt\.json"):
        run(workspace, tmp_path)
    (tmp_path / "cpt.json").unlink()
    run(workspace, tmp_path)
    assert (tmp_path / "model" / "config.json").exists()
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(InputError, match="put it back from a copy, or name another --output"):
        run(workspace, tmp_path)


def test_a_finished_run_where_nothing_can_be_written_is_reported(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise InputError("no lock on a read-only mount")

    run(workspace, tmp_path, keep_last_checkpoint=True)
    monkeypatch.setattr(output, "folder_lock", refuse)
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: path.parent != tmp_path.parent and access(path, mode)
    )
    assert run(workspace, tmp_path) is None
    assert "this run is finished" in capsys.readouterr().out
    # What would have to train is refused before it starts.
    (tmp_path / "cpt.json").write_text("")
    with pytest.raises(InputError, match="no lock"):
        run(workspace, tmp_path)


def test_another_type_asked_of_a_finished_run_is_said_to_change_nothing(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = {"steps": 1}
    write_model(tmp_path / "model")
    (tmp_path / "cpt.json").write_text(json.dumps(report))
    context = parallel.init(threads=1)
    for dtype in (None, "float32"):
        log_finished(context, tmp_path / "cpt.json", None, dtype)
    assert "warning" not in capsys.readouterr().err
    log_finished(context, tmp_path / "cpt.json", None, "float16")
    assert "--save-dtype float16 changes nothing" in capsys.readouterr().err


def test_a_checkpoint_asked_of_a_finished_run_is_said_to_be_gone(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(workspace, tmp_path / "without")
    run(workspace, tmp_path / "without")
    run(workspace, tmp_path / "with", keep_last_checkpoint=True)
    run(workspace, tmp_path / "with", keep_last_checkpoint=True)
    assert "changes nothing" not in capsys.readouterr().err
    assert run(workspace, tmp_path / "without", keep_last_checkpoint=True) is None
    assert "--keep-last-checkpoint changes nothing: the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["run.json", "metrics.jsonl", ".lock", "model/config.json", "checkpoints/report.json"]
)
def test_a_copy_of_the_report_replaces_nothing_of_the_run(
    name: str, workspace: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out"
    with pytest.raises(InputError, match="the run itself writes"):
        run(workspace, place, json=str(place / name))
    assert not place.exists()


def test_a_copy_of_the_report_replaces_nothing_that_a_run_reads(
    workspace: Path, tmp_path: Path
) -> None:
    for path in (workspace / "tokens" / "manifest.json", workspace / "model" / "config.json"):
        before = path.read_bytes()
        with pytest.raises(InputError, match="would replace a file that"):
            run(workspace, tmp_path / "out", json=str(path))
        assert path.read_bytes() == before
    # Its own report is what it would copy, and any other name is free.
    context = parallel.init(threads=1)
    for free in (tmp_path / "cpt.json", tmp_path / "evaluation.json", tmp_path / "run" / "r.json"):
        free.parent.mkdir(exist_ok=True)
        free.write_text("{}")
        require_copy(context, free, tmp_path / "cpt.json")


def test_a_model_that_cannot_be_read_again_costs_no_checkpoint(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(path: Path, _: Any) -> None:
        if path.is_relative_to(tmp_path):
            raise InputError(f"{path}: damaged")

    monkeypatch.setattr(conclusion, "check_weights", damaged)
    with pytest.raises(InputError, match="damaged"):
        run(workspace, tmp_path / "out")
    assert names(tmp_path / "out") == ["step-00000004", "step-00000006"]
    assert not (tmp_path / "out" / "cpt.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00" * 40])
def test_a_damaged_report_is_not_a_finished_run(
    content: str, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(workspace, tmp_path, keep_last_checkpoint=True)
    report = (tmp_path / "cpt.json").read_bytes()
    (tmp_path / "cpt.json").write_text(content)
    run(workspace, tmp_path)
    assert "cpt.json" in capsys.readouterr().err
    again = json.loads((tmp_path / "cpt.json").read_text())
    assert again["held_out"] == json.loads(report)["held_out"]
    (tmp_path / "cpt.json").write_text(content)
    with pytest.raises(InputError, match=r"cpt\.json.*restore it"):
        run(workspace, tmp_path)


def test_lost_checkpoints_are_no_fresh_start(workspace: Path, tmp_path: Path) -> None:
    interrupted(workspace, tmp_path)
    before = losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(InputError, match=r"has trained there, but checkpoints/ holds no.*delete"):
        run(workspace, tmp_path)
    assert losses(tmp_path) == before
    (tmp_path / "checkpoints").symlink_to(tmp_path / "unmounted")
    with pytest.raises(InputError, match=r"checkpoints: no such file or folder"):
        run(workspace, tmp_path)
    (tmp_path / "checkpoints").unlink()
    # The way that the message names.
    (tmp_path / RECORD).unlink()
    run(workspace, tmp_path)
    kept = (tmp_path / "metrics.jsonl.old").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in kept] == before


def test_a_run_cut_off_before_its_first_checkpoint_begins_again(
    workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("the user's")
    run(workspace, tmp_path, save_interval=0)
    assert len(losses(tmp_path)) == 6 and names(tmp_path) == ["notes.txt"]


def test_an_unreadable_folder_of_checkpoints_is_named(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(workspace, tmp_path)
    iterdir = Path.iterdir

    def denied(path: Path) -> Any:
        if path.name == "checkpoints":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(InputError, match=r"checkpoints: permission denied; make it readable"):
        run(workspace, tmp_path)


def test_what_is_read_is_never_replaced(workspace: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    shutil.copytree(workspace / "model", place / "model")
    (tmp_path / "link").symlink_to(place)
    for model, out in ((place, place), (place / "model", place), (place, tmp_path / "link")):
        with pytest.raises(InputError, match=r"--model .*is what --output .* would replace"):
            run(workspace, out, model=model)
    with pytest.raises(InputError, match=r"--model .*/run/model: lies in --output"):
        run(workspace, tmp_path, model=place)
    with pytest.raises(InputError, match=r"--model .*/model: is the --output too"):
        run(workspace, place / "model", model=place)
    # Somebody's model, where this run would put its own.
    with pytest.raises(InputError, match=r"holds model, but no run\.json.*is not replaced"):
        run(workspace, place)
    assert sorted(p.name for p in place.iterdir()) == [".lock", "model"]


def test_teachers_and_data_in_the_output(tmp_path: Path) -> None:
    place = tmp_path / "run"
    apart = {"--model": tmp_path / "model"}
    require_apart(place, models=apart, data=place / "tokens")
    require_apart(place / "deeper", models={"--model": place}, data=place)
    with pytest.raises(InputError, match=r"--data .*is what --output"):
        require_apart(place, models=apart, data=place / "checkpoints" / "tokens")
    with pytest.raises(InputError, match=r"--data .*is the --output too"):
        require_apart(place, models=apart, data=place)
    with pytest.raises(InputError, match=r"--teacher .*lies in --output"):
        require_apart(place, models=apart | {"--teacher": place / "t"}, data=tmp_path / "d")
    # A run that was started like this before goes on.
    place.mkdir()
    (place / "run.json").write_text("{}")
    require_apart(place, models={"--model": place / "source"}, data=tmp_path / "d")


def test_a_link_to_a_model_leads_to_its_run(tmp_path: Path) -> None:
    run_folder = tmp_path / "runs" / "shear"
    write_model(run_folder / "model")
    (run_folder / "shear.json").write_text('{"steps": 1}')
    (tmp_path / "LINK").symlink_to(run_folder / "model")
    (tmp_path / "folder").symlink_to(run_folder)
    assert run_of(tmp_path / "LINK") == run_folder
    assert run_of(tmp_path / "folder" / "model") == tmp_path / "folder"
    # The weights lie on another disk: the written place is the run's.
    far = tmp_path / "disk" / "shear-model"
    far.parent.mkdir()
    (run_folder / "model").rename(far)
    (run_folder / "model").symlink_to(far)
    assert run_of(run_folder / "model") == run_folder
    assert cpt.find_model(str(tmp_path / "LINK")) == tmp_path / "LINK"


def test_a_lost_or_damaged_identity_is_read_from_the_checkpoint(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(workspace, tmp_path / "whole")
    for content in (None, "", "[1]", '{"steps":'):
        place = tmp_path / f"out{content}"
        interrupted(workspace, place)
        file = place / "run.json"
        before = file.read_text()
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(InputError, match=r"another configuration: --seed was 0, now 1"):
            run(workspace, place, seed=1)
        run(workspace, place)
        assert "run.json" in capsys.readouterr().err
        assert file.read_text() == before and losses(place) == losses(tmp_path / "whole")


def test_without_any_identity_nothing_is_resumed(workspace: Path, tmp_path: Path) -> None:
    interrupted(workspace, tmp_path)
    for folder in (tmp_path / "checkpoints").iterdir():
        forget(folder)
    before = (tmp_path / "run.json").read_text()
    for content, pattern in ((None, r"no run\.json, so nothing says which"), ("{", "restore it")):
        (tmp_path / "run.json").unlink()
        if content is not None:
            (tmp_path / "run.json").write_text(content)
        with pytest.raises(InputError, match=pattern) as caught:
            run(workspace, tmp_path)
        assert "delete" not in str(caught.value)
        (tmp_path / "run.json").write_text(before)
    # As a former version left it.
    run(workspace, tmp_path)
    assert len(losses(tmp_path)) == 6


def forget(folder: Path) -> None:
    """Makes a checkpoint one of a former version."""
    marker = json.loads((folder / MARKER).read_text())
    del marker["run"]
    (folder / MARKER).write_text(json.dumps(marker))


def test_a_finished_run_without_identity_is_not_renamed(workspace: Path, tmp_path: Path) -> None:
    run(workspace, tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match=r"holds a run, but no run\.json"):
        run(workspace, tmp_path, steps=5)
    assert not (tmp_path / "run.json").exists()


def test_a_foreign_checkpoint_is_refused(workspace: Path, tmp_path: Path) -> None:
    interrupted(workspace, tmp_path / "mine")
    interrupted(workspace, tmp_path / "other", seed=1)
    folder = "checkpoints/step-00000004"
    shutil.rmtree(tmp_path / "mine" / folder)
    shutil.copytree(tmp_path / "other" / folder, tmp_path / "mine" / folder)
    with pytest.raises(InputError, match=r"step-00000004 holds a run of .*--seed was 1.*move it"):
        run(workspace, tmp_path / "mine")
    # Another rate may be meant: it is said.
    shutil.rmtree(tmp_path / "mine" / folder)
    run(workspace, tmp_path / "mine")
    assert len(losses(tmp_path / "mine")) == 6


def test_another_kind_of_run_is_named(workspace: Path, tmp_path: Path) -> None:
    run(workspace, tmp_path)
    saved = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(saved | {"command": "shear"}))
    with pytest.raises(InputError, match=r"holds a shearing run: name another --output$"):
        run(workspace, tmp_path)


def test_a_model_that_goes_while_it_is_trained_is_named(workspace: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(workspace / "model", model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpt, "note_removal", lambda *_: model.rename(tmp_path / "away"))
        with pytest.raises(InputError, match=r"model: is gone by now.* the same command again"):
            run(workspace, out, model=model)
    (tmp_path / "away").rename(model)
    run(workspace, out, model=model)
    assert (out / "model" / "tokenizer.json").exists()


def test_a_finished_run_of_another_command_is_named(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("{}")
    (tmp_path / "shear.json").write_text('{"steps": 1}')
    with pytest.raises(InputError, match=r"holds a finished run of shearing \(shear\.json\); name"):
        run(workspace, tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_many_differences_go_to_a_file(workspace: Path, tmp_path: Path) -> None:
    run(workspace, tmp_path)
    with pytest.raises(
        InputError, match=r"--steps was 6.* and 2 more \(.*differences\.json\)"
    ) as e:
        run(workspace, tmp_path, steps=7, seed=4, lr=1.0, beta1=0.5, global_batch=16)
    assert len(str(e.value)) < 500 and "{" not in str(e.value)
    every = json.loads((tmp_path / "run.differences.json").read_text())
    assert every["seed"] == {"was": 0, "now": 4} and len(every) == 5


def test_a_run_of_a_version_with_fewer_options_goes_on(workspace: Path, tmp_path: Path) -> None:
    interrupted(workspace, tmp_path)
    for folder in (tmp_path / "checkpoints").iterdir():
        forget(folder)
    saved = json.loads((tmp_path / "run.json").read_text())
    del saved["clip"], saved["mixture"]["interval"]
    (tmp_path / "run.json").write_text(json.dumps(saved))
    run(workspace, tmp_path)
    assert len(losses(tmp_path)) == 6


def test_an_output_that_no_model_can_be_read_from_again_is_refused(
    workspace: Path, tmp_path: Path
) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9") / "run"
    with pytest.raises(InputError, match="the path is not UTF-8"):
        run(workspace, place)
    assert not place.parent.exists()
