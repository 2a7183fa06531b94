"""launch/cpt.py as users start it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from tests.conftest import ROOT
from tests.factories import write_model, write_tokenizer, write_tokens
from tests.trainer.tiny import pretrain
from trainer.config import TrainConfig
from trainer.cpt import find_model
from trainer.loop import Trainer

SCRIPT = str(ROOT / "launch" / "cpt.py")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with runs/shear (a model and shear.json, as shearing leaves them) and runs/tokens."""
    folder = tmp_path_factory.mktemp("cpt")
    tokenizer = write_tokenizer(folder / "tokenizer")
    write_model(folder / "runs" / "shear" / "model", tokenizer)
    report = {"weights": {"alpha": 0.3, "beta": 0.7}, "reference": {"alpha": 2.0, "beta": 3.0}}
    (folder / "runs" / "shear" / "shear.json").write_text(json.dumps(report))
    write_tokens(folder / "runs" / "tokens", tokenizer)
    return folder


FLAGS = {
    "--steps": 6,
    "--seq-len": 32,
    "--global-batch": 16,
    "--micro-batch": 1,
    "--lr": 0.01,
    "--eval-sequences": 4,
    "--save-interval": 2,
}


def start(
    folder: Path, ranks: int = 1, environment: dict[str, str] | None = None, **flags: Any
) -> subprocess.CompletedProcess[str]:
    """Runs the script, under torchrun when there are several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    given = FLAGS | {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    words = [word for name, value in given.items() for word in (name, str(value))]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SHORN_", "RANK", "WORLD"))}
    kept.pop("PYTHONPATH", None)
    command = [sys.executable, *(launcher if ranks > 1 else []), SCRIPT, *words]
    return subprocess.run(
        command,
        cwd=folder,
        env=kept | (environment or {}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def check_finished_run(output: Path) -> None:
    report = json.loads((output / "cpt.json").read_text())
    assert report["tokens"] == 6 * 16 * 32 and report["steps"] == 6
    assert set(report["held_out"]) == {"alpha", "beta"} == set(report["weights"])
    assert report["held_out"]["alpha"].keys() == {"loss", "perplexity", "tokens"}
    assert report["tokens_per_second"] >= report["wall_tokens_per_second"] > 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    first = json.loads((output / "mixture.jsonl").read_text().splitlines()[0])
    assert first["weights"] == pytest.approx({"alpha": 0.3, "beta": 0.7})
    assert report["final_loss"] == lines[-1]["loss"] < lines[0]["loss"]
    assert (output / "model" / "model.safetensors").exists()
    assert (output / "model" / "tokenizer.json").exists()


def test_torchrun_with_defaults_for_model_data_and_output(workspace: Path) -> None:
    result = start(workspace, ranks=2, json=workspace / "copy.json")
    assert result.returncode == 0, result.stderr
    check_finished_run(workspace / "runs" / "cpt")
    assert (workspace / "copy.json").read_text() == (
        workspace / "runs" / "cpt" / "cpt.json"
    ).read_text()
    assert result.stdout.count("final loss") == 1


@pytest.mark.slow
def test_eight_ranks(workspace: Path) -> None:
    result = start(workspace, ranks=8, output="runs/eight")
    assert result.returncode == 0, result.stderr
    check_finished_run(workspace / "runs" / "eight")


@pytest.mark.slow
def test_an_error_is_printed_once_by_two_ranks(workspace: Path) -> None:
    result = start(workspace, ranks=2, model="missing/model/folder")
    assert result.returncode != 0
    assert result.stderr.count("error: --model missing/model/folder") == 1


def test_missing_model_says_how_to_make_it(workspace: Path) -> None:
    result = start(workspace, model="runs/other")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    assert "--model runs/other: no such folder" in result.stderr
    assert "both missing" not in result.stderr and "python -m pruner.shear" in result.stderr


def check_both_halves(message: str) -> None:
    assert message.count("error: model and data are both missing") == 1
    assert "--model runs/shear: no such folder" in message
    assert "hf auth login" in message and "hf download meta-llama/Llama-2-7b-hf" in message
    assert (
        "python -m pruner.shear --source models/Llama-2-7b-hf --target 1.3b --output runs/shear\n"
        in message
    )
    assert "hf download cerebras/SlimPajama-627B --repo-type dataset" in message
    assert "--tokenizer models/Llama-2-7b-hf --output runs/tokens --seq-len 32" in message


def test_without_model_and_data_one_error_says_how_to_get_both(tmp_path: Path) -> None:
    result = start(tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("error") == 1 and "Traceback" not in result.stderr
    check_both_halves(result.stderr)


@pytest.mark.slow
def test_two_ranks_print_that_error_once(tmp_path: Path) -> None:
    result = start(tmp_path, ranks=2)
    assert result.returncode != 0
    check_both_halves(result.stderr)
    assert "error (rank" not in result.stderr


def test_help_has_examples() -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    )
    assert "torchrun --nproc_per_node 8 launch/cpt.py" in result.stdout
    for flag in ("--model", "--global-batch", "--micro-batch", "--mixture", "--lr", "--seed"):
        assert flag in result.stdout


def quick(**changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        name[2:].replace("-", "_"): value for name, value in (FLAGS | {"--threads": 1}).items()
    }
    return TrainConfig(**(fields | changes))


def test_a_finished_run_is_left_alone(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cpt"

    def run(config: TrainConfig, copy: Path | None = None) -> Trainer | None:
        return pretrain(
            config,
            model=workspace / "runs" / "shear",
            data=workspace / "runs" / "tokens",
            output=output,
            json=None if copy is None else str(copy),
        )

    trainer = run(quick())
    assert trainer is not None and trainer.step == 6
    check_finished_run(output)
    before = (output / "cpt.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(quick(), tmp_path / "copy.json") is None
    assert (tmp_path / "copy.json").read_bytes() == (output / "cpt.json").read_bytes()
    assert "this run is finished" in capsys.readouterr().out
    assert (output / "cpt.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"--steps was 6, now 9.*schedule"):
        run(quick(steps=9))
    with pytest.raises(InputError, match=r"--seq-len was 32, now 16"):
        run(quick(seq_len=16))


def test_random_initialisation_has_the_same_shape(workspace: Path, tmp_path: Path) -> None:
    shear = workspace / "runs" / "shear"
    trainer = pretrain(
        quick(steps=1),
        model=shear,
        data=workspace / "runs" / "tokens",
        output=tmp_path,
        init="random",
    )
    assert trainer is not None
    sizes = [(shear / "model" / "model.safetensors").stat().st_size]
    sizes.append((tmp_path / "model" / "model.safetensors").stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 1000
    assert trainer.loss == pytest.approx(5.56, abs=0.1)


def test_a_layout_is_refused_before_anything_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--micro-batch 5"):
        pretrain(quick(micro_batch=5), model=tmp_path / "no", data=tmp_path / "no", output=tmp_path)


def test_unfinished_shearing_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="has not finished"):
        find_model(str(tmp_path))
    with pytest.raises(InputError, match=r"(?s)no such folder.*--output '.*/a typo'$"):
        find_model(str(tmp_path / "a typo"))
    write_model(tmp_path / "model")
    for model in (tmp_path, tmp_path / "model"):
        with pytest.raises(InputError, match="has not finished"):
            find_model(str(model))
    (tmp_path / "cpt.json").write_text("{}")
    for model in (tmp_path, tmp_path / "model"):
        assert find_model(str(model)) == tmp_path / "model"
