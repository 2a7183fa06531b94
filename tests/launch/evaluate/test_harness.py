"""Tasks through lm-eval: numbers are those of its own model, and finished tasks are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import InputError
from tests.distributed import run_ranks
from tests.factories import write_model
from tests.trainer.tiny import options, pretrain
from trainer import parallel
from trainer.checkpoint_files import committed
from trainer.checkpoint_model import load_step, read_step
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_model

pytest.importorskip("lm_eval", reason="needs lm-eval (pip install 'shorn[eval]')")
pytest.importorskip("accelerate")

from launch.evaluate import candidates, harness
from launch.evaluate.__main__ import main
from launch.evaluate.harness import Harness, TaskModel, measure, read_task_files
from launch.evaluate.tasks import SETS

CPU = torch.device("cpu")
QUESTIONS = [
    {"query": "The shape of", "choices": [" a model", " while"], "gold": 0},
    {"query": "A mask keeps", "choices": [" loss", " the count", " all of it"], "gold": 1},
    {"query": "It falls", "choices": [" a", " b"], "gold": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{query}}}}"
"""
KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_target: "{{query}} and more of it"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "said": """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}
GROUP = """
group: both
task: [choice, {task: choice_b}]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of small tasks of three kinds, and of a group."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "task-files"
    folder.mkdir()
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, kind in (*KINDS.items(), ("choice_b", KINDS["choice"])):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    (folder / "both.yaml").write_text(GROUP)
    return folder


def task_model(folder: Path, batch: int = 2) -> TaskModel:
    context = parallel.init(threads=1)
    model = load_model(folder, CPU)
    return TaskModel(folder, model, dtype=torch.float32, batch=batch, context=context)


