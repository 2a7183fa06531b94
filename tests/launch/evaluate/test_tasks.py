"""`shorn evaluate --tasks`: what is asked for, refused and kept; no lm-eval is needed for these."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from launch.evaluate import tasks as tasks_module
from launch.evaluate.__main__ import main
from launch.evaluate.config import EvaluateConfig
from launch.evaluate.tasks import SETS, asked_tasks, averages, completed, results_folder


def test_sets_stand_for_their_tasks_with_shots_and_metrics() -> None:
    sheared = {task.name: task for task in asked_tasks(["sheared-llama"], None)}
    assert len(sheared) == 11 and sheared["arc_challenge"].shots == 25
    assert sheared["boolq"].shots == 32 and sheared["mmlu"].shots == 5
    assert sheared["piqa"].shots == 0 and sheared["nq_open"].metric == "exact_match"
    shortened = asked_tasks(["shortened-llm", "sciq"], None)
    assert [task.of for task in shortened] == ["shortened-llm"] * 7 + [None]
    assert {task.shots for task in shortened} == {0, None}
    alone = asked_tasks(["piqa", "mine"], 3)
    assert [(task.name, task.shots, task.metric) for task in alone] == [
        ("piqa", 3, None),
        ("mine", 3, None),
    ]


@pytest.mark.parametrize(
    ("names", "shots", "message"),
    [
        (["piqa", "piqa"], None, "piqa is named twice"),
        (["shortened-llm", "piqa"], None, r"piqa is named twice \(shortened-llm and piqa\)"),
        (["sheared-llama", "shortened-llm"], None, r"named twice \(sheared-llama and short"),
        (["sheared-llama"], 2, "--shots 2: the set sheared-llama has shots of its own"),
    ],
)
def test_what_would_have_two_results_is_refused(
    names: list[str], shots: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        asked_tasks(names, shots)


def test_the_average_of_a_set_is_the_papers() -> None:
    """Shortened LLaMA's table: seven tasks, plain mean, of 61.83."""
    values = (0.727, 0.757, 0.704, 0.633, 0.695, 0.401, 0.412)
    asked = asked_tasks(["shortened-llm"], None)
    rows: dict[str, dict[str, Any]] = {}
    for task, value in zip(asked, values, strict=True):
        row: dict[str, Any] = {"acc": 0.0, "acc_norm": 0.0, "n": 9, "shots": 0, "version": 1.0}
        row |= {str(task.metric): value, f"{task.metric}_stderr": 0.07}
        rows |= completed({task.name: row}, task)
    assert {row["set"] for row in rows.values()} == {"shortened-llm"}
    found = averages(asked, rows)["task_sets"]["shortened-llm"]
    assert found["average"] == pytest.approx(0.6183, abs=2e-4) and found["tasks"] == 7
    assert found["average_stderr"] == pytest.approx(0.07 / 7**0.5)
    assert averages(asked_tasks(["piqa"], None), {}) == {}


def test_scores_that_are_no_numbers_give_no_accuracy() -> None:
    (asked,) = asked_tasks(["group"], None)
    row = {"acc": 0.5, "acc_stderr": 0.1, "n": 2, "shots": 0, "version": 1.0}
    found = completed({"group": row, "part": row}, asked, sound=False)
    assert found["part"] == row | {"acc": None, "acc_stderr": None, "metric": "acc", "of": "group"}
    assert "of" not in found["group"]
    assert completed({"group": row}, asked)["group"]["acc"] == 0.5


def test_without_lm_eval_the_extra_is_named(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny_model / "model.safetensors").write_bytes(b"not weights")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        tasks_module, "find_spec", lambda name: None if name == "lm_eval" else real(name)
    )
    with pytest.raises(InputError, match=r"--tasks needs lm_eval: pip install 'shorn\[eval\]'"):
        main(["--model", str(tiny_model), "--tasks", "piqa"])


def test_an_lm_eval_that_cannot_be_imported_is_named(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_module, "require_harness", lambda: None)
    monkeypatch.delitem(sys.modules, "launch.evaluate.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"lm-eval cannot be imported \(.*pip install 'shorn"):
        main(["--model", str(tiny_model), "--tasks", "piqa"])


def test_finished_tasks_lie_beside_the_results() -> None:
    config = EvaluateConfig(tasks=("piqa",), json="out/results.json")
    assert results_folder(config) == Path("out/results.tasks")
    assert results_folder(EvaluateConfig(tasks=("piqa",))) is None
    config = EvaluateConfig(tasks=("piqa",), json="out/results.json", task_results="kept")
    assert results_folder(config) == Path("kept")


def test_options_that_only_tasks_use_are_named_without_them() -> None:
    idle = EvaluateConfig(text=("file",)).idle()
    assert {"task_files", "shots", "limit", "task_results"} <= idle.keys()
    assert "batch" not in EvaluateConfig(tasks=("piqa",)).idle()
    for name, value in (("limit", 0), ("shots", -1)):
        with pytest.raises(InputError, match=f"--{name} {value}"):
            EvaluateConfig(tasks=("piqa",), **{name: value})  # type: ignore[arg-type]


def test_sets_are_json_and_name_each_task_once() -> None:
    json.dumps(SETS)
    for tasks in SETS.values():
        names = [name for name, _, _ in tasks]
        assert len(names) == len(set(names))
