"""A whole comparison of a tiny model, its stages run in this process; resumed and extended."""

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from data.locks import folder_lock
from launch import stages
from launch.compare import stages as comparison_stages
from launch.compare.config import CompareConfig
from launch.compare.run import run
from launch.compare.stages import EVALUATION, read_result
from launch.stages import Task
from tests.factories import write_documents, write_model

SIZES = "layers=2,hidden=24,heads=2,kv-heads=1,ffn=24"


class Inline:
    """An executor that does the work in the thread it is given in."""

    def __init__(self, jobs: int) -> None:
        assert jobs == 1

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        future: Future[None] = Future()
        try:
            function(*arguments)
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that stages run, here instead of in processes of their own."""
    ran: list[str] = []

    def command(words: Sequence[object], *, makes: Path, **_: object) -> None:
        line = [str(word) for word in words[1:]]
        module = line[1] if line[0] == "-m" else "launch.cpt"
        ran.append(module)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [module, *line[line.index(line[1]) + 1 :]])
            if module == "launch.cpt":
                patch.setattr(sys, "argv", line)
                runpy.run_path(line[0], run_name="__main__")
            else:
                # A package stays: its modules know it, and would belong to another one.
                spec = find_spec(module)
                package = spec is not None and spec.submodule_search_locations is not None
                own = [] if package else [module]
                for known in (*own, f"{module}.__main__"):
                    patch.delitem(sys.modules, known, raising=False)
                runpy.run_module(module, run_name="__main__")
        assert makes.exists()

    monkeypatch.setattr(comparison_stages, "command", command)
    monkeypatch.setattr(stages, "ThreadPoolExecutor", Inline)
    return ran


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., CompareConfig]:
    model = write_model(tmp_path / "model", num_hidden_layers=3)
    text = write_documents(tmp_path / "text.jsonl", number=12)

    def make(**options: Any) -> CompareConfig:
        paths = {"input": (str(text),), "json": str(tmp_path / "out.json")}
        sizes: dict[str, Any] = {"held_out_documents": 3, "train_documents": 9, "sequences": 2}
        sizes |= {"seq_len": 32, "batch": 2, "shear_steps": 2, "cpt_steps": 2, "threads": 1}
        return CompareConfig(
            source=str(model),
            output=str(tmp_path / "out"),
            domain_weights="alpha=0.5,beta=0.5",
            precision="fp32",
            **({"targets": (f"small={SIZES}",), "seeds": (0,)} | sizes | paths | options),
        )

    return make


def test_the_tokenizer_is_that_of_the_folder_which_the_source_stands_for(
    configure: Callable[..., CompareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the source is named by a run's output folder."""
    ran: list[list[str]] = []
    monkeypatch.setattr(
        comparison_stages, "command", lambda words, **_: ran.append([str(word) for word in words])
    )
    model = write_model(tmp_path / "run" / "model")
    for source in (tmp_path / "run", model):
        maker = comparison_stages.StageMaker(replace(configure(), source=str(source)))
        maker.inputs()[1].action()
    assert len(ran) == 4
    assert all(words[words.index("--tokenizer") + 1] == str(model) for words in ran)