def plain_results(folder: Path, files: Path, name: str) -> dict[str, Any]:
    """What lm-eval's `hf` model gets on the same folder."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: Any = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[name],
        num_fewshot=1,
        device="cpu",
        task_manager=TaskManager(include_path=files, include_defaults=False),
    )
    values: dict[str, Any] = found["results"][name]
    return values


@pytest.mark.parametrize("name", KINDS)
def test_numbers_are_those_of_lm_evals_own_model(tiny_model: Path, files: Path, name: str) -> None:
    known = Harness([name], files)
    found = measure(task_model(tiny_model), known.load(name, 1), None)[name]
    assert (found["n"], found["shots"]) == (3, 1)
    expected = plain_results(tiny_model, files, name)
    for key, value in expected.items():
        metric, comma, _ = key.partition(",")
        if comma and not isinstance(value, str):
            assert found[metric] == pytest.approx(value, rel=1e-5), metric


def test_groups_of_any_form_are_taken_apart(files: Path) -> None:
    """As lm-eval does: names, names with other settings, groups and tasks that stand there."""
    own: dict[str, Any] = {"task": "own", "dataset_path": "json", "test_split": "test"}
    own |= {"dataset_kwargs": {"data_files": {"test": str(files.parent / "questions.jsonl")}}}
    own |= {"output_type": "multiple_choice", "doc_to_text": "{{query}}"}
    own |= {"doc_to_target": "gold", "doc_to_choice": "choices"}
    inner = {"group": "inner", "task": ["text", {"task": "said", "num_fewshot": 2}]}
    members = ["both", inner, own]
    (files / "all.yaml").write_text(json.dumps({"group": "all", "task": members}))
    known = Harness(["all"], files)
    found = known.leaves("all")
    assert list(found) == ["choice", "choice_b", "text", "said", "own"]
    assert found["said"]["num_fewshot"] == 2 and found["own"]["dataset_path"] == "json"
    loaded = known.load("all", None)["tasks"]
    assert [name.split("::")[-1] for name in loaded] == list(found)


@pytest.mark.slow
def test_the_sets_name_tasks_and_metrics_that_lm_eval_has() -> None:
    known = Harness(sorted({task for tasks in SETS.values() for task, _, _ in tasks}), None)
    for task, shots, metric in (entry for tasks in SETS.values() for entry in tasks):
        leaves = known.leaves(task)
        assert len(leaves) == (57 if task == "mmlu" else 1)
        for config in leaves.values():
            assert metric in [entry["metric"] for entry in config["metric_list"]]
            assert not shots or config.get("num_fewshot") != 0


def test_every_rank_has_the_result_of_one(tiny_model: Path, files: Path) -> None:
    """Requests are shared by ranks, three questions by two, with the examples of one process."""
    known = Harness(list(KINDS), files)

    def results() -> list[Any]:
        model = task_model(tiny_model)
        return [measure(model, known.load(name, 1), None) for name in KINDS]

    (one,) = run_ranks(results, 1)
    for other in run_ranks(results, 2):
        for found, expected in zip(other, one, strict=True):
            for name, row in expected.items():
                assert found[name].keys() == row.keys()
                for key, value in row.items():
                    exact = value is None or isinstance(value, str)
                    assert found[name][key] == (value if exact else pytest.approx(value, rel=1e-5))


def test_models_stand_side_by_side_and_finished_tasks_are_kept(
    tmp_path: Path,
    tiny_model: Path,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = write_model(tmp_path / "other", num_hidden_layers=1, initializer_range=0.5)
    found = tmp_path / "out" / "result.json"
    common = ["--task-files", str(files), "--threads", "1", "--json", str(found)]
    models = ["--model", str(tiny_model), str(other)]
    main([*models, "--tasks", "both", "text", *common])
    first = json.loads(found.read_text())["models"]
    shown = capsys.readouterr().out
    assert "difference to the first" in shown and "measured before" not in shown
    row = first[1]["tasks"]["both"]
    assert row["n"] == 6 and row["metric"] == "acc" and "acc_stderr" in row
    assert first[1]["tasks"]["choice"]["of"] == "both" and "choice " not in shown
    apart = row["acc"] - first[0]["tasks"]["both"]["acc"]
    assert f"{row['acc']:.4f} ± {row['acc_stderr']:.4f}" in shown and f"{apart:+.4f}" in shown

    loads: list[Path] = []

    def load(path: Path, *others: Any) -> CausalLM:
        loads.append(path)
        return load_model(path, *others)

    monkeypatch.setattr(candidates, "load_model", load)
    main([*models, "--tasks", "both", "text", *common])
    assert json.loads(found.read_text())["models"] == first and not loads
    assert capsys.readouterr().out.count("measured before") == 4
    # A damaged one, another number of questions, and other weights are measured again.
    for kept in (tmp_path / "out" / "result.tasks").glob("text-*.json"):
        kept.write_text("{}")
    main([*models, "--tasks", "both", "text", *common])
    assert json.loads(found.read_text())["models"] == first and len(loads) == 2
    assert "holds no results of a task; it is measured again" in capsys.readouterr().err
    main([*models, "--tasks", "both", *common, "--limit", "1"])
    assert json.loads(found.read_text())["models"][0]["tasks"]["both"]["n"] == 2
    write_model(other, num_hidden_layers=1, initializer_range=0.4)
    main([*models, "--tasks", "both", *common])
    assert loads[2:] == [tiny_model, other, other]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "choise", "--task-files", "FILES"], "did you mean choice"),
        (["--tasks", "choice", "--task-files", "TMP/none"], "no such folder"),
        (["--tasks", "choice", "--task-files", "EMPTY"], r"holds no \.yaml file"),
        (["--tasks", "both", "choice", "--task-files", "FILES"], "both hold choice"),
        (["--tasks", "lost", "--task-files", "FILES"], "its data cannot be read .*working folder"),
        (["--tasks", "odd", "--task-files", "FILES"], "lm-eval cannot make it .*mend its file"),
        (["--tasks", "fixed", "--shots", "2", "--task-files", "FILES"], "fixed has no examples"),
        (["--tasks", "choice", "--shots", "5", "--task-files", "FILES"], "use --shots 2 or fewer"),
        (["--tasks", "code", "--task-files", "FILES"], "runs code that the model writes"),
        (["--tasks", "choice", "--task-files", "FILES", "--json", "EMPTY"], "is a folder"),
    ],
)
def test_impossible_requests_are_refused_before_weights_load(
    tmp_path: Path,
    tiny_model: Path,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    # lm-eval's own tasks take long to list, and none of these names one.
    class OnlyFiles(harness.TaskManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(**(options | {"include_defaults": False}))

    monkeypatch.setattr(harness, "TaskManager", OnlyFiles)
    choice = (files / "choice.yaml").read_text()
    changed = {
        "lost": choice.replace("questions", "nowhere"),
        "odd": choice.replace("multiple_choice", "multiple"),
        "fixed": choice + "num_fewshot: 0\n",
        "code": choice + "unsafe_code: true\n",
    }
    for name, text in changed.items():
        (files / f"{name}.yaml").write_text(text.replace("task: choice", f"task: {name}"))
    (tmp_path / "empty").mkdir()
    known = {"FILES": files, "EMPTY": tmp_path / "empty", "TMP/none": tmp_path / "none"}
    (tiny_model / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=message):
        main(["--model", str(tiny_model), *(str(known.get(word, word)) for word in arguments)])


def test_a_model_without_a_tokenizer_is_refused(tiny_model: Path, files: Path) -> None:
    (tiny_model / "tokenizer.json").unlink()
    (tiny_model / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"--tasks needs the model's own tokenizer"):
        main(["--model", str(tiny_model), "--tasks", "choice", "--task-files", str(files)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"task: x\n  bad: [", "not valid YAML"),
        (b"task: \xff\xfe", "not UTF-8"),
        (b"- task: x", "holds no settings of a task"),
        (b"include: base.yaml\ntask: x", r"includes base\.yaml, which is not there"),
    ],
)
def test_task_files_that_lm_eval_would_pass_over_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "good.yaml").write_text("task: y\nprocess_docs: !function utils.process")
    assert read_task_files(tmp_path) == read_task_files(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(InputError, match=f"bad.yaml: {message}"):
        read_task_files(tmp_path)


def test_weights_that_are_no_numbers_give_no_accuracy(
    tmp_path: Path, tiny_model: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_model / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
    save_file(state, tiny_model / "model.safetensors", {"format": "pt"})
    found = tmp_path / "result.json"
    words = ["--model", str(tiny_model), "--tasks", "choice", "--task-files", str(files)]
    main([*words, "--threads", "1", "--json", str(found)])
    assert json.loads(found.read_text())["tasks"]["choice"]["acc"] is None
    assert "is not finite: its weights are damaged" in capsys.readouterr().err
    assert not list((tmp_path / "result.tasks").glob("*"))


def test_data_of_any_form_decides_which_results_are_kept(tmp_path: Path) -> None:
    """A file, a pattern, a folder of files, and a folder that is a dataset of its own."""
    files, data = tmp_path / "tasks", tmp_path / "data"
    files.mkdir()
    data.mkdir()
    (data / "test.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n")
    forms = {
        "file": {"data_files": {"test": str(data / "test.jsonl")}},
        "pattern": {"data_files": {"test": str(data / "*.jsonl")}},
        "folder": {"data_dir": str(data)},
    }
    for name, kwargs in forms.items():
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs}
        (files / f"{name}.yaml").write_text(json.dumps(task | {"test_split": "test"}))
    own = {"task": "own", "dataset_path": str(data), "test_split": "test"}
    (files / "own.yaml").write_text(json.dumps(own))
    found = Harness([*forms, "own"], files)
    before = {name: found.identity(name) for name in (*forms, "own")}
    assert before == {name: found.identity(name) for name in before}
    with (data / "test.jsonl").open("a") as file:
        file.write(json.dumps(QUESTIONS[1]) + "\n")
    for name, known in before.items():
        assert found.identity(name) != known, name


def test_saved_steps_generate_with_their_own_weights(
    tiny_model: Path, tiny_tokens: Path, tmp_path: Path
) -> None:
    """The folder that holds their tokenizer has those of the run's end."""
    train = options(steps=4, save_interval=2, keep_all_checkpoints=True, precision="fp32")
    pretrain(train, model=tiny_model, data=tiny_tokens, output=tmp_path / "run")
    folder, context = tmp_path / "run" / "model", parallel.init(threads=1)
    ids = torch.arange(3, 20)[None]
    logits = []
    for path in committed(tmp_path / "run" / "checkpoints"):
        model = load_step(read_step(path), CPU, torch.float32)
        words: dict[str, Any] = {"dtype": torch.float32, "batch": 2, "context": context}
        step = TaskModel(folder, model, saved=True, **words)
        logits.append(step._plain().eval()(ids).logits)
        torch.testing.assert_close(logits[-1], step._model_call(ids), rtol=1e-4, atol=1e-5)
    final = task_model(folder)._plain().eval()(ids).logits
    assert torch.equal(logits[1], final) and not torch.allclose(logits[0], final, atol=1e-3)
