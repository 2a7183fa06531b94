"""A budget is resolved once, by prediction and measurement, for all ranks."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import InputError
from pruner import proposal as proposal_module
from pruner.budget import Budget, parse_budget
from pruner.proposal import (
    TARGET_FILE,
    measured_seconds,
    recorded,
    resolve,
    resolve_together,
)
from pruner.shapes import config_of, parse_target, shape_of
from pruner.timing import Timing
from tests.distributed import run_ranks
from tests.pruner.test_budget import SOURCES
from trainer import parallel
from trainer.models.config import ModelConfig

SMOLLM = SOURCES["smollm2-135m"]
CPU = torch.device("cpu")


def budget(text: str) -> Budget:
    found = parse_budget(text)
    assert found is not None
    return found


def synthetic(configs: Sequence[ModelConfig]) -> list[float]:
    """Seconds per token of a machine that reads 10 GB/s and starts a block in 0.1 ms."""
    return [
        1e-3
        + 1e-4 * config.num_layers
        + 4e-10 * (config.num_parameters(embeddings=False) + config.vocab_size * config.hidden_size)
        for config in configs
    ]


def steady(configs: Sequence[ModelConfig]) -> list[Timing]:
    return [Timing((seconds,) * 4) for seconds in synthetic(configs)]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces measuring by `synthetic`; holds the number of models of each call."""
    calls: list[int] = []

    def timer(configs: Sequence[ModelConfig]) -> list[Timing]:
        calls.append(len(configs))
        return steady(configs)

    monkeypatch.setattr(proposal_module, "decode_timer", lambda *_: timer)
    return calls


def test_parameters_are_resolved_without_measuring(
    timed: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    record = resolve(budget("params=70m"), SMOLLM, CPU, torch.float32)
    target = parse_target(record["shape"], shape_of(SMOLLM))
    count = config_of(target, SMOLLM).num_parameters()
    assert 0.97 * 70e6 <= count <= 70e6
    assert record["parameters"] == {"source": SMOLLM.num_parameters(), "target": count}
    assert record["used"] == pytest.approx(count / 70e6)
    assert record["latency"] is None and timed == []
    assert json.loads(json.dumps(record)) == record
    printed = capsys.readouterr().out
    assert f"--target {record['shape']}" in printed
    assert f"{count:,}" in printed and "KV heads" in printed and "at least 97%" in printed
    assert "time per token" not in printed


def test_block_parameters_have_their_own_budget(capsys: pytest.CaptureFixture[str]) -> None:
    record = resolve(budget("params-non-embedding=46m,layers=24"), SMOLLM, CPU, torch.float32)
    assert 0.97 * 46e6 <= record["non_embedding_parameters"]["target"] <= 46e6
    assert record["shape"].startswith("layers=24,")
    assert "and have layers=24" in capsys.readouterr().out


def test_a_speedup_is_predicted_and_then_measured(
    timed: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    record = resolve(budget("speedup=2"), SMOLLM, CPU, torch.float32)
    assert timed == [8, 2]
    target = config_of(parse_target(record["shape"], shape_of(SMOLLM)), SMOLLM)
    before, after = synthetic([SMOLLM, target])
    assert 1.98 <= before / after <= 2.1
    latency = record["latency"]
    assert latency["measured"] == {"source": before, "target": after}
    # The cached keys and values are in the prediction and not in these times.
    assert latency["predicted"]["source"] == pytest.approx(before, rel=0.02)
    assert latency["predicted"]["source"] / latency["predicted"]["target"] >= 2
    printed = capsys.readouterr().out
    assert "predicted time per token" in printed and "measured time per token" in printed
    assert f"{before / after:.2f}x faster" in printed
    assert "cpu, float32, batch 1" in printed


def test_models_that_do_not_fit_are_not_measured_whole(
    timed: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proposal_module, "total_memory", lambda _: 10**9)
    record = resolve(budget("speedup=2"), SMOLLM, CPU, torch.float32)
    assert timed == [8]
    assert record["latency"]["measured"] is None
    assert "not measured: both models together need" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params=135m", r"params=135,000,000 is not below the source's 134,515,008.*only removes"),
        ("params=1b", r"params=1,000,000,000 is not below the source's"),
        ("params-non-embedding=110m", r"110,000,000 is not below the source's 106,203,456"),
        ("params=1m", r"smallest shape.*layers=1,hidden=32,heads=1.*use params=1584224 or more"),
        ("params=50m,hidden=576,layers=30,heads=9,kv-heads=3", r"can give with hidden=576,"),
        ("speedup=1000", r"out of reach on this device: the fastest.*use at most speedup=\d+\.\d"),
        ("params=70m,layers=40", r"layers=40 is outside 1\.\.30"),
    ],
)
def test_budgets_that_cannot_be_met_name_what_can(
    text: str, message: str, timed: list[int]
) -> None:
    with pytest.raises(InputError, match=message):
        resolve(budget(text), SMOLLM, CPU, torch.float32)