def test_tasks_are_measured_too(
    commands: list[str], configure: Callable[..., CompareConfig], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval (pip install 'shorn[eval]')")
    files, data = tmp_path / "files", tmp_path / "data.jsonl"
    files.mkdir()
    lines = [{"query": "A model", "choices": [" a", " b"], "gold": gold} for gold in (0, 1)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task: dict[str, Any] = {"task": "two", "dataset_path": "json", "test_split": "test"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    task |= {"output_type": "multiple_choice", "doc_to_text": "{{query}}"}
    task |= {"doc_to_target": "gold", "doc_to_choice": "choices"}
    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    # JSON is YAML too.
    (files / "two.yaml").write_text(json.dumps(task | {"metric_list": [metric]}))
    options: dict[str, Any] = {"methods": ("blocks",), "task_files": str(files)}
    with pytest.raises(InputError, match="--tasks twoo"):
        run(configure(tasks=("twoo",), **options))
    assert not commands
    results = run(configure(tasks=("two",), **options))
    assert results is not None and results["source_tasks"]["two"]["value"] == 0.5
    assert results["rows"][0]["tasks"]["two"] == results["source_tasks"]["two"]
    assert len(list((tmp_path / "out" / ".tasks").glob("two-*.json"))) == 2


def held_out(folder: Path) -> dict[str, float]:
    domains = json.loads((folder / "evaluation.json").read_text())["domains"]
    return {name: values["loss"] for name, values in domains.items()}


def test_a_comparison_runs_resumes_and_grows(
    commands: list[str], configure: Callable[..., CompareConfig], tmp_path: Path
) -> None:
    methods = ("ours", "masks", "blocks", "random")
    (tmp_path / "wiki.txt").write_text("A text of a few words. " * 30)
    text = str(tmp_path / "wiki.txt")
    once = ("once=--steps 0 --init taylor",)
    results = run(configure(methods=methods, variant=once, text=text))
    assert results is not None and json.loads((tmp_path / "out.json").read_text()) == results
    rows = {row["method"]: row for row in results["rows"]}
    assert set(rows) == {*methods, "once"}
    small = tmp_path / "out" / "small"
    for name, row in rows.items():
        trained = held_out(small / name / "seed-0" / "trained")
        assert {domain: row["trained"][domain] for domain in trained} == trained
        assert 1 < row["text"] < 1000 and 1 < results["source_text"] < 1000
        assert row["shear_steps"] + row["cpt_steps"] == 4 and row["tokens"] == 4 * 2 * 32
    assert rows["blocks"]["shape"]["hidden"] == 32 and rows["blocks"]["shape"]["layers"] == 1
    assert rows["ours"]["pruned"]["alpha"] == held_out(small / "ours/seed-0/pruned")["alpha"]
    assert rows["random"]["non_embedding_parameters"] == rows["ours"]["non_embedding_parameters"]
    assert not list(tmp_path.glob("out/**/checkpoints"))

    # Another text at the same path is another one.
    commands.clear()
    (tmp_path / "wiki.txt").write_text("Other words, in another order! " * 30)
    other = run(configure(methods=methods, variant=once, text=text))
    assert other is not None and other["source_text"] != results["source_text"]
    assert set(commands) == {"launch.evaluate"}
    (tmp_path / "wiki.txt").write_text("A text of a few words. " * 30)
    results = run(configure(methods=methods, variant=once, text=text))
    assert results is not None

    commands.clear()
    again = run(configure(methods=methods, variant=once, text=text))
    assert again == results and commands == []

    run(configure(methods=(*methods, "activation"), threads=None, text=text))
    # The one-shot model is there already, because the random one has its shape.
    assert commands == ["launch.evaluate", "launch.cpt", "launch.evaluate"]

    commands.clear()
    run(configure(methods=("blocks",), seeds=(0, 1), text=text))
    assert commands == ["launch.cpt", "launch.evaluate"]

    commands.clear()
    run(configure(methods=("ours",), cpt_steps=3, text=text))
    # What it is calibrated and refitted on is what is trained on.
    assert commands == ["pruner.shear", "launch.evaluate", "launch.cpt", "launch.evaluate"]


def test_models_of_other_programs_are_rows_too(
    commands: list[str], configure: Callable[..., CompareConfig], tmp_path: Path
) -> None:
    theirs = write_model(tmp_path / "theirs", num_hidden_layers=2)
    pruned = (f"small/theirs={theirs}",)
    apart = ("apart=shorten --units both --remove 2 --protect-first 0 --protect-last 0",)
    results = run(configure(methods=("ours",), variant=apart, pruned=pruned))
    assert results is not None
    rows = {row["method"]: row for row in results["rows"]}
    assert rows["theirs"]["shape"]["layers"] == 2 and rows["theirs"]["folder"] == str(theirs)
    assert rows["theirs"]["refit"] is None and rows["theirs"]["kept_not_alive"] is None
    assert rows["apart"]["refit"] is not None and rows["ours"]["folder"] is None
    small = tmp_path / "out" / "small"
    assert rows["theirs"]["pruned"]["alpha"] == held_out(small / "theirs" / "pruned")["alpha"]
    assert {row["tokens"] for row in rows.values()} == {4 * 2 * 32}
    assert {lead["best_other"] for lead in results["leads"]} == {"theirs"}

    commands.clear()
    moved = tmp_path / "moved"
    theirs.rename(moved)
    run(configure(methods=("ours",), variant=apart, pruned=(f"small/theirs={moved}",)))
    assert commands == []
    # Another model at the same place is another one.
    write_model(moved, num_hidden_layers=2, initializer_range=0.05)
    run(configure(methods=("ours",), variant=apart, pruned=(f"small/theirs={moved}",)))
    assert commands == ["launch.evaluate", "launch.cpt", "launch.evaluate"]


def test_source_and_text_are_known_by_content(
    commands: list[str], configure: Callable[..., CompareConfig], tmp_path: Path
) -> None:
    """Neither another path to them makes finished stages run again, nor counts another model as
    the same."""
    config = configure(methods=("blocks+kl",))
    run(config)
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "text.jsonl", tmp_path / "other")
    commands.clear()
    moved: dict[str, Any] = {"source": str(tmp_path / "moved"), "input": (str(tmp_path / "other"),)}
    run(replace(config, **moved))
    assert commands == []
    run(replace(config, **moved, methods=("blocks+kl", "blocks")))
    assert commands == ["launch.cpt", "launch.evaluate"]

    write_model(tmp_path / "model", num_hidden_layers=3, initializer_range=0.5)
    changed = rf"--source {tmp_path}/model: has changed since the results in --output {tmp_path}"
    with pytest.raises(InputError, match=changed):
        run(config)
    write_documents(tmp_path / "less.jsonl", number=10)
    another = r"--input .*less\.jsonl'\]: is not \[.*text.jsonl'\], of which the results"
    with pytest.raises(InputError, match=another):
        run(replace(config, source=moved["source"], input=(str(tmp_path / "less.jsonl"),)))


def test_a_second_comparison_into_the_same_folder_is_refused(
    commands: list[str], configure: Callable[..., CompareConfig], tmp_path: Path
) -> None:
    with (
        folder_lock(tmp_path / "out", "comparing"),
        pytest.raises(InputError, match="another process is comparing there"),
    ):
        run(configure(methods=("blocks",)))
    assert commands == []


def test_what_cannot_work_is_refused_before_any_stage(
    commands: list[str], configure: Callable[..., CompareConfig], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    refused: dict[str, dict[str, Any]] = {
        r"--input '/nowhere/\*.zst' matches no files": {"input": ("/nowhere/*.zst",)},
        r"--text /nowhere/wiki.txt": {"text": "/nowhere/wiki.txt"},
        r"--text .*pipe: is a pipe, .* into a file": {"text": str(tmp_path / "pipe")},
        r"--json .*folder is a folder": {"json": str(tmp_path / "folder")},
        r"--targets odd: hidden size 23 is not a multiple": {"targets": ("odd=hidden=23",)},
        r"--seq-len 999 is longer than the model's 256 positions": {"seq_len": 999},
        r"--sparsities 0.001: target .* is the source's own": {
            "dead_units": True,
            "sparsities": (0.001,),
        },
    }
    for message, options in refused.items():
        with pytest.raises(InputError, match=message):
            run(configure(**options))
    assert commands == [] and not (tmp_path / "out").exists()


def test_dead_units_of_both_rules(
    commands: list[str], configure: Callable[..., CompareConfig], tmp_path: Path
) -> None:
    results = run(configure(dead_units=True, sparsities=(0.5,), shear_steps=4))
    assert results is not None
    assert commands == ["data.tokenize"] * 2 + ["pruner.shear"] * 2
    projection, paper = results["rows"]
    assert projection["polarised"] and sum(projection["kept_not_alive"].values()) == 0
    assert projection["kept"] == projection["alive"] == paper["kept"]
    report = json.loads((tmp_path / "out/dead-units/50/paper/seed-0/shear.json").read_text())
    assert paper["alive"] == report["alive"]


@pytest.mark.parametrize("content", ["", "5", "[]", '{"domains": 5}', '{"domains": {"a": 1}}'])
def test_results_of_another_form_say_how_to_make_them_again(tmp_path: Path, content: str) -> None:
    task = Task("a/b", "a", {}, (), tmp_path / "a", lambda: None)
    task.folder.mkdir()
    (task.folder / EVALUATION).write_text(content)
    with pytest.raises(InputError, match=rf"evaluation\.json: .*delete {task.folder} and run this"):
        read_result(task, EVALUATION, {"domains": {"*": {"loss": float}}})
