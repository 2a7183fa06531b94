"""Options of shearing: refusals, and defaults that saved runs agree with."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from data.cli import parse
from data.errors import InputError
from pruner.config import (
    DEFAULTS,
    MaskConfig,
    ShearConfig,
    resolve,
    resolve_identity,
    resolve_masks,
)
from pruner.run import shear
from pruner.shapes import Shape, shape_of
from tests.factories import write_model, write_tokens
from tests.pruner.test_run import configure
from tests.trainer.models.cases import LLAMA_CASES, NEOX_CASES
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"harden": 1.5}, r"--harden 1\.5: must be in \(0, 1\]"),
        ({"target_warmup": 0.0}, r"--target-warmup 0\.0: must be in"),
        ({"target_warmup": 0.9}, r"--target-warmup 0\.9: must be at most --harden 0\.75"),
        ({"final_temperature": 0.6}, r"--final-temperature 0\.6: must be in .*--temperature 0\.5"),
        ({"mask_lr": 0.0}, r"--mask-lr 0\.0: must be above 0"),
        ({"mask_clip": -1.0}, r"--mask-clip -1\.0: must be above 0"),
        ({"mask_noise": -1.0}, r"--mask-noise -1\.0: must be 0 \(no noise\) or more"),
        ({"calibration_sequences": 0}, r"--calibration-sequences 0: must be at least 1"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaskConfig(**options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "mask_lr",
        "mask_clip",
        "target_warmup",
        "harden",
        "temperature",
        "final_temperature",
        "mask_noise",
    ],
)
def test_numbers_that_are_not_finite_are_refused(name: str, value: float) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(InputError, match=f"^{flag} {value}: must be a finite number"):
        MaskConfig(**{name: value})  # type: ignore[arg-type]


def test_numbers_beyond_single_precision_are_refused() -> None:
    with pytest.raises(InputError, match=r"^--mask-lr 1e\+300: must be at most 1e\+30"):
        MaskConfig(mask_lr=1e300)


def test_the_basis_follows_rule_family_and_target() -> None:
    def found(case: dict[str, Any], hidden: int = 24, **options: Any) -> str | None:
        model = ModelConfig.from_hf(case)
        source = shape_of(model)
        target = Shape(
            source.layers, hidden, source.heads, source.kv_heads, source.head_dim, source.ffn
        )
        return resolve(ShearConfig(masks=MaskConfig(**options)), model, target).masks.basis

    llama, neox = LLAMA_CASES["llama"], NEOX_CASES["gpt_neox"]
    assert found(llama) == "principal"
    assert found(llama, basis="source") == "source"
    assert found(llama, rule="sheared-llama") == "source"
    assert found(llama, rule="sheared-llama", basis="principal") == "principal"
    assert found(llama, hidden=48) == "source"
    assert found(neox) == "source"
    with pytest.raises(InputError, match="--basis principal needs a model with RMSNorm"):
        found(neox, basis="principal")


def test_paper_is_another_name_of_sheared_llama() -> None:
    assert MaskConfig(rule="paper") == MaskConfig(rule="sheared-llama")
    for argv in (["--rule", "paper"], ["--rule", "sheared-llama"]):
        assert parse(ShearConfig, section="shear", argv=argv).masks.rule == "sheared-llama"


def test_the_alias_works_in_the_environment_and_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shorn.toml").write_text('[shear]\nrule = "paper"\n')
    assert parse(ShearConfig, section="shear", argv=[]).masks.rule == "sheared-llama"
    monkeypatch.setenv("SHORN_RULE", "projection")
    assert parse(ShearConfig, section="shear", argv=[]).masks.rule == "projection"
    monkeypatch.setenv("SHORN_RULE", "paper")
    assert parse(ShearConfig, section="shear", argv=[]).masks.rule == "sheared-llama"


@pytest.mark.parametrize("rule", DEFAULTS)
@pytest.mark.parametrize("steps", [0, 8])
def test_a_resolved_config_leaves_nothing_open(rule: Any, steps: int) -> None:
    model = ModelConfig.from_hf(LLAMA_CASES["llama"])
    target = replace(shape_of(model), hidden=24)
    config = ShearConfig(masks=MaskConfig(rule=rule), train=TrainConfig(steps=steps))
    found = resolve(config, model, target)
    parts = (found.masks, found.distillation)
    assert all(value is not None for part in parts for value in asdict(part).values())
    assert found.train.min_lr_ratio is not None
    assert resolve(found, model, target) == found
    assert found.masks.calibration_sequences == 32
    short = resolve(ShearConfig(train=TrainConfig(seq_len=300)), model, target)
    assert short.masks.calibration_sequences == 219
    given = MaskConfig(rule=rule, init="taylor", mask_lr=0.3, target_warmup=0.4, norm_scale="live")
    kept = resolve_masks(given)
    assert (kept.init, kept.mask_lr, kept.target_warmup) == ("taylor", 0.3, 0.4)
    assert kept.norm_scale == "live"


UNRESOLVED = {
    "masks.init": None,
    "masks.calibration_sequences": 6,
    "masks.mask_lr": None,
    "masks.mask_clip": 1.0,
    "masks.target_warmup": None,
    "masks.harden": 0.75,
    "masks.temperature": 0.5,
    "masks.final_temperature": 0.02,
    "masks.mask_noise": 0.5,
    "masks.compact": True,
    "masks.mask_draws": None,
    "masks.implicit_gradient": True,
}
SAVED = {
    "projection": UNRESOLVED
    | {"masks.rule": "projection", "masks.basis": "principal", "masks.norm_scale": "held"},
    "paper": UNRESOLVED
    | {"masks.rule": "paper", "masks.basis": "source", "masks.norm_scale": "live"},
}
"""What run.json held of the masks before its options were resolved, by the flag --rule."""


@pytest.mark.parametrize("rule", SAVED)
def test_saved_identities_of_unresolved_options_are_those_of_today(rule: Any) -> None:
    given = MaskConfig(rule=rule, calibration_sequences=6)
    today = {f"masks.{name}": value for name, value in asdict(resolve_masks(given)).items()}
    assert today.keys() == SAVED[rule].keys() | {"masks.freeze_weights"}
    del today["masks.calibration_sequences"]
    today["layer_widths"] = "uniform"
    assert resolve_identity({"steps": 8, **SAVED[rule]}) == {"steps": 8, **today}
    assert resolve_identity(today) == today
    assert resolve_identity({"command": "cpt"}) == {"command": "cpt"}
    other = resolve_identity(SAVED[rule] | {"masks.mask_lr": 0.2, "masks.init": "taylor"})
    assert (other["masks.mask_lr"], other["masks.init"]) == (0.2, "taylor")


@pytest.mark.parametrize("rule", SAVED)
def test_a_run_that_saved_unresolved_options_is_resumed(rule: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=3)
    write_tokens(tmp_path / "tokens", model, number=40)
    output = tmp_path / "out"
    shear(configure(tmp_path, output, rule=rule, keep_last_checkpoint=True))
    identity = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(identity | SAVED[rule]))
    (output / "shear.json").unlink()
    shear(configure(tmp_path, output, rule=rule))
    assert (output / "shear.json").exists()
    with pytest.raises(InputError, match=r"--mask-lr was .*, now 0\.3\. Repeat"):
        shear(configure(tmp_path, output, rule=rule, mask_lr=0.3))
