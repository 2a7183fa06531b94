"""What lies in checkpoints/ is read as data alone, and only what is ours is counted or removed."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from data.errors import InputError
from tests.trainer.tiny import SHAPE, make_trainer, options
from trainer import parallel
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_files import (
    MARKER,
    METADATA_FILE,
    STATE_FILE,
    committed,
    latest_step,
    read_marker,
    read_metadata,
)
from trainer.optimizer import build_optimizer
from trainer.run import build_model, random_init


@pytest.fixture(scope="module")
def saved(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4; copy it before changing it."""
    place = tmp_path_factory.mktemp("saved")
    make_trainer(workspace, place, options(steps=4, save_interval=2)).fit()
    return place


@pytest.fixture
def place(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def folder(place: Path, step: int = 4) -> Path:
    return place / "checkpoints" / f"step-{step:08d}"


def commit(checkpoint: Path, **changes: Any) -> None:
    """Gives a changed checkpoint a marker with the right hashes."""
    marker = json.loads((checkpoint / MARKER).read_text())
    marker["sha256"] = {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
        for name in marker["sha256"]
    }
    (checkpoint / MARKER).write_text(json.dumps(marker | changes))


def resume(workspace: Path, place: Path, **changes: Any) -> int:
    return make_trainer(workspace, place, options(**({"steps": 4} | changes))).step


class Attack:
    """Pickled, it runs a command when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


def put_attack_into_metadata(checkpoint: Path, file: Path) -> None:
    metadata = pickle.loads((checkpoint / METADATA_FILE).read_bytes())
    metadata.planner_data = Attack(file)
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))


def put_attack_into_shards(checkpoint: Path, file: Path) -> None:
    """Into one of the optimizer's options, which the library unpickles by torch.load."""
    metadata = pickle.loads((checkpoint / METADATA_FILE).read_bytes())
    info = metadata.storage_data[MetadataIndex("optimizer.param_groups.0.lr")]
    attack = io.BytesIO()
    torch.save(Attack(file), attack)
    shard = checkpoint / info.relative_path
    metadata.storage_data[MetadataIndex("optimizer.param_groups.0.lr")] = _StorageInfo(
        info.relative_path, shard.stat().st_size, len(attack.getvalue())
    )
    with shard.open("ab") as stream:
        stream.write(attack.getvalue())
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))


def put_attack_into_state(checkpoint: Path, file: Path) -> None:
    torch.save({"step": 4, "x": Attack(file)}, checkpoint / STATE_FILE)


@pytest.mark.parametrize(
    "attack", [put_attack_into_metadata, put_attack_into_shards, put_attack_into_state]
)
def test_nothing_in_a_checkpoint_is_executed(
    attack: Callable[[Path, Path], None], workspace: Path, place: Path, tmp_path: Path
) -> None:
    attack(folder(place), tmp_path / "executed")
    commit(folder(place))
    with pytest.raises(InputError, match=r"step-00000004.*delete the folder .* step-00000002"):
        resume(workspace, place)
    assert not (tmp_path / "executed").exists()


def test_the_attacks_would_work(place: Path, tmp_path: Path) -> None:
    put_attack_into_metadata(folder(place), tmp_path / "executed")
    pickle.loads((folder(place) / METADATA_FILE).read_bytes())
    assert (tmp_path / "executed").exists()


def test_metadata_may_not_lead_to_other_files(place: Path) -> None:
    checkpoint = folder(place)
    files = json.loads((checkpoint / MARKER).read_text())["sha256"]
    metadata = read_metadata(checkpoint, files)
    for info in metadata.storage_data.values():
        info.relative_path = "../step-00000002/__0_0.distcp"
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="does not describe the files beside it"):
        read_metadata(checkpoint, files)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", pickle.dumps([1]), pickle.dumps(None), pickle.dumps(Metadata({})), b"\x80"],
)
def test_other_metadata_is_refused(content: bytes, workspace: Path, place: Path) -> None:
    (folder(place) / METADATA_FILE).write_bytes(content)
    commit(folder(place))
    with pytest.raises(InputError, match=r"\.metadata: .*; delete the folder"):
        resume(workspace, place)


def test_random_damage_to_metadata_and_state_is_one_error(workspace: Path, place: Path) -> None:
    checkpoint, rng = folder(place), random.Random(0)
    files = json.loads((checkpoint / MARKER).read_text())["sha256"]
    whole = (checkpoint / METADATA_FILE).read_bytes()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        (checkpoint / METADATA_FILE).write_bytes(content[: rng.choice([None, rng.randrange(4000)])])
        try:
            read_metadata(checkpoint, files)
        except InputError as error:
            assert ".metadata" in str(error)


