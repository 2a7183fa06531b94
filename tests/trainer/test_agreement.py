"""Ranks that were started for different work."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data import given
from data.cli import parse
from data.errors import InputError
from launch.evaluate.__main__ import main as evaluate
from launch.evaluate.config import EvaluateConfig
from pruner.config import ShearConfig
from pruner.shorten.config import ShortenConfig
from tests.distributed import run_ranks
from tests.factories import write_model
from tests.trainer.tiny import SHAPE, options
from trainer import parallel
from trainer.agreement import require_same
from trainer.config import CptConfig
from trainer.identity import run_identity, verify_run

CONFIGS: dict[str, type] = {
    "cpt": CptConfig,
    "shear": ShearConfig,
    "shorten": ShortenConfig,
    "evaluate": EvaluateConfig,
}


def meet(*commands: str) -> str:
    """What the rank is told that was started with its own of `commands`."""
    command, *words = commands[dist.get_rank()].split()
    parse(CONFIGS[command], section=command, argv=words)
    return told(lambda: parallel.init(threads=1))


def told(action: Any) -> str:
    try:
        action()
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        (("cpt --lr 0.5", "cpt --lr 0.25"), "--lr is 0.5 on rank 0 and 0.25 on rank 1; start"),
        (("cpt --steps 3", "cpt"), "--steps is 3 on rank 0 and 24000 on rank 1; "),
        (("shear", "shear --mixture fixed"), "--mixture is dynamic on rank 0 and fixed on rank 1;"),
        (("shear --json a", "shear"), "--json is given on rank 0 and not given on rank 1;"),
        (("shorten --remove 1", "shorten --ratio 0.1"), "--remove is 1 on rank 0 and not given on"),
        (
            ("evaluate --speed", "evaluate --speed --model a b"),
            "--model is not given on rank 0 and 2 names on rank 1",
        ),
        (("cpt --output a", "cpt --output b"), "--output is a on rank 0 and b on rank 1;"),
        (("cpt", "shear"), "different work: the command is cpt on rank 0 and shear on rank 1; "),
        (("cpt --data a --threads 1", "cpt --data b --threads 2 --log-level warning"), ""),
        (("cpt", "cpt --lr 1e-4 --seed 0 --steps 24000"), ""),
    ],
)
def test_options_that_differ_are_named(commands: tuple[str, ...], message: str) -> None:
    first, second = run_ranks(meet, 2, *commands)
    assert first == second and message in first and bool(first) == bool(message)


def test_variables_of_one_machine_count() -> None:
    def start() -> str:
        if dist.get_rank() == 1:
            os.environ["SHORN_SEED"] = "7"
        return meet("cpt", "cpt")

    assert "--seed is 0 on rank 0 and 7 on rank 1" in run_ranks(start, 2)[0]


def test_many_ranks_are_counted_by_their_value() -> None:
    everyone = [{"--lr": "1", "--seed": "0"}] * 9 + [{"--lr": "2", "--seed": "0"}]
    with pytest.raises(InputError, match=r"--lr is 1 on ranks 0, .*7, \.\.\. and 2 on rank 9; do"):
        require_same({}, lambda _: everyone, "do this")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"data": "def"}, "--data is 'abc' on rank 0 and 'def' on rank 1; give"),
        ({"domain_weights": {"a": 0.5, "b" * 99: 0.25}}, "--domain-weights is a=0.5,b"),
        ({"initial_weights": "f"}, "--model is 'e' on rank 0 and 'f' on rank 1"),
        ({"mixture": {"kind": "replay", "history": "2"}}, "--mixture-history is '1' on"),
        ({"lr": 0.5}, "--lr is 0.01 on rank 0 and 0.5 on rank 1"),
        ({"revisions": {"--model": "a"}}, ""),
    ],
)
def test_what_ranks_have_opened_is_compared_before_a_run(
    tmp_path: Path, own: dict[str, Any], message: str
) -> None:
    same: dict[str, Any] = {"domain_weights": {"a": 0.5, "b" * 99: 0.5}, "initial_weights": "e"}
    same["mixture"] = {"kind": "replay", "history": "1"}

    def start() -> str:
        identity = run_identity(options(), SHAPE, precision="fp32", data="abc", **same)
        identity |= own if dist.get_rank() else {}
        context = parallel.init(threads=1)
        return told(lambda: verify_run(tmp_path / "out", identity, context, started=False))

    (tmp_path / "out").mkdir()
    first, second = run_ranks(start, 2)
    assert first == second and message in first and bool(first) == bool(message)
    assert (tmp_path / "out" / "run.json").exists() == (not message)


def test_evaluation_names_other_models(tmp_path: Path, tiny_model: Path, tiny_tokens: Path) -> None:
    models = (tiny_model, write_model(tmp_path / "other", num_hidden_layers=3))

    def start() -> str:
        words = ["--model", str(models[dist.get_rank()]), "--data", str(tiny_tokens)]
        return told(lambda: evaluate([*words, "--seq-len", "32"]))

    first, second = run_ranks(start, 2)
    assert first == second and "model 1 of --model is " in first


def test_a_text_that_comes_by_a_pipe_is_scored_whole(tmp_path: Path, tiny_model: Path) -> None:
    text = "the shape of a model is a contract. " * 20
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    result = tmp_path / "result.json"
    words = ["--model", str(tiny_model), "--text", f"/dev/fd/{reading}", "--json", str(result)]
    run_ranks(lambda: evaluate([*words, "--window", "32"]), 2)
    assert f'"bytes": {len(text)}' in result.read_text()


def test_a_command_line_leaves_what_it_asks_for() -> None:
    parse(CptConfig, section="cpt", argv=["--data", "tokens", "--lr", "1e-3"])
    found = given.given()
    assert found["the command"] == "cpt" and found["--lr"] == "0.001"
    assert found["--data"] == "given" and "--threads" not in found
