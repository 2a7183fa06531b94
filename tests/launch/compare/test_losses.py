"""Rows of a comparison: what is planned, and that numbers are those of the stages."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from launch.compare.config import CompareConfig
from launch.compare.losses import block_count, losses_plan
from launch.compare.stages import StageMaker
from launch.stages import Task
from tests.factories import write_model
from trainer.models.config import ModelConfig

SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture
def source() -> ModelConfig:
    return ModelConfig.from_hf(SMOLLM2)


def maker(output: Path, **options: Any) -> StageMaker:
    return StageMaker(CompareConfig(source="model", input=("t",), output=str(output), **options))


def test_block_count_is_the_nearest_in_parameters(source: ModelConfig) -> None:
    assert source.num_parameters(embeddings=False) == 106_203_456
    block = 3_540_096
    for layers in (1, 7, 29):
        exact = layers * block + 576
        assert block_count(source, exact) == layers
        assert block_count(source, exact + block // 2 - 1) == layers
    assert block_count(source, 14 * block + block // 2 + 577) == 15
    assert block_count(source, 0) == 1
    assert block_count(source, 10**9) == 29


def test_plan_of_the_named_targets(
    source: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = losses_plan(maker(tmp_path), source)
    printed = capsys.readouterr().out
    assert "half, blocks: 13 of 30 blocks, 46.02M (-1.0% of the target's)" in printed
    assert "quarter, blocks: 7 of 30 blocks, 24.78M (+0.7% of the target's)" in printed
    names = [task.name for task in plan.tasks]
    assert len(set(names)) == len(names)
    tasks = {task.name: task for task in plan.tasks}
    for name, task in tasks.items():
        assert set(task.after) <= tasks.keys() and task.folder == tmp_path / name
    # What does not depend on the seed is pruned and measured once.
    shears = [name for name in names if name.endswith("/shear")]
    assert len(shears) == 2 * (5 * 3 + 3)
    cpts = [name for name in names if name.endswith("/cpt")]
    assert len(cpts) == 2 * 11 * 3
    assert tasks["half/random/seed-1/cpt"].after == ("half/activation/shear",)
    assert tasks["half/blocks+kl/seed-1/cpt"].after == ("half/blocks/shear",)
    assert names.index("half/magnitude/seed-0/cpt") < names.index("half/ours/seed-1/shear")
    flags = {
        name: task.settings["flags"] for name, task in tasks.items() if "flags" in task.settings
    }
    for target, layers in (("half", 13), ("quarter", 7)):
        blocks = f"layers={layers},hidden=576,heads=9,kv-heads=3,ffn=1536"
        assert flags[f"{target}/blocks/shear"][1] == blocks


def test_all_rows_train_on_equally_many_tokens(source: ModelConfig, tmp_path: Path) -> None:
    variants = ("late=--steps 4", "once=--steps 0 --init taylor|--lr 1e-3")
    plan = losses_plan(maker(tmp_path, variant=variants, seeds=(3,)), source)
    settings = {task.name: list(task.settings.get("flags", ())) for task in plan.tasks}
    for name, flags in settings.items():
        if name.endswith("/cpt"):
            (pruned,) = next(task.after for task in plan.tasks if task.name == name)
            steps = [words[words.index("--steps") + 1] for words in (settings[pruned], flags)]
            assert sum(steps) == 160, name
            batch = [
                words[words.index("--global-batch") + 1] for words in (settings[pruned], flags)
            ]
            assert batch == [2, 2]
    assert settings["half/once/seed-3/cpt"][-2:] == ["--lr", "1e-3"]
    assert settings["half/random/seed-3/cpt"][2:4] == ["--lr", 1e-3]
    assert settings["half/random/seed-3/cpt"][-2:] == ["--init", "random"]


def test_only_text_that_is_trained_on_calibrates_and_refits(
    source: ModelConfig, tmp_path: Path
) -> None:
    def words(steps: int, name: str) -> list[Any]:
        plan = losses_plan(maker(tmp_path, shear_steps=steps, cpt_steps=steps), source)
        (task,) = (task for task in plan.tasks if task.name == f"half/{name}/shear")
        return list(task.settings["flags"])

    few = words(3, "ours/seed-0")
    at = few.index("--calibration-sequences")
    assert few[at : at + 6] == [
        *("--calibration-sequences", 12, "--refit-sequences", 11, "--refit-held-out", 1)
    ]
    for name in ("masks/seed-0", "activation"):
        few = words(3, name)
        assert few[few.index("--calibration-sequences") + 1] == 12, name
        assert "--refit-sequences" not in few
    many = words(80, "ours/seed-0")
    assert "--calibration-sequences" not in many
    assert many[many.index("--refit-sequences") + 1] == 256


def test_a_search_gets_as_many_parameters(source: ModelConfig, tmp_path: Path) -> None:
    plan = losses_plan(maker(tmp_path, methods=("ours", "searched"), seeds=(3,)), source)
    flags = {task.name: list(task.settings.get("flags", ())) for task in plan.tasks}
    words, own = (flags[f"half/{name}/seed-3/shear"] for name in ("searched", "ours"))
    assert words[:2] == ["--target", "params-non-embedding=46469808"]
    assert words[2:] == [*own[2:], "--propose", "search"]
    assert flags["half/searched/seed-3/cpt"][:-2] == flags["half/ours/seed-3/cpt"]


def test_blocks_are_removed_by_shortening(source: ModelConfig, tmp_path: Path) -> None:
    methods = ("ours", "shorten-ppl", "shorten-greedy")
    plan = losses_plan(maker(tmp_path, methods=methods, seeds=(3,)), source)
    flags = {task.name: list(task.settings.get("flags", ())) for task in plan.tasks}
    for target, removed in (("half", 17), ("quarter", 23)):
        for name, last in (("ppl", ["--criterion", "ppl"]), ("greedy", ["--search", "greedy"])):
            words = flags[f"{target}/shorten-{name}/seed-3/shear"]
            assert words[:2] == ["--remove", removed] and words[-2:] == last
            trained = flags[f"{target}/shorten-{name}/seed-3/cpt"]
            own = flags[f"{target}/ours/seed-3/cpt"]
            assert trained == [*own, "--teacher", "model"]
    small = ModelConfig.from_hf(SMOLLM2 | {"num_hidden_layers": 8})
    sizes = ("small=layers=6,hidden=432,heads=6,kv-heads=2,ffn=1152",)
    with pytest.raises(InputError, match=r"--methods shorten-ppl: takes 5 of 8 .*leave it out"):
        losses_plan(maker(tmp_path, methods=("shorten-ppl",), targets=sizes), small)


def test_a_target_that_the_source_cannot_give_is_refused(
    source: ModelConfig, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="hidden=1000 is outside"):
        losses_plan(maker(tmp_path, targets=("big=hidden=1000",)), source)
    # Who names a known shape has typed no sizes, and can correct none.
    small = ModelConfig.from_hf(SMOLLM2 | {"num_hidden_layers": 4})
    advice = r"--targets half \(.*\) is made for SmolLM2-135M .*for example --targets (small=\S+)$"
    with pytest.raises(InputError, match=advice) as caught:
        losses_plan(maker(tmp_path), small)
    proposed = str(caught.value).rpartition(" ")[2]
    assert losses_plan(maker(tmp_path, targets=(proposed,)), small).tasks


def write_stages(plan_tasks: list[Any], losses: dict[str, tuple[float, float]]) -> None:
    """What measuring and shearing stages would have written; `losses` by a part of their names."""
    for task in plan_tasks:
        task.folder.mkdir(parents=True, exist_ok=True)
        for part, values in losses.items():
            if part in task.name:
                domains = dict(zip(("c4", "github"), ({"loss": v} for v in values), strict=True))
                found: dict[str, Any] = {"domains": domains}
                if "--text" in task.settings.get("flags", ()):
                    found["text"] = {"perplexity": math.exp(sum(values) / 4)}
                if "--tasks" in task.settings.get("flags", ()):
                    found |= task_results(values[0] / 10)
                (task.folder / "evaluation.json").write_text(json.dumps(found))
        report = {
            "target_shape": {"layers": 24},
            **spent(task),
            "parameters": {"target_non_embedding": 46_469_808},
            "kept_not_alive": {"hidden": 1, "layer": 2},
        }
        (task.folder / "shear.json").write_text(json.dumps(report))
        (task.folder / "cpt.json").write_text(json.dumps(spent(task)))
        identity = {"distill.weight": 0.9} if "/ours/" in task.name else {}
        (task.folder / "run.json").write_text(json.dumps(identity))


def task_results(accuracy: float) -> dict[str, Any]:
    """What `shorn evaluate --tasks` writes about a group and a set."""
    row = {"acc": accuracy, "acc_stderr": 0.02, "acc_norm": accuracy + 0.1, "acc_norm_stderr": 0.03}
    average = {"average": accuracy + 0.2, "average_stderr": 0.01, "tasks": 1}
    return {
        "tasks": {
            "mmlu": row | {"metric": "acc"},
            "mmlu_law": row | {"metric": "acc", "of": "mmlu"},
            "openbookqa": row | {"metric": "acc_norm", "set": "some"},
        },
        "task_sets": {"some": average},
    }


def spent(task: Task) -> dict[str, int]:
    """Steps and tokens of a stage, from its command; a measuring one has none."""
    flags = [str(word) for word in task.settings.get("flags", ())]
    steps = int(flags[flags.index("--steps") + 1]) if "--steps" in flags else 0
    return {"steps": steps, "tokens": steps * 2 * 256}


def test_numbers_are_those_of_the_stages(
    source: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("ours", "activation", "random")
    options: dict[str, Any] = {"methods": methods, "targets": ("half",), "seeds": (0, 1)}
    plan = losses_plan(maker(tmp_path, text="wiki.txt", **options), source)
    losses = {
        "source": (3.0, 2.0),
        "ours/seed-0/pruned": (6.0, 5.0),
        "ours/seed-1/pruned": (6.5, 5.5),
        "ours/seed-0/trained": (5.0, 4.0),
        "ours/seed-1/trained": (5.2, 4.4),
        "activation/pruned": (8.0, 7.0),
        "activation/seed-0/trained": (5.3, 4.3),
        "activation/seed-1/trained": (5.5, 4.5),
        "random/seed-0/trained": (7.0, 7.0),
    }
    write_stages(plan.tasks, losses)
    done = {task.name for task in plan.tasks if "random/seed-1" not in task.name}
    assert plan.results({"source"}) is None
    results = plan.results(done)
    assert results is not None
    assert results["tokens"] == 160 * 2 * 256 and results["missing_rows"] == 1
    assert results["source_held_out"] == {"c4": 3.0, "github": 2.0, "all": 2.5}
    assert results["source_text"] == pytest.approx(math.exp(1.25))
    rows = {(row["method"], row["seed"]): row for row in results["rows"]}
    assert len(rows) == 5
    assert rows["ours", 0]["text"] == pytest.approx(math.exp(2.25))
    assert rows["ours", 1]["pruned"] == {"c4": 6.5, "github": 5.5, "all": 6.0}
    assert rows["activation", 0]["pruned"] == rows["activation", 1]["pruned"]
    assert rows["random", 0]["pruned"] is None and rows["random", 0]["kept_not_alive"] is None
    assert (rows["ours", 0]["shear_steps"], rows["ours", 0]["cpt_steps"]) == (0, 160)
    assert (rows["random", 0]["shear_steps"], rows["random", 0]["cpt_steps"]) == (0, 160)
    assert {row["tokens"] for row in results["rows"]} == {results["tokens"]}
    weights = {row["method"]: row["distill_weight"] for row in results["rows"]}
    assert weights == {"ours": 0.9, "activation": 0.0, "random": 0.0}
    ours, activation, random = results["summary"]
    assert ours["trained"]["c4"] == {"mean": pytest.approx(5.1), "min": 5.0, "max": 5.2}
    assert activation["pruned"]["c4"] == {"mean": 8.0, "min": 8.0, "max": 8.0}
    assert ours["kept_not_alive"] == [3, 3] and random["pruned"] == {}
    by_domain = {lead["domain"]: lead for lead in results["leads"]}
    assert by_domain["c4"]["lower_by"] == pytest.approx(0.3) and by_domain["c4"]["beyond_spread"]
    assert by_domain["github"]["lower_by"] == pytest.approx(0.2)
    assert not by_domain["github"]["beyond_spread"]
    assert by_domain["all"]["best_other"] == "activation"
    capsys.readouterr()
    plan.show(results)
    table = capsys.readouterr().out
    assert "5.100 (5.00..5.20)" in table and "8.000 (8.00)" in table
    assert "1 rows are not finished" in table
    assert "c4: ours is 0.300 below the best other, activation, more than the spread" in table


def test_accuracy_on_tasks_is_that_of_trained_models_and_the_source(
    source: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"methods": ("ours",), "targets": ("half",), "seeds": (0, 1)}
    tasks = {"tasks": ("mmlu", "some"), "task_files": "files", "limit": 9}
    before = losses_plan(maker(tmp_path, **options), source)
    plan = losses_plan(maker(tmp_path, **options, **tasks), source)
    changed = []
    for old, new in zip(before.tasks, plan.tasks, strict=True):
        if old.settings != new.settings:
            changed.append(new.name)
            flags = ["--tasks", "mmlu", "some", "--task-files", "--limit", 9]
            assert new.settings["flags"] == [*old.settings["flags"], *flags]
    # All that was pruned or trained before, and measured before training, is reused.
    assert changed == ["source", "half/ours/seed-0/trained", "half/ours/seed-1/trained"]
    losses = {"source": (5.0, 2.0), "pruned": (6.0, 5.0)}
    losses |= {"seed-0/trained": (4.0, 4.0), "seed-1/trained": (3.0, 4.0)}
    write_stages(plan.tasks, losses)
    results = plan.results({task.name for task in plan.tasks})
    assert results is not None
    assert results["source_tasks"] == {
        "mmlu": {"metric": "acc", "value": 0.5, "stderr": 0.02},
        "openbookqa": {"metric": "acc_norm", "value": 0.6, "stderr": 0.03},
        "some": {"metric": "average", "value": 0.7, "stderr": 0.01},
    }
    assert [row["tasks"]["mmlu"]["value"] for row in results["rows"]] == [0.4, 0.3]
    (ours,) = results["summary"]
    spread = {"mean": pytest.approx(0.45), "min": pytest.approx(0.4), "max": pytest.approx(0.5)}
    assert ours["tasks"]["openbookqa"] == {"metric": "acc_norm", "stderr": 0.03} | spread
    capsys.readouterr()
    plan.show(results)
    table = capsys.readouterr().out
    for text in ("mmlu", "(acc_norm)", "(average)", "0.600 ±0.030", "0.450 ±0.030", "(0.40..0.50)"):
        assert text in table, text
    assert "mmlu_law" not in table

    write_stages(before.tasks, losses)
    results = before.results({task.name for task in plan.tasks})
    assert results is not None and results["source_tasks"] is None
    before.show(results)
    assert "mmlu" not in capsys.readouterr().out


def test_rows_of_other_lengths_are_refused(source: ModelConfig, tmp_path: Path) -> None:
    plan = losses_plan(maker(tmp_path, methods=("ours",), targets=("half",), seeds=(0,)), source)
    write_stages(plan.tasks, {"": (1.0, 1.0)})
    done = {task.name for task in plan.tasks}
    assert plan.results(done) is not None
    report = tmp_path / "half/ours/seed-0/cpt/cpt.json"
    report.write_text(json.dumps({"steps": 160, "tokens": 112 * 2 * 256}))
    with pytest.raises(InputError, match=r"took 160 steps and 57,344 tokens.* 160 and 81,920: del"):
        plan.results(done)


def test_blocks_of_a_source_with_one_are_refused(tmp_path: Path) -> None:
    source = ModelConfig.from_hf(SMOLLM2 | {"num_hidden_layers": 1})
    sizes = "small=hidden=432,heads=6,kv-heads=2"
    with pytest.raises(
        InputError,
        match=r"--methods blocks\+refit\+kl: model has a single block.*ours masks paper a",
    ):
        losses_plan(maker(tmp_path, targets=(sizes,)), source)


def test_models_that_others_pruned_are_trained_and_measured(
    source: ModelConfig, tmp_path: Path
) -> None:
    theirs = write_model(tmp_path / "theirs", vocab_size=64)
    pruned = (f"half/theirs={theirs}",)
    options: dict[str, Any] = {"methods": ("ours",), "seeds": (0, 1), "pruned": pruned}
    own = replace(source, vocab_size=64)
    plan = losses_plan(maker(tmp_path / "out", **options), own)
    tasks = {task.name: task for task in plan.tasks if "theirs" in task.name}
    assert list(tasks) == [
        "half/theirs/pruned",
        *(f"half/theirs/seed-{seed}/{part}" for seed in (0, 1) for part in ("cpt", "trained")),
    ]
    ours = next(task for task in plan.tasks if task.name == "half/ours/seed-1/cpt")
    flags = tasks["half/theirs/seed-1/cpt"].settings["flags"]
    assert [*ours.settings["flags"], "--teacher", "model"] == flags
    with pytest.raises(InputError, match="has 64 token ids and the source 49,152"):
        losses_plan(maker(tmp_path / "out", **options), source)
