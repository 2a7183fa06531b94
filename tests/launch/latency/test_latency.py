"""`python -m launch.latency`: what is timed is what transformers generates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import InputError
from launch.latency import run as run_module
from launch.latency.__main__ import main
from launch.latency.config import LatencyConfig
from launch.latency.generation import Generator, Times
from launch.latency.peak import peak_bytes
from launch.latency.run import run
from tests.factories import write_model
from tests.pruner.test_extract import MODELS
from tests.trainer.models.test_uneven import save, uneven
from trainer.models.sources import weights_fingerprint


def test_as_many_tokens_as_asked_for_are_generated(tiny_model: Path) -> None:
    """Whatever the model's own settings say, and though it would end at once."""
    settings = {"eos_token_id": list(range(259)), "do_sample": True, "temperature": 0.7}
    (tiny_model / "generation_config.json").write_text(json.dumps(settings))
    generator = Generator(tiny_model, torch.device("cpu"), torch.float32)
    ids = generator.prompts(3, 5)
    assert ids.shape == (3, 5) and torch.equal(ids, generator.prompts(3, 5))
    seen: list[int] = []
    handle = generator.model.lm_head.register_forward_hook(
        lambda _, inputs, output: seen.append(inputs[0].shape[0])
    )
    times = generator.generate(ids, 7)
    handle.remove()
    # One pass for the prompt and each of the others.
    assert seen == [3] * 7
    assert 0 < times.first < times.total


def test_a_model_of_uneven_blocks_is_timed(tmp_path: Path) -> None:
    save(uneven(**MODELS["llama"]), tmp_path / "model")
    result = run(config([tmp_path / "model"], memory=False, input_tokens=4))
    assert result["models"][0]["batches"][0]["tokens_per_s"] > 0


def config(models: list[Path], **options: Any) -> LatencyConfig:
    defaults: dict[str, Any] = {"new_tokens": 4, "rounds": 2, "threads": 1}
    return LatencyConfig(models=tuple(map(str, models)), **defaults | options)


def test_what_is_written_is_what_was_timed(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = write_model(tmp_path / "other", hidden_size=16, head_dim=4)
    turns: list[tuple[int, int]] = []

    def timed(self: Generator, ids: torch.Tensor, new: int) -> Times:
        wide = int(self.model.config.hidden_size)
        turns.append((wide, len(ids)))
        slow = 100.0 if len(turns) <= 2 else 0.0  # the warm-up
        return Times(0.1 + slow, 0.1 + 0.3 * wide / 32 + slow)

    monkeypatch.setattr(Generator, "generate", timed)
    monkeypatch.setattr(run_module, "peak_bytes", lambda *words: 10**6 * words[-1])
    file = tmp_path / "out" / "l.json"
    words = [str(tiny_model), str(other), "--batch", "1", "4", "--new-tokens", "4"]
    main([*words, "--rounds", "3", "--json", str(file)])
    width = int(json.loads((tiny_model / "config.json").read_text())["hidden_size"])
    # In turns.
    assert turns == [(width, 1), (16, 1)] * 4 + [(width, 4), (16, 4)] * 4
    result = json.loads(file.read_text())
    first, second = (entry["batches"] for entry in result["models"])
    for place, batch in enumerate((1, 4)):
        decoding = 0.3 * width / 32
        cell = first[place]
        assert cell["batch"] == batch and cell["rounds"] == 3 and not cell["out_of_memory"]
        assert cell["prefill_ms"] == pytest.approx(100)
        assert cell["decode_ms_per_token"] == pytest.approx(1e3 * decoding / 3)
        assert cell["tokens_per_s"] == pytest.approx(batch * 4 / (0.1 + decoding))
        assert cell["peak_bytes"] == batch * 10**6
        assert second[place]["decode_ms_per_token"] == pytest.approx(50)
    printed = capsys.readouterr().out
    assert "batch 1: 12 tokens in, 4 new, float32, cpu" in printed and "batch 4" in printed
    assert f"{(0.1 + 0.3 * width / 32) / 0.25:.2f}x" in printed


def test_memory_that_runs_out_is_a_cell(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = Generator.generate

    def short(self: Generator, ids: torch.Tensor, new: int) -> Times:
        if len(ids) == 3:
            torch.empty(1 << 60, dtype=torch.uint8)
        return generate(self, ids, new)

    monkeypatch.setattr(Generator, "generate", short)
    monkeypatch.setattr(run_module, "peak_bytes", lambda *words: None if words[-1] == 5 else 7)
    result = run(config([tiny_model, tiny_model], batch=(1, 3, 5)))
    for entry in result["models"]:
        assert [cell["out_of_memory"] for cell in entry["batches"]] == [False, True, True]
        assert [cell["tokens_per_s"] is None for cell in entry["batches"]] == [False, True, True]
    assert capsys.readouterr().out.count("OOM") == 4


def test_the_peak_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", hidden_size=256, intermediate_size=4096, head_dim=64)
    words = (model, "float32", 1, 4, 3)
    small = peak_bytes(*words, 1)
    assert small is not None
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert weights < small < weights + 2 * 10**9
    with pytest.raises(RuntimeError, match="measuring the memory of"):
        peak_bytes(tmp_path / "nothing", "float32", 1, 4, 3, 1)


def test_losses_stand_beside_times(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra demo")
    other = write_model(tmp_path / "other", hidden_size=16, head_dim=4)
    losses = ((tiny_model, 2.5), (other, 3.25))
    rows: list[dict[str, Any]] = [
        {"model": "elsewhere", "weights": weights_fingerprint(model), "overall": {"loss": loss}}
        for model, loss in losses
    ]
    file, plot = tmp_path / "q.json", tmp_path / "pictures" / "p.png"
    file.write_text(json.dumps({"models": rows}))
    options: dict[str, Any] = {"quality": str(file), "plot": str(plot), "memory": False}
    result = run(config([tiny_model, other], **options))
    assert [entry["loss"] for entry in result["models"]] == [2.5, 3.25]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "3.2500" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--quality .*: has .* where .* is timed"):
        run(config([other, tiny_model], **options))
    with pytest.raises(InputError, match=r"holds losses of 2 models, and 1 are timed"):
        run(config([tiny_model], **options))
    for row in ({}, rows[0] | {"overall": {"loss": None}}):
        file.write_text(json.dumps(row))
        with pytest.raises(InputError, match=r"holds no losses on held-out tokens, or some that"):
            run(config([tiny_model], **options))
    monkeypatch.setattr(run_module, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"--plot needs matplotlib"):
        run(config([tiny_model], **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": ()}, "--batch names no number"),
        ({"batch": (4, 0)}, "--batch 0: must be at least 1"),
        ({"new_tokens": 1}, "--new-tokens 1: must be at least 2"),
        ({"rounds": 0}, "--rounds 0"),
        ({"plot": "p.png"}, "--plot p.png: shows losses over times; give --quality"),
        ({"new_tokens": 1000}, r"has 256 positions; use --new-tokens 244 or fewer"),
        ({"input_tokens": 4000}, r"use --input-tokens 252 or fewer, and as many --new-tokens as"),
        ({"json": "/"}, "--json"),
        ({"json": "a", "plot": "a", "quality": "q"}, "--json a"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str, tiny_model: Path) -> None:
    with pytest.raises(InputError, match=words):
        run(config([tiny_model], **options))


def test_models_that_do_not_fit_together_are_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "total_memory", lambda _: 100_000)
    with pytest.raises(InputError, match=r"the models together hold .* name fewer at once"):
        run(config([tiny_model]))
