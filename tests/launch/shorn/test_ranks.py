"""`shorn --ranks N`: ranks of this machine, their output, exit statuses and signals."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from data.cli import STOPPED
from data.errors import InputError
from launch.shorn import ranks
from tests.conftest import ROOT
from tests.factories import write_model, write_tokenizer, write_tokens

FLAGS = "--seq-len 32 --global-batch 16 --micro-batch 1 --eval-sequences 4 --lr 0.01".split()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the model and the tokens that launch/cpt.py takes by default."""
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer = write_tokenizer(folder / "tokenizer")
    write_model(folder / "runs" / "shear" / "model", tokenizer)
    write_tokens(folder / "runs" / "tokens", tokenizer)
    return folder


SHORN = ("-m", "launch.shorn", "--ranks", "2", "cpt")
TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node=2",
    str(ROOT / "launch/cpt.py"),
)


def start(folder: Path, *words: str, by: tuple[str, ...] = SHORN[:2]) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SHORN_", "RANK", "WORLD"))}
    return subprocess.Popen(
        [sys.executable, *by, *words],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_ranks_train(workspace: Path) -> None:
    process = start(workspace, "--ranks", "2", "cpt", "--steps", "3", *FLAGS)
    printed, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints
    assert printed.count("final loss") == 1 and "elastic" not in complaints
    report = json.loads((workspace / "runs" / "cpt" / "cpt.json").read_text())
    assert report["tokens"] == 3 * 16 * 32


def test_an_error_is_one_line_and_status_2(workspace: Path) -> None:
    process = start(workspace, "cpt", "--ranks", "2", *FLAGS, "--global-batch", "15")
    _, complaints = process.communicate(timeout=300)
    assert process.returncode == 2
    (line,) = complaints.splitlines()
    assert line.startswith("error: --global-batch 15 does not divide over 2 ranks; ")


@pytest.mark.parametrize("word", ["/dev/fd/63", "--text=/dev/fd/63"])
def test_a_pipe_of_the_shell_is_refused(word: str) -> None:
    with pytest.raises(InputError, match=r"--ranks 2: .*/dev/fd/63 is a pipe .* into a file"):
        ranks.start_ranks(2, ["evaluate", word])


def wait_for_steps(process: subprocess.Popen[str], output: Path) -> None:
    metrics = output / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.1)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_ends_with_75(workspace: Path, number: signal.Signals) -> None:
    output = workspace / "runs" / number.name
    words = ["--ranks", "2", "cpt", "--steps", "100000", "--output", str(output), *FLAGS]
    process = start(workspace, *words)
    wait_for_steps(process, output)
    process.send_signal(number)
    printed, complaints = process.communicate(timeout=120)
    assert process.returncode == STOPPED, complaints
    assert "stopped: saved" in printed and "Traceback" not in complaints
    assert list((output / "checkpoints").iterdir())


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == launcher.pid:
                found.append(int(path.parent.name))
    return sorted(found)


