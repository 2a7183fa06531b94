"""The scoring benchmark times what it names, and both ways agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import InputError
from launch.bench_scoring import __main__ as bench_scoring
from launch.bench_scoring import timing
from launch.bench_scoring.config import BenchScoringConfig
from tests.factories import write_model
from tests.pruner.test_refit import CASES, build, tokens

TINY: dict[str, Any] = {
    "hidden": 32,
    "layers": 4,
    "heads": 2,
    "ffn": 48,
    "vocabulary": 64,
    "sequences": 2,
    "seq_len": 16,
    "threads": 1,
    "repeats": 2,
}


@pytest.mark.parametrize("name", CASES)
def test_both_ways_give_the_same(name: str) -> None:
    model, ids = build(name), tokens(2)
    whole = model(ids)
    one, other = timing.shared(model, ids), timing.naive(model, ids)
    assert one.shape == (2, 3)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    # The model is whole again.
    assert torch.equal(model(ids), whole)


def test_the_ratio_follows_from_the_times(capsys: pytest.CaptureFixture[str]) -> None:
    result = timing.measure(BenchScoringConfig(**TINY))
    assert result["same_order"] and result["largest_difference_nats"] < 1e-4
    assert result["blocks"] == 4 and result["scoring_over_naive"] > 0
    seconds = result["seconds"]
    assert seconds["naive"]["rounds"] == 2 and seconds["shared"]["seconds"] > 0
    # 4 d^2 + 3 d f weights in a block, V d in the head.
    assert result["head_over_block"] == pytest.approx(64 * 32 / (4 * 32**2 + 3 * 32 * 48))
    timing.print_result(result | {"busy": "too busy to time: a"})
    assert "the same order" in capsys.readouterr().out


def test_the_command_writes_its_result(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=3)
    words = ["--source", str(model), "--sequences", "1", "--seq-len", "8", "--repeats", "1"]
    bench_scoring.main([*words, "--threads", "1", "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["blocks"] == 3 and result["source"] == str(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 1}, r"--layers 1: must be at least 2"),
        ({"heads": 3}, r"--hidden 32: each of --heads 3 gets 10.6667 .* example --hidden 30$"),
        ({"seq_len": 1}, r"--seq-len 1: must be at least 2"),
    ],
)
def test_bad_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BenchScoringConfig(**TINY | options)


def test_a_single_block_is_refused_before_it_is_timed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(InputError, match=r"--source .*model: has a single block"):
        timing.measure(BenchScoringConfig(source=str(model), threads=1))


def test_losses_that_are_no_numbers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model")
    whole = timing.naive
    monkeypatch.setattr(timing, "naive", lambda *data: whole(*data) * float("nan"))
    options: dict[str, Any] = {"sequences": 1, "seq_len": 8, "repeats": 1, "threads": 1}
    with pytest.raises(InputError, match=r"--source .*model: its losses are not finite"):
        timing.measure(BenchScoringConfig(source=str(model), **options))
