"""launch/finetune.py as users start it."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.factories import write_model, write_tokenizer, write_tokens

SCRIPT = str(ROOT / "launch" / "finetune.py")
FLAGS = (
    *("--seq-len", "32", "--global-batch", "16", "--micro-batch", "2", "--lr", "0.02"),
    *("--eval-sequences", "4", "--save-interval", "2", "--threads", "1"),
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what the command takes by default: runs/shear/model and runs/tokens."""
    folder = tmp_path_factory.mktemp("finetune")
    tokenizer = write_tokenizer(folder / "tokenizer")
    write_model(folder / "runs" / "shear" / "model", tokenizer)
    write_tokens(folder / "runs" / "tokens", tokenizer)
    return folder


def begin(folder: Path, *words: str, ranks: int = 1) -> subprocess.Popen[str]:
    """Starts the script, under torchrun when there are several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SHORN_", "RANK", "WORLD"))}
    command = [sys.executable, *(launcher if ranks > 1 else []), SCRIPT, *FLAGS, *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=kept, stdout=pipe, stderr=pipe, text=True)


def run(folder: Path, *words: str, ranks: int = 1) -> tuple[int, str]:
    """Exit status and all that it printed."""
    process = begin(folder, *words, ranks=ranks)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out + errors


def test_torchrun_with_defaults_for_model_data_and_output(workspace: Path) -> None:
    method = "lora" if find_spec("peft") else "last-blocks"
    words = ("--steps", "4", "--method", method, "--last-blocks", "1")
    status, printed = run(workspace, *words, ranks=2)
    assert status == 0, printed
    output = workspace / "runs" / "finetune"
    report = json.loads((output / "finetune.json").read_text())
    assert (report["method"], report["steps"], report["tokens"]) == (method, 4, 4 * 16 * 32)
    assert (output / "adapter" / "adapter_config.json").exists() == (method == "lora")
    assert (output / "model" / "tokenizer.json").exists()
    assert printed.count("final loss") == 1 and f"{method}: trains " in printed


def test_a_killed_run_goes_on_and_a_finished_one_ends_well(workspace: Path) -> None:
    """kill -9 while it trains; then the same command, twice."""
    words = ("--method", "last-blocks", "--last-blocks", "1", "--steps", "60", "--output", "kill")
    output = workspace / "kill"
    process = begin(workspace, *words)
    deadline = time.monotonic() + 120
    while not (saved := sorted(output.glob("checkpoints/step-*/COMMITTED"))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert saved and not (output / "finetune.json").exists()
    status, printed = run(workspace, *words)
    assert status == 0 and "resuming from" in printed, printed
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))
    status, printed = run(workspace, *words)
    assert status == 0 and "this run is finished" in printed


def test_what_cannot_be_is_one_line(workspace: Path) -> None:
    for words, message in (
        (("--epochs", "1", "--steps", "5"), "--epochs 1 and --steps 5 both say how long to train"),
        (("--lora-r", "0"), "--lora-r 0: must be at least 1"),
    ):
        status, printed = run(workspace, *words)
        assert status == 2 and printed.startswith(f"error: {message}"), printed
        assert len(printed.splitlines()) == 1


def test_help_has_examples() -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    )
    assert "torchrun --nproc_per_node 8 launch/finetune.py" in result.stdout
    for flag in ("--method", "--epochs", "--steps", "--last-blocks", "--lora-r", "--lr"):
        assert flag in result.stdout
