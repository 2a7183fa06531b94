"""Runs stand in lines by whose model they started from, and only equal text is compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from launch.report.curves import joined, newest_text, training_groups
from launch.report.lineage import is_random, lines_of, run_names
from launch.report.run_folder import Run, read_run
from launch.report.verdicts import verdict_sections
from trainer.models.sources import weights_fingerprint

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_layers": 2}
SIZES |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def write(
    root: Path,
    name: str,
    *,
    after: str | None = None,
    tokens: int = 62,
    loss: float = 4.0,
    **identity: Any,
) -> Path:
    """A run of six steps with a model of its own, which started from that of the run `after`."""
    folder = root / name
    (folder / "model").mkdir(parents=True)
    weights = np.full(4, sum(name.encode()), np.float32)
    save_file({"w": weights}, folder / "model" / "model.safetensors")
    lines = []
    for step in range(1, 7):
        record: dict[str, Any] = {"step": step, "tokens": 100 * step, "loss": loss}
        record |= {"distill_kl": 0.1 * step, "domain_weights": {"a": 0.7, "b": 0.3}}
        if step % 3 == 0:
            record["held_out"] = {"a": {"loss": loss, "tokens": tokens}}
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    content: dict[str, Any] = {f"model.{key}": size for key, size in SIZES.items()}
    content |= {"model.family": "llama", "steps": 6, "command": "cpt", "data": "f", "seq_len": 32}
    if after is not None:
        content["initial_weights"] = weights_fingerprint(root / after / "model")
    (folder / "run.json").write_text(json.dumps(content | identity))
    return folder


def named(root: Path, *names: str) -> list[Run]:
    return [read_run(root / name) for name in names]


def shear(root: Path, name: str, **others: Any) -> Path:
    return write(root, name, command="shear", target="layers=1", source="s" + name, **others)


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")])
def test_lines_follow_the_models_not_the_order_of_names(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    write(tmp_path, "a")
    write(tmp_path, "b", after="a")
    write(tmp_path, "c", after="a")
    found = lines_of(named(tmp_path, *order))
    chains = sorted([run.folder.name for run in line.runs] for line in found)
    first = min(order.index("b"), order.index("c"))
    follower = order[first]
    assert chains == sorted([["a", follower], [{"b": "c", "c": "b"}[follower]]])
    curves = {curve.run.folder.name: curve.tokens for curve in joined(found)}
    assert curves["a"] == [100 * step for step in range(1, 7)]
    # The two were trained from the same model, not one after the other.
    assert curves["b"] == curves["c"] == [600 + 100 * step for step in range(1, 7)]


def test_a_baseline_named_first_is_no_start_of_a_line(tmp_path: Path) -> None:
    shear(tmp_path, "shear")
    write(tmp_path, "random", init="random")
    write(tmp_path, "cpt", after="shear")
    lines = lines_of(named(tmp_path, "random", "shear", "cpt"))
    assert [line.name for line in lines] == ["cpt", "random"]
    tokens = {curve.run.folder.name: curve.tokens[0] for curve in joined(lines)}
    assert is_random(lines[1].runs[0]) and tokens["cpt"] == 700


def test_runs_whose_models_are_gone_follow_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = write(tmp_path, name, initial_weights="unknown")
        (folder / "model" / "model.safetensors").unlink()
    assert [line.name for line in lines_of(named(tmp_path, "a", "b"))] == ["b"]


def test_folders_that_seem_to_have_made_each_other_are_all_shown(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write(tmp_path, "b", after="a")
    mark = weights_fingerprint(tmp_path / "b" / "model")
    identity = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps(identity | {"initial_weights": mark}))
    found = lines_of(named(tmp_path, "a", "b"))
    assert sorted(run.folder.name for line in found for run in line.runs) == ["a", "b"]


def test_names_tell_folders_apart(tmp_path: Path) -> None:
    write(tmp_path / "x", "run")
    write(tmp_path / "y", "run")
    write(tmp_path, "other")
    names = run_names(
        [*named(tmp_path / "x", "run"), *named(tmp_path / "y", "run"), *named(tmp_path, "other")]
    )
    assert names == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run"), "other"]


def test_points_of_other_sequences_are_not_joined(tmp_path: Path) -> None:
    shear(tmp_path, "shear", tokens=124, loss=5.6)
    write(tmp_path, "cpt", after="shear", loss=5.4)
    lines = lines_of(named(tmp_path, "shear", "cpt"))
    curves = joined(lines)
    text = newest_text(curves)
    assert [len(curve.held_out(text)[0]) for curve in curves] == [0, 2]
    (group,) = (group for group in training_groups(lines) if group.title == "Loss")
    assert "Hollow points" in group.caption and "5.400 first, 5.400 last" in group.pictures[0].alt
    assert [picture.title for picture in group.pictures] == [
        *("all domains", "divergence from the teacher")
    ]
    assert "0.100 first, 0.600 last" in group.pictures[1].alt
    write(tmp_path, "random", init="random", tokens=124)
    several = lines_of(named(tmp_path, "shear", "cpt", "random"))
    assert "model of shear" in "".join(verdict_sections(several))
    (domains,) = (group for group in training_groups(lines) if group.title == "Domains")
    assert "Without held-out text: b." in domains.caption


def test_two_shearing_runs_are_compared(tmp_path: Path) -> None:
    shear(tmp_path, "one", loss=3.0)
    shear(tmp_path, "two", loss=2.5)
    shear(tmp_path, "three", tokens=31)
    lines = lines_of(named(tmp_path, "one", "two", "three"))
    groups = {group.title: group for group in training_groups(lines)}
    assert {"one: training text", "two: both texts"} <= {t for _, t in groups["Loss"].legend}
    assert len([p for p in groups["Domains"].pictures if p.title.startswith("weight")]) == 3
    for group in groups.values():
        assert group.png().startswith(b"\x89PNG")
    page = "".join(verdict_sections(lines))
    assert "Verdict: one so far, at step 6 of 6" in page
    beside = page.split("Runs beside each other")[1]
    assert "3.0000" in beside and "2.5000" in beside and "other text" in beside