@pytest.mark.parametrize("by", [SHORN, pytest.param(TORCHRUN, marks=pytest.mark.slow)])
def test_ranks_save_and_end_when_their_launcher_is_killed(
    workspace: Path, by: tuple[str, ...]
) -> None:
    output = workspace / "runs" / f"killed-{by[1]}"
    process = start(workspace, "--steps", "100000", "--output", str(output), *FLAGS, by=by)
    wait_for_steps(process, output)
    assert len(ranks_of(process)) == 2
    process.kill()
    # The pipes close when the last process that writes to them is gone.
    printed, complaints = process.communicate(timeout=60)
    assert "stopped: saved" in printed, complaints
    assert list((output / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_rank_that_was_killed_is_named(workspace: Path) -> None:
    output = workspace / "runs" / "lost"
    process = start(workspace, "--steps", "100000", "--output", str(output), *FLAGS, by=SHORN)
    wait_for_steps(process, output)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 137
    last = complaints.splitlines()[-1]
    assert last.startswith("error: rank 1 was ended by SIGKILL, most likely for want of memory")


DEFECT = """
import sys; sys.path.insert(0, {root!r})
from data.cli import run
from trainer import parallel
def main():
    context = parallel.init(threads=1)
    if context.rank == 1:
        raise ZeroDivisionError("the cause")
    context.barrier()
run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", [SHORN, TORCHRUN])
def test_a_defect_on_one_rank_is_what_one_reads(
    workspace: Path, tmp_path: Path, by: tuple[str, ...]
) -> None:
    script = tmp_path / "defect.py"
    script.write_text(DEFECT.format(root=str(ROOT)))
    if by == SHORN:
        code = (
            "import launch.shorn.ranks as ranks, torch, sys; start = ranks.start_processes\n"
            f"ranks.start_processes = lambda **k: start(**k | {{'args': {{0: ({str(script)!r},), "
            f"1: ({str(script)!r},)}}}})\n"
            "sys.exit(ranks.start_ranks(2, []))"
        )
        process = start(workspace, by=("-c", code))
    else:
        process = start(workspace, by=(*TORCHRUN[:-1], str(script)))
    _, complaints = process.communicate(timeout=100)
    assert process.returncode == 1
    assert (
        "rank 1 failed:\nTraceback" in complaints and "ZeroDivisionError: the cause" in complaints
    )
    assert "lost the connection" not in complaints


def test_the_cause_decides_the_status() -> None:
    assert ranks.exit_status([]) == 0
    assert ranks.exit_status([1, -15]) == 1
    assert ranks.exit_status([-6, 2]) == 2
    assert ranks.exit_status([-9, -15]) == 137
    # A checkpoint that cannot be written, beside ranks that only stopped.
    assert ranks.exit_status([75, 75]) == ranks.exit_status([-15, 75]) == 75
    assert ranks.exit_status([75, 2]) == 2


def test_only_ranks_that_nobody_explained_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    def failures(*ranks: tuple[int, int]) -> list[ProcessFailure]:
        found = [ProcessFailure(rank, 1, status, "") for rank, (status, _) in enumerate(ranks)]
        for failure, (_, second) in zip(found, ranks, strict=True):
            failure.timestamp = second
        return found

    ranks._name_the_dead([])
    # The launcher itself ended rank 1, which did not heed SIGTERM.
    ranks._name_the_dead(failures((2, 100), (-9, 130)))
    ranks._name_the_dead(failures((-15, 100), (-2, 100)))
    ranks._name_the_dead(failures((-10, 100), (-15, 100)))
    assert capsys.readouterr().err == ""
    ranks._name_the_dead(failures((-11, 100), (-9, 130), (-15, 101)))
    assert capsys.readouterr().err.startswith("error: rank 0 was ended by SIGSEGV; run the sam")


def test_a_signal_while_ranks_are_started_is_no_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(number: int) -> None:
        def start(**_: object) -> None:
            raise SignalException("torch's word for it", signal.Signals(number))

        monkeypatch.setattr(ranks, "start_processes", start)

    end(signal.SIGTERM)
    assert ranks.start_ranks(2, ["cpt"]) == 128 + signal.SIGTERM
    end(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ranks.start_ranks(2, ["cpt"])


@pytest.mark.slow
def test_ranks_whose_output_nobody_reads_save(workspace: Path) -> None:
    output = workspace / "runs" / "unread"
    words = ["--ranks", "2", "cpt", "--steps", "400", "--eval-interval", "4"]
    process = start(workspace, *words, "--output", str(output), *FLAGS)
    assert process.stdout is not None and process.stderr is not None
    wait_for_steps(process, output)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(120) == 128 + signal.SIGPIPE
    (saved,) = (output / "checkpoints").iterdir()
    steps = (output / "metrics.jsonl").read_text().count("\n")
    assert int(saved.name.removeprefix("step-")) == steps


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="--ranks 3: this machine has 2 GPUs; use --ranks 2"):
        ranks.start_ranks(3, ["cpt"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(InputError, match="torchrun has started ranks already"):
        ranks.start_ranks(2, ["cpt"])


def test_a_machine_without_a_network_to_itself_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DistNetworkError("Network is unreachable")

    monkeypatch.setattr(ranks, "TCPStore", fail)
    with pytest.raises(InputError, match=r"--ranks 2: .*no network to itself.*ip link set lo up"):
        ranks.start_ranks(2, ["cpt"])