def state(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(checkpoint / STATE_FILE, weights_only=True)
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": None}, r"`step` is missing or of another type"),
        ({"step": 3}, r"state\.pt: is of step 3, the checkpoint of step 4"),
        ({"stream": 5}, r"`stream` is missing or of another type"),
        ({"stream": {}}, r"the state of `stream` does not fit this run"),
        ({"callbacks": {"mixture": {}, "evaluate": {}}}, r"step-00000004"),
        ({"throughput": {"x": 1}}, r"the state of `throughput` does not fit"),
    ],
)
def test_another_state_is_refused(
    changes: dict[str, Any], message: str, workspace: Path, place: Path
) -> None:
    torch.save(state(folder(place)) | changes, folder(place) / STATE_FILE)
    commit(folder(place))
    with pytest.raises(InputError, match=message):
        resume(workspace, place)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02]q\x00.", b"x" * 5000])
def test_what_is_no_state_is_refused(content: bytes, workspace: Path, place: Path) -> None:
    (folder(place) / STATE_FILE).write_bytes(content)
    commit(folder(place))
    with pytest.raises(InputError, match=r"state\.pt: .*delete the folder"):
        resume(workspace, place)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b'{"step": 4}',
        b'{"step": "4", "sha256": {}}',
        b"[" * 5000,
    ],
)
def test_a_damaged_marker_is_named(content: bytes, workspace: Path, place: Path) -> None:
    (folder(place) / MARKER).write_bytes(content)
    with pytest.raises(InputError, match=r"step-00000004/COMMITTED: .*delete the folder .*02"):
        resume(workspace, place)
    shutil.rmtree(folder(place))
    assert resume(workspace, place) == 2


def test_names_are_matched_exactly(tmp_path: Path) -> None:
    for name in ("step-latest", "step-00000004.bak", "step-4", "step-000000004", "step-0000000٤"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).write_text("{}")
    (tmp_path / "step-00000007").write_text("a file")
    assert committed(tmp_path) == [] and latest_step(tmp_path) is None
    for step in (99_999_999, 100_000_000, 2):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / MARKER).write_text("{}")
    assert latest_step(tmp_path) == 100_000_000


def test_a_renamed_checkpoint_is_named(workspace: Path, place: Path) -> None:
    folder(place).rename(folder(place, 99))
    with pytest.raises(InputError, match=r"step-00000099: holds the state after step 4; call it "):
        resume(workspace, place)
    shutil.copytree(folder(place, 99), folder(place))
    with pytest.raises(InputError, match=r"holds the state after step 4; move it out of "):
        resume(workspace, place)


def test_what_is_not_ours_is_never_removed(workspace: Path, place: Path) -> None:
    """Put there while the run goes on: a later step, a renamed one, another run's."""
    trainer = make_trainer(workspace, place, options(steps=4))
    home = place / "checkpoints"
    checkpointer = Checkpointer(home, trainer.context, keep=1, identity={"seed": 0})
    shutil.copytree(folder(place), folder(place, 99))
    shutil.copytree(folder(place), folder(place, 3))
    shutil.copytree(folder(place, 2), folder(place, 1))
    commit(folder(place, 1), step=1, run={"seed": 5})
    (home / "step-00000005").mkdir()
    (home / "step-00000005" / "thesis.txt").write_text("the user's")
    trainer.step = 5
    checkpointer.save(trainer)
    checkpointer.prove(5)
    names = sorted(path.name for path in home.iterdir())
    aside = next(name for name in names if "other" in name)
    kept = [folder(place, step).name for step in (1, 3, 5)]
    assert names == [*kept, aside, "step-00000099"]
    assert (home / aside / "thesis.txt").exists()
    assert read_marker(folder(place, 5))["run"] == {"seed": 0}


def test_a_checkpoint_put_where_the_run_arrives_is_not_taken_for_its_own(
    workspace: Path, place: Path
) -> None:
    trainer = make_trainer(workspace, place, options(steps=4))
    checkpointer = Checkpointer(place / "checkpoints", trainer.context)
    shutil.copytree(folder(place), folder(place, 5))
    commit(folder(place, 5), step=5, run={"seed": 5})
    trainer.step = 5
    assert "run" not in read_marker(checkpointer.save(trainer))
    (aside,) = (place / "checkpoints").glob("*.other-*")
    assert json.loads((aside / MARKER).read_text())["run"] == {"seed": 5}


def test_tensors_too_many_too_few_or_of_other_sizes(workspace: Path, place: Path) -> None:
    context = parallel.init(threads=1)

    def restore(**changes: Any) -> None:
        trainer = make_trainer(workspace, place.parent / "empty", options(steps=4))
        trainer.model = build_model(
            replace(SHAPE, **changes), options(), context, load=random_init(0)
        )
        trainer.optimizer = build_optimizer(trainer.model, options())
        Checkpointer(place / "checkpoints", context).restore(trainer, folder(place))

    with pytest.raises(InputError, match=r"step-00000004: also holds .*layers\.1\..* and \d+ more"):
        restore(num_layers=1)
    with pytest.raises(InputError, match=r"lacks model\.lm_head|lacks .*lm_head\.weight"):
        restore(tie_embeddings=False)
    with pytest.raises(InputError, match=r"mlp.* with the sizes \(.*24.*\), not \(.*20"):
        restore(intermediate_size=20)