@pytest.mark.parametrize("text", ["params=1m", "speedup=1000"])
def test_what_the_error_names_can_be_met(text: str, timed: list[int]) -> None:
    with pytest.raises(InputError) as error:
        resolve(budget(text), SMOLLM, CPU, torch.float32)
    key = text.partition("=")[0]
    value = str(error.value).rpartition(f"{key}=")[2].split()[0].rstrip(",")
    resolve(budget(f"{key}={value}"), SMOLLM, CPU, torch.float32)


def test_a_budget_that_steps_leave_unused_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"params={SOURCES['demo'].num_parameters() - 1}"
    record = resolve(budget(text), SOURCES["demo"], CPU, torch.float32)
    assert 0.9 < record["used"] < 0.97
    assert "the steps between shapes are coarse" in capsys.readouterr().out


def test_a_record_is_for_one_budget_of_one_source(tmp_path: Path) -> None:
    record = resolve(budget("params=70m"), SMOLLM, CPU, torch.float32)
    assert recorded(tmp_path, budget("params=70m"), SMOLLM) is None
    (tmp_path / TARGET_FILE).write_text(json.dumps(record))
    assert recorded(tmp_path, budget(" Params=70M"), SMOLLM) == record
    assert recorded(tmp_path, budget("params=71m"), SMOLLM) is None
    assert recorded(tmp_path, budget("params=70m"), SOURCES["demo"]) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list, not an object"),
        ('{"budget": "params=70m"}', "`source` is missing"),
        ('{"budget": 5, "source": "", "shape": ""}', "`budget` is a whole number, not text"),
    ],
)
def test_a_damaged_record_is_named_and_not_measured_again(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / TARGET_FILE).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        recorded(tmp_path, budget("params=70m"), SMOLLM)
    assert "target.json" in str(error.value) and "run.json" in str(error.value)
    assert measured_seconds(tmp_path) == {}


@pytest.mark.parametrize(
    ("rounds", "factor", "warning"),
    [
        ((1.0, 1.0, 1.05, 0.95), 1.0, ""),
        ((1.0, 1.0, 1.3, 1.3), 1.0, "too busy to time: .*its rounds differ by 26%"),
        ((1.0, 1.0), 2.0, "miss those measured by up to .* so the shape may be wrong"),
    ],
    ids=["steady", "busy", "misfit"],
)
def test_times_that_cannot_be_relied_on_are_said_to_be(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rounds: tuple[float, ...],
    factor: float,
    warning: str,
) -> None:
    def timer(configs: Sequence[ModelConfig]) -> list[Timing]:
        found = [Timing(tuple(one * s for one in rounds)) for s in synthetic(configs)]
        if len(configs) > 2:
            found[3] = Timing(tuple(factor * one for one in found[3].rounds))
        return found

    monkeypatch.setattr(proposal_module, "decode_timer", lambda *_: timer)
    record = resolve(budget("speedup=2"), SMOLLM, CPU, torch.float32)
    shown = capsys.readouterr()
    assert "spread of the rounds" in shown.out
    assert (record["latency"]["busy"] is not None) == warning.startswith("too busy")
    assert re.search(warning, shown.err) if warning else shown.err == ""


def test_a_speedup_that_is_not_reached_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timer(configs: Sequence[ModelConfig]) -> list[Timing]:
        found = steady(configs)
        return found if len(configs) > 2 else [found[0], Timing((found[1].seconds * 1.2,))]

    monkeypatch.setattr(proposal_module, "decode_timer", lambda *_: timer)
    resolve(budget("speedup=2"), SMOLLM, CPU, torch.float32)
    assert re.search(
        r"measured, the target decodes 1\.7\dx as fast .*not 2x", capsys.readouterr().err
    )


def resolve_on_a_rank(output: Path, text: str) -> Any:
    """Each rank's clock differs; only rank 0's may count."""
    context = parallel.init(threads=1)

    def timer(configs: Sequence[ModelConfig]) -> list[Timing]:
        assert context.is_main, "another rank measures"
        return steady(configs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proposal_module, "decode_timer", lambda *_: timer)
        try:
            return resolve_together(budget(text), SMOLLM, output, context, torch.float32)
        except InputError as error:
            return str(error)


def test_rank_zero_resolves_for_all(tmp_path: Path) -> None:
    first, second = run_ranks(resolve_on_a_rank, 2, tmp_path, "speedup=2")
    assert first == second and first["budget"] == "speedup=2"
    errors = run_ranks(resolve_on_a_rank, 2, tmp_path, "speedup=1000")
    assert errors[0] == errors[1] and "out of reach" in errors[0]
