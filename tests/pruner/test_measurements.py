"""Kept measurements come back as they were, or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.errors import InputError
from pruner.measurements import FILE, ROTATION, load_kept
from trainer import parallel

HELD_OUT = {"a": {"loss": 1.5, "perplexity": 4.5, "tokens": 31}}
METADATA = {
    "key": "k",
    "held_out": json.dumps(HELD_OUT),
    "reference": json.dumps({"a": 2}),
    "importance": "false",
}


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    context = parallel.init(threads=1)
    tensors = {"layer": torch.ones(1, 2), ROTATION: torch.eye(2)}
    save_file(tensors, tmp_path / FILE, METADATA | {"importance": "true"})
    found = load_kept(tmp_path, "k", context)
    assert found is not None and found.rotation is not None and found.importance is not None
    assert (found.held_out, found.reference) == (HELD_OUT, {"a": 2.0})
    assert load_kept(tmp_path, "other", context) is None


@pytest.mark.parametrize(
    "change",
    [
        {"held_out": "{"},
        {"held_out": "5"},
        {"held_out": '{"a": 5}'},
        {"reference": '{"a": "x"}'},
        {"reference": "[]"},
        {"importance": "[" * 9999},
        {"importance": "1"},
        {"held_out": None},
    ],
    ids=str,
)
def test_damaged_ones_are_measured_again_or_named(
    tmp_path: Path, change: dict[str, str | None]
) -> None:
    context = parallel.init(threads=1)
    tensors = {"none": torch.zeros(0)}
    save_file(tensors, tmp_path / FILE, METADATA)
    assert load_kept(tmp_path, "k", context) is not None
    changed = {key: value for key, value in (METADATA | change).items() if value is not None}
    save_file(tensors, tmp_path / FILE, changed)
    assert load_kept(tmp_path, "k", context) is None
    with pytest.raises(InputError, match="missing or damaged"):
        load_kept(tmp_path, None, context)
