"""What makes a run the same one, and which options may differ on a resume."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from data.mixture import MixtureConfig
from tests.trainer.tiny import SHAPE, options
from trainer import parallel
from trainer.config import TrainConfig
from trainer.identity import _in_words, read_identity, revisions, run_identity, verify_run
from trainer.models.config import ModelConfig
from trainer.models.sources import weights_fingerprint


def verify(
    output: Path,
    config: TrainConfig,
    model: ModelConfig = SHAPE,
    *,
    data: str = "abc",
    started: bool = True,
    **others: Any,
) -> None:
    others = {"target": {"layers": (1, 2)}} | others
    identity = run_identity(config, model, precision="fp32", data=data, **others)
    verify_run(output, identity, parallel.init(threads=1), started=started)


def test_the_same_run_is_accepted(tmp_path: Path) -> None:
    verify(tmp_path, options(), started=False)
    verify(tmp_path, options(micro_batch=4, save_interval=7, threads=2, eval_interval=3))
    identity = read_identity(tmp_path)
    assert identity is not None and identity["lr"] == 1e-2 and identity["model.hidden_size"] == 16


def test_differences_are_named(tmp_path: Path) -> None:
    verify(tmp_path, options(), started=False)
    with pytest.raises(InputError, match=r"--lr was 0\.01, now 0\.5, --seed was 0, now 1\. Repeat"):
        verify(tmp_path, options(lr=0.5, seed=1))
    with pytest.raises(InputError, match="--data holds other tokens"):
        verify(tmp_path, options(), data="def")
    with pytest.raises(InputError, match=r"--model is another model \(num_layers was 2, now 3\)"):
        verify(tmp_path, options(), replace(SHAPE, num_layers=3))


def test_old_values_are_told_as_their_flags_take_them(tmp_path: Path) -> None:
    before: dict[str, Any] = {"precision": "torch.float32", "mixture": {"interval": None}}
    before |= {"masks.compact": True, "domain_weights": {"a": 0.25, "b": 0.75}}
    after: dict[str, Any] = {"precision": "torch.bfloat16", "mixture": {"interval": 5}}
    after |= {"masks.compact": False, "domain_weights": {"a": 0.5, "b": 0.5}}
    assert _in_words(before, after, sorted(before)) == [
        "--compact was on, now off",
        "--domain-weights was a=0.25,b=0.75, now a=0.5,b=0.5",
        "--mixture-interval was not given, now 5",
        "--precision was fp32, now bf16",
    ]


def checkpoint(output: Path, step: int) -> None:
    folder = output / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "COMMITTED").write_text("{}")


def test_remedies_against_divergence_may_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(tmp_path, options(), started=False)
    checkpoint(tmp_path, 12)
    verify(tmp_path, options(lr=0.005, clip=0.5, weight_decay=0.2, min_lr_ratio=0.2))
    notes = capsys.readouterr().out
    assert "lr 0.01 -> 0.005 from step 13" in notes and notes.count("note:") == 4
    identity = read_identity(tmp_path)
    assert identity is not None and (identity["lr"], identity["clip"]) == (0.005, 0.5)
    verify(tmp_path, options(lr=0.005, clip=0.5, weight_decay=0.2, min_lr_ratio=0.2))
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match=r": --seed was 0, now 1\. Repeat"):
        verify(tmp_path, options(lr=0.001, clip=0.5, weight_decay=0.2, min_lr_ratio=0.2, seed=1))
    assert capsys.readouterr().out == "" and read_identity(tmp_path) == identity


def test_a_finished_run_cannot_change(tmp_path: Path) -> None:
    verify(tmp_path, options(), started=False)
    checkpoint(tmp_path, 20)
    with pytest.raises(InputError, match=r"lr was 0\.01, now 0\.5"):
        verify(tmp_path, options(lr=0.5))


def test_another_optimizer_is_another_run(tmp_path: Path) -> None:
    verify(tmp_path, options(optimizer="muon"), started=False)
    verify(tmp_path, options(optimizer="muon", muon_momentum=0.95))
    with pytest.raises(InputError, match=r": --muon-momentum was 0\.95, now 0\.9\. Repeat"):
        verify(tmp_path, options(optimizer="muon", muon_momentum=0.9))
    with pytest.raises(InputError, match=r": --optimizer was 'muon', now 'adamw'\. Repeat"):
        verify(tmp_path, options())


def test_runs_of_before_there_was_a_choice_had_adamw(tmp_path: Path) -> None:
    verify(tmp_path, options(), started=False)
    identity = read_identity(tmp_path)
    assert identity is not None
    known = {k: v for k, v in identity.items() if k not in ("optimizer", "muon_momentum")}
    (tmp_path / "run.json").write_text(json.dumps(known))
    verify(tmp_path, options())
    with pytest.raises(InputError, match=r": --optimizer was 'adamw', now 'muon'\. Repeat"):
        verify(tmp_path, options(optimizer="muon"))


def test_more_steps_are_another_schedule(tmp_path: Path) -> None:
    verify(tmp_path, options(), started=False)
    with pytest.raises(InputError, match=r"steps was 20, now 40.*learning-rate schedule$"):
        verify(tmp_path, options(steps=40))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"steps was 20, now 40.*schedule; .*--model .*model"):
        verify(tmp_path, options(steps=40))


def test_differences_are_told_as_options_are_given(tmp_path: Path) -> None:
    mixture = asdict(MixtureConfig())
    weights = {"a": 0.5, "b": 0.5}
    verify(tmp_path, options(), started=False, mixture=mixture, domain_weights=weights)
    with pytest.raises(InputError, match=r"--mixture-interval was not given, now 3\. Repeat"):
        verify(tmp_path, options(), mixture=mixture | {"interval": 3}, domain_weights=weights)
    with pytest.raises(
        InputError, match=r"--domain-weights was a=0\.5,b=0\.5, now a=0\.4,b=0\.6\."
    ):
        verify(tmp_path, options(), mixture=mixture, domain_weights={"a": 0.4, "b": 0.6})
    precisions = ("torch.float32", "torch.bfloat16")
    old, new = (
        run_identity(options(), SHAPE, precision=precision, data="abc") for precision in precisions
    )
    verify_run(tmp_path / "other", old, parallel.init(threads=1), started=False)
    with pytest.raises(InputError, match=r"--precision was fp32, now bf16\. Repeat"):
        verify_run(tmp_path / "other", new, parallel.init(threads=1), started=True)


def test_what_follows_from_other_data_is_not_told_besides(tmp_path: Path) -> None:
    verify(tmp_path, options(), started=False, domain_weights={"a": 0.5, "b": 0.5})
    with pytest.raises(InputError, match=r": --seq-len was 16, now 8\. Repeat"):
        verify(tmp_path, options(seq_len=8), domain_weights={"a": 0.4, "b": 0.6})
    with pytest.raises(InputError, match=r": --domain-weights was "):
        verify(tmp_path, options(), domain_weights={"a": 0.4, "b": 0.6})


def test_a_run_without_progress_is_replaced(tmp_path: Path) -> None:
    verify(tmp_path, options(), started=False)
    verify(tmp_path, options(lr=0.5), started=False)
    identity = read_identity(tmp_path)
    assert identity is not None and identity["lr"] == 0.5


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output .*file.* cannot be written"):
        verify(tmp_path / "file", options(), started=False)


def test_weights_fingerprint_sees_changes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(300_000))
    zeros = weights_fingerprint(tmp_path)
    assert zeros == weights_fingerprint(tmp_path)
    file.write_bytes(bytes(100_000) + b"\x01" * 100_000 + bytes(100_000))
    assert weights_fingerprint(tmp_path) != zeros


def test_what_a_name_on_the_hub_stood_for_is_told_and_makes_no_other_run(tmp_path: Path) -> None:
    def stood(commit: str) -> dict[str, Any]:
        folder = tmp_path / "models--acme--tiny" / "snapshots" / commit
        return revisions({"--model": ("acme/tiny@v1", folder), "--teacher": (None, folder)})

    assert stood("a") == {"revisions": {"--model": "acme/tiny@a"}}
    assert revisions({"--model": (str(tmp_path), tmp_path)}) == {}
    verify(tmp_path, options(), started=False, initial_weights="1", **stood("a"))
    verify(tmp_path, options(), initial_weights="1")
    verify(tmp_path, options(), initial_weights="1", **stood("b"))
    checkpoint(tmp_path, 12)
    verify(tmp_path, options(lr=0.5), initial_weights="1", **stood("b"))
    for others in (stood("b"), {}):
        told = r": --model is another model\. acme/tiny was revision a: give --model acme/tiny@a to"
        with pytest.raises(InputError, match=told):
            verify(tmp_path, options(lr=0.5), initial_weights="2", **others)


def test_a_run_that_noted_no_revision_tells_that_there_may_be_others(tmp_path: Path) -> None:
    verify(tmp_path, options(), started=False, initial_weights="1")
    noted: dict[str, Any] = {"revisions": {"--model": "acme/tiny@b"}}
    verify(tmp_path, options(), initial_weights="1", **noted)
    with pytest.raises(
        InputError,
        match=r"Repeat the old values .*acme/tiny@b is .* of now, --model acme/tiny@REVISION anoth",
    ):
        verify(tmp_path, options(), initial_weights="2", **noted)


def test_values_that_are_cut_off_are_written_whole(tmp_path: Path) -> None:
    weights = {f"domain-{number}": number / 45 for number in range(10)}
    verify(tmp_path, options(), started=False, domain_weights=weights)
    with pytest.raises(InputError, match=r"--domain-weights was .*\(whole: .*json\)\. Repeat"):
        verify(tmp_path, options(), domain_weights=dict(reversed(weights.items())) | {"x": 1.0})
    told = json.loads((tmp_path / "run.differences.json").read_text())
    assert told["domain_weights"]["was"] == weights


def test_losses_that_came_with_a_model_are_not_asked_of_the_user(tmp_path: Path) -> None:
    """Where its folder was moved away from the report of shearing."""
    verify(tmp_path, options(), started=False, reference_losses={"a": 2.5, "b": 3.5})
    with pytest.raises(InputError, match=r"put the shear.json of that run beside the model"):
        verify(tmp_path, options(), reference_losses={})
