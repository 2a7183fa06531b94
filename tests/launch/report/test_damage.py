"""Files of a run that hold something else are named or left out with a note, never a traceback."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data.errors import InputError
from launch.report.lineage import lines_of
from launch.report.markup import element
from launch.report.page import page
from launch.report.run_folder import facts, read_run
from pruner.history import BINS, encode_mask
from tests.launch.report.test_lineage import shear, write

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 5, 2.5, "x", "", [], [1], {}, {"a": 1}, [[]], {"loss": 1}),
    *(1e999, 10**30, "<script>"),
)
SIZES = {"hidden": (1, 32, 32), "layer": (1, 2, 1), "intermediate": (2, 32, 32)}


def history_record(step: int) -> dict[str, Any]:
    families, masks = {}, {}
    for name, (rows, units, target) in SIZES.items():
        families[name] = {
            "rows": rows,
            "units": units,
            "target": target,
            "current_target": float(target),
            "alive": [target] * rows,
            "nonzero": [units] * rows,
            "multipliers": [0.5] * rows,
            "histogram": [1] * BINS,
        }
        masks[name] = encode_mask(torch.rand(rows, units))
    return {"step": step, "temperature": 0.1, "families": families, "masks": masks}


def finished(root: Path) -> Path:
    folder = shear(root, "run")
    (folder / "history.jsonl").write_text(
        "".join(json.dumps(history_record(step)) + "\n" for step in (1, 3, 6))
    )
    masks = {
        f"z.{name}": np.ones((rows, units), np.float32) for name, (rows, units, _) in SIZES.items()
    }
    save_file(masks, folder / "masks.safetensors")
    losses = {"a": {"loss": 4.0, "tokens": 62}}
    kinds = {n: {"name": n, "rows": r, "units": u, "target": t} for n, (r, u, t) in SIZES.items()}
    counts = {name: [target] * rows for name, (rows, _, target) in SIZES.items()}
    report = {
        "polarised": True,
        "families": kinds,
        "alive": counts,
        "kept": counts,
        "held_out": losses,
        "source_held_out": losses,
        "weights": {"a": 0.7, "b": 0.3},
        "tokens_per_second": 5.0,
        "before": [],
    }
    (folder / "shear.json").write_text(json.dumps(report))
    return folder


def show(folder: Path) -> str:
    """The page about a run, without its pictures; they are painted and thrown away."""
    from launch.report.curves import training_groups
    from launch.report.page import _mask_groups

    runs = [read_run(folder)]
    lines = lines_of(runs)
    groups = [*_mask_groups(runs), *training_groups(lines)]
    json.dumps([facts(one) for one in runs])
    return page(runs, lines, groups)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be put in the place of what is there."""
    yield path
    listed = enumerate(value) if isinstance(value, list) else ()
    for key, entry in value.items() if isinstance(value, dict) else listed:
        yield from places(entry, (*path, key))


def put(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    changed = copy.deepcopy(value)
    inner = changed
    if not path:
        return odd
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = odd
    return changed


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time; what they paint is checked before."""
    monkeypatch.setattr("launch.report.page._figure", lambda picture: element("p", picture.alt))


@pytest.mark.parametrize("name", ["shear.json", "run.json", "metrics.jsonl", "history.jsonl"])
def test_a_value_of_another_type_anywhere(
    tmp_path: Path, name: str, unpainted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(tmp_path)
    path = folder / name
    lines = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
    content = json.loads(lines[-1])
    cases = [(place, odd) for place in places(content) for odd in ODD]
    refused = 0
    for place, odd in random.Random(0).sample(cases, min(60, len(cases))):
        text = json.dumps(put(content, place, odd))
        path.write_text("\n".join([*lines[:-1], text]) + "\n")
        try:
            assert "<script>" not in show(folder), (place, odd)
        except InputError as error:
            refused += 1
            assert str(folder) in str(error) or name in str(error), (place, odd, error)
    assert refused or "left out line" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["5", "[]", '"x"', "null", "{", '{"step": true}', "[" * 5000])
def test_lines_that_are_no_records_are_counted(
    tmp_path: Path, line: str, unpainted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(tmp_path)
    for name in ("metrics.jsonl", "history.jsonl"):
        path = folder / name
        path.write_text(f"{line}\n" + path.read_text() + line[:2])
    (folder / "shear.json").unlink()
    assert "at step 6 of 6" in show(folder)
    noted = capsys.readouterr().err
    assert "metrics.jsonl: left out line 1" in noted and "history.jsonl: left out line 1" in noted


@pytest.mark.parametrize("content", [b"", b"{", b"5", b"[]", b"\xff\xfe", b'{"polarised": 1}'])
def test_a_damaged_report_is_named(tmp_path: Path, content: bytes) -> None:
    folder = finished(tmp_path)
    (folder / "shear.json").write_bytes(content)
    with pytest.raises(InputError, match=r"shear\.json: .*move it away"):
        read_run(folder)


def test_masks_of_another_model_are_named(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    save_file({"z.layer": np.ones((1, 3), np.float32)}, folder / "masks.safetensors")
    with pytest.raises(InputError, match=r"masks\.safetensors: its masks of 'layer'"):
        read_run(folder)


def test_a_run_of_training_with_odd_lines(tmp_path: Path, unpainted: None) -> None:
    folder = write(tmp_path, "cpt")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 7, "tokens": 700, "loss": NaN}\n')
    assert "Continued pre-training" in show(folder)
