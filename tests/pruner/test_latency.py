"""The latency model recovers known coefficients and predicts speedups."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from pruner.budget import propose
from pruner.latency import (
    BLOCK_BYTES,
    POSITIONS,
    LatencyModel,
    calibration_models,
    decode_timer,
    fit,
    measure_latency,
)
from pruner.shapes import config_of, shape_of
from pruner.timing import Timing
from tests.pruner.test_budget import SOURCES
from trainer.models.config import ModelConfig

SMOLLM = SOURCES["smollm2-135m"]
TRUTH = LatencyModel(
    call=2e-4, block=3e-4, block_byte=1e-10, head_byte=2e-10, itemsize=4, error=0.0
)


def exact(configs: Sequence[ModelConfig]) -> list[float]:
    return [TRUTH.predict(config) for config in configs]


def exact_timings(configs: Sequence[ModelConfig]) -> list[Timing]:
    return [Timing((seconds, seconds)) for seconds in exact(configs)]


def test_prediction_counts_weights_cache_and_head() -> None:
    matrices = 2 * 576 * (9 + 3) * 64 + 3 * 576 * 1536
    numbers = 30 * (matrices + 2 * 576 + 2 * POSITIONS * 3 * 64) + 576
    head = 49152 * 576
    expected = 2e-4 + 30 * 3e-4 + 4 * (1e-10 * numbers + 2e-10 * head)
    assert TRUTH.predict(SMOLLM) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SOURCES)
def test_the_fit_recovers_the_coefficients(name: str) -> None:
    found, timings = measure_latency(SOURCES[name], exact_timings, itemsize=4)
    assert found.error < 1e-6 and len(timings) == 8
    for coefficient in ("call", "block", "block_byte", "head_byte"):
        # A tiny model hardly feels its bytes, so their price follows from it less exactly.
        tolerance = 1e-3 if name == "demo" else 1e-6
        expected = getattr(TRUTH, coefficient)
        assert getattr(found, coefficient) == pytest.approx(expected, rel=tolerance), coefficient


def test_noise_leaves_useful_predictions_and_no_negative_coefficient() -> None:
    configs = calibration_models(SMOLLM, 4)
    generator = np.random.default_rng(0)
    for _ in range(20):
        noise = generator.uniform(0.95, 1.05, len(configs))
        noisy = [seconds * factor for seconds, factor in zip(exact(configs), noise, strict=True)]
        found = fit(configs, noisy, 4)
        coefficients = (found.call, found.block, found.block_byte, found.head_byte)
        assert min(coefficients) >= 0
        assert found.error < 0.1
        assert found.predict(SMOLLM) == pytest.approx(TRUTH.predict(SMOLLM), rel=0.06)


def test_a_time_that_nothing_explains_shows_in_the_error() -> None:
    configs = calibration_models(SMOLLM, 4)
    seconds = exact(configs)
    seconds[3] *= 2
    assert fit(configs, seconds, 4).error > 0.2


@pytest.mark.parametrize("name", SOURCES)
def test_calibration_models_differ_in_depth_and_shape(name: str) -> None:
    source = SOURCES[name]
    models = calibration_models(source, 4)
    depths = {model.num_layers for model in models}
    shapes = {replace(shape_of(model), layers=1) for model in models}
    assert len(depths) == 2 and len(models) == 2 * len(shapes)
    assert len(shapes) == 4
    for model in models:
        assert model.to_hf().num_hidden_layers <= max(2, source.num_layers)
        blocks = 4 * model.num_parameters(embeddings=False)
        assert model.num_layers <= 2 or blocks < 1.1 * BLOCK_BYTES


@pytest.mark.parametrize("name", ["llama-2-7b", "smollm2-135m", "pythia-410m"])
@pytest.mark.parametrize("speedup", [1.5, 3.0])
def test_a_predicted_speedup_is_met_and_not_overshot(name: str, speedup: float) -> None:
    source = SOURCES[name]
    limit = TRUTH.predict(source) / speedup
    proposal = propose(source, TRUTH.predict, limit)
    assert proposal is not None
    assert proposal.cost == pytest.approx(TRUTH.predict(config_of(proposal.shape, source)))
    assert speedup <= TRUTH.predict(source) / proposal.cost <= speedup / 0.97


@pytest.mark.parametrize("name", ["demo", "pythia", "qwen2"])
def test_real_models_are_timed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {
        "demo": SOURCES["demo"],
        "pythia": config_of(
            replace(shape_of(SOURCES["pythia-410m"]), layers=2, hidden=64, heads=1, kv_heads=1),
            replace(SOURCES["pythia-410m"], vocab_size=99),
        ),
        "qwen2": config_of(
            replace(shape_of(SOURCES["qwen2.5-0.5b"]), layers=2, hidden=64, ffn=64),
            replace(SOURCES["qwen2.5-0.5b"], vocab_size=99),
        ),
    }
    monkeypatch.setattr("pruner.latency.ROUNDS", 2)
    before = torch.get_rng_state()
    timer = decode_timer(torch.device("cpu"), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        small, large = timer([sources[name], replace(sources[name], num_layers=12)])
    assert 0 < small.seconds < large.seconds < 10
    assert len(small.rounds) == 2
    assert "deprecated" not in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), before)


def test_a_slow_machine_measures_fewer_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10**6, 3))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    times = decode_timer(torch.device("cpu"), torch.float32)([SOURCES["demo"]])
    assert times == [Timing((3.0, 3.0))]
    assert "measure decoding: 3/13 turn" in capsys.readouterr().err
