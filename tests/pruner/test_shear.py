"""The command `pruner.shear`: help, defaults and its errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import InputError
from data.locks import folder_lock
from pruner import report, shear
from pruner.config import ShearConfig
from pruner.run import shear as run
from tests.pruner.test_run import configure
from tests.trainer.test_verdict import SHEARED, SOURCE
from trainer.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SHORN_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), "-m", "pruner.shear", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_lists_the_options_and_examples(tmp_path: Path) -> None:
    shown = command("--help", cwd=tmp_path)
    assert shown.returncode == 0
    flags = "source target data output steps seq-len global-batch micro-batch seed rule json"
    for flag in flags.split():
        assert f"--{flag} " in shown.stdout, flag
    assert "torchrun --nproc_per_node 8 -m pruner.shear" in shown.stdout


def test_a_missing_model_is_one_error_that_says_how_to_get_it(tmp_path: Path) -> None:
    failed = command("--target", "1.3b", cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.count("error:") == 1 and "Traceback" not in failed.stderr
    assert "meta-llama/Llama-2-7b-hf" in failed.stderr and "hf download" in failed.stderr


def test_the_next_command_goes_on_in_the_order_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(report, "stages_of", lambda _: [SOURCE, SHEARED])
    monkeypatch.setattr(report, "show", lambda _, commands: said.extend(commands))
    for train in (TrainConfig(seq_len=32), TrainConfig(seq_len=32, seed=5, eval_sequences=3)):
        config = ShearConfig(target="ffn=8", data="my tokens", output="runs/s", train=train)
        report._show_verdict({"weights": {}}, config)
    command = "shorn cpt --model runs/s --data 'my tokens' --output runs/s-cpt --seq-len 32"
    assert said == [command, f"{command} --seed 5 --eval-sequences 3"]


def check_both_halves(message: str) -> None:
    assert message.count("error: model and data are both missing") == 1
    assert "licence at https://huggingface.co/meta-llama/Llama-2-7b-hf" in message
    assert "hf auth login" in message and "hf download meta-llama/Llama-2-7b-hf" in message
    assert "--local-dir models/Llama-2-7b-hf\n" in message
    assert "then give --source models/Llama-2-7b-hf" in message
    assert (
        "hf download cerebras/SlimPajama-627B --repo-type dataset --include 'train/chunk1/*' "
        "--local-dir SlimPajama-627B\n" in message
    )
    assert (
        "python -m data.tokenize --input 'SlimPajama-627B/train/**/*.jsonl.zst' "
        "--tokenizer models/Llama-2-7b-hf --output runs/tokens --seq-len 4096 --workers " in message
    )


def test_without_model_and_data_one_error_says_how_to_get_both(tmp_path: Path) -> None:
    failed = command(cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.count("error") == 1 and "Traceback" not in failed.stderr
    check_both_halves(failed.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_ranks_print_that_error_once(tmp_path: Path) -> None:
    failed = command(cwd=tmp_path, ranks=2)
    assert failed.returncode != 0
    check_both_halves(failed.stderr)
    assert "error (rank" not in failed.stderr


def test_an_output_that_another_process_holds(inputs: Path, tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path / "out", "training"),
        pytest.raises(InputError, match=r"another process is training there"),
    ):
        run(configure(inputs, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    with pytest.raises(InputError, match=r"--source .* is what --output .* would replace"):
        run(configure(inputs, inputs))


def test_documented_defaults() -> None:
    config = ShearConfig()
    assert (config.source, config.target) == ("meta-llama/Llama-2-7b-hf", "1.3b")
    assert (config.data, config.output) == ("runs/tokens", "runs/shear")
    assert config.masks.rule == "projection"
    train = config.train
    assert (train.steps, train.global_batch, train.micro_batch) == (3200, 32, 4)
    assert (train.seq_len, train.lr, train.warmup_ratio) == (4096, 1e-4, 0.1)


def test_the_entry_file_stays_a_table_of_contents() -> None:
    assert shear.__file__ is not None
    assert len(Path(shear.__file__).read_text().splitlines()) < 80
