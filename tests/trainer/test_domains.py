"""Where domain weights and reference losses come from, and which source comes first."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from data.reader import TokenReader
from tests.distributed import run_ranks
from tests.trainer.tiny import options as train_options
from tests.trainer.tiny import pretrain
from trainer import cpt, parallel
from trainer.callbacks.mixture import MixtureCallback
from trainer.domains import (
    DomainOptions,
    Domains,
    drawn_again,
    drawn_otherwise,
    parse_values,
    sheared_report,
    start_reference,
    starting_domains,
)
from trainer.loop import Trainer
from trainer.models.hf import load_config
from trainer.run import build_model, pretrained

HUGE = "9" * 400
SIZES = {"c4": 30, "github": 10}
SHEARED = {
    "weights": {"c4": 0.2, "github": 0.8},
    "reference": {"c4": {"loss": 2.5, "tokens": 9}, "github": 1.5},
}


def start(
    *, sheared: dict[str, Any] | None = None, needs_reference: bool = True, **options: Any
) -> Domains:
    return starting_domains(
        SIZES,
        DomainOptions(**options),
        parameters=10**9,
        sheared=sheared,
        needs_reference=needs_reference,
    )


def write_fit(path: Path, *domains: str) -> Path:
    sizes = {str(n): dict.fromkeys(domains, 50 * n**-0.2 + 1) for n in (10**8, 10**9, 10**10)}
    path.write_text(json.dumps({"sizes": sizes}))
    return path


def test_proportional_and_fixed_by_default() -> None:
    domains = start()
    assert domains.weights == {"c4": 0.75, "github": 0.25}
    assert domains.reference == {}
    assert len(domains.notes) == 1 and "--reference-losses" in domains.notes[0]
    assert start(needs_reference=False).notes == []


def test_the_shearing_run_comes_before_the_default() -> None:
    domains = start(sheared=SHEARED)
    assert domains == Domains({"c4": 0.2, "github": 0.8}, {"c4": 2.5, "github": 1.5}, [])


def test_options_come_first() -> None:
    domains = start(sheared=SHEARED, weights="github=3, c4=1", reference="c4=3,github=2")
    assert domains == Domains({"c4": 0.25, "github": 0.75}, {"c4": 3.0, "github": 2.0}, [])


def test_a_shearing_run_on_other_domains() -> None:
    sheared = {"weights": {"c4": 0.4, "book": 0.6}, "reference": {"c4": 2.5, "book": 1.0}}
    domains = start(sheared=sheared)
    assert domains.weights == {"c4": 0.75, "github": 0.25}
    assert domains.reference == {} and len(domains.notes) == 2


def test_a_fit_is_evaluated_at_the_number_of_parameters(tmp_path: Path) -> None:
    path = write_fit(tmp_path / "fit.json", "c4", "github")
    domains = start(sheared=SHEARED, reference_fit=str(path))
    loss = 50 * (10**9) ** -0.2 + 1
    assert domains.reference == pytest.approx({"c4": loss, "github": loss}, abs=1e-5)
    assert domains.weights == {"c4": 0.2, "github": 0.8}
    assert domains.notes[0].startswith("reference loss of c4 fitted at 1,000,000")
    assert len(domains.notes) == 2 and not domains.warnings
    with pytest.raises(InputError, match=r"the domains \['c4', 'github'\]"):
        start(reference_fit=str(write_fit(path, "c4")))


def test_a_fit_excludes_given_losses() -> None:
    with pytest.raises(
        InputError, match=r"--reference-losses 'c4=1' and --reference-fit fit\.json"
    ):
        DomainOptions(reference="c4=1", reference_fit="fit.json")


def test_warnings_are_told_from_notes(capsys: pytest.CaptureFixture[str]) -> None:
    Domains({}, {}, ["a"], ["b"]).log()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("note: a\n", "warning: b\n")


@pytest.mark.parametrize("text", ["c4", "c4=x", "=1", "c4=-1", "c4=nan", "c4=1,c4=2", ""])
def test_malformed_values_name_the_flag(text: str) -> None:
    with pytest.raises(InputError, match="--domain-weights"):
        parse_values(text, "--domain-weights")


@pytest.mark.parametrize("text", ["c4=1", "c4=1,github=1,book=1"])
def test_each_domain_exactly_once(text: str) -> None:
    with pytest.raises(InputError, match=r"\['c4', 'github'\]"):
        start(weights=text)


def test_weights_above_zero() -> None:
    with pytest.raises(InputError, match="sum to 0"):
        start(weights="c4=0,github=0")


def test_finds_the_report_beside_the_model(tmp_path: Path) -> None:
    assert sheared_report(tmp_path / "model") is None
    (tmp_path / "shear.json").write_text(json.dumps(SHEARED))
    assert sheared_report(tmp_path / "model") == SHEARED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "holds a list"),
        ('{"weights": {"c4": Infinity}}', "`weights` must hold a finite number"),
        ('{"weights": [1]}', "`weights` must hold"),
        ('{"reference": {"c4": {"tokens": 9}}}', "`reference` must hold"),
        (f'{{"reference": {{"c4": {HUGE}}}}}', "`reference` must hold"),
        ('{"samples": {"used": {"c4": 0.5}}}', "`samples` must hold"),
        ('{"samples": 5}', "`samples` must hold"),
        ('{"distillation": "x"}', "`distillation` is not what shearing writes"),
        ('{"distillation": {"weight": "a"}}', "`distillation` is not"),
        ('{"distillation": {"weight": 7, "top_k": 0}}', "`distillation` is not"),
        ('{"distillation": {"temperature": null}}', "`distillation` is not"),
        ('{"distillation": {"kind": "other"}}', "`distillation` is not"),
        ('{"distillation": {"weight": 0.5}}', "`source` must name the model"),
        ('{"distillation": {"weight": 0.5}, "source": 3}', "`source` must name"),
    ],
)
def test_a_damaged_report_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "shear.json").write_text(content)
    with pytest.raises(InputError, match=rf"shear\.json: {message}.*restore it, or copy"):
        sheared_report(tmp_path / "model")


@pytest.mark.parametrize("flag", ["domain_weights", "reference_losses"])
def test_infinite_values_are_refused_before_weights_load(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.delattr(cpt, "build_model")
    options: dict[str, Any] = {flag: "alpha=inf,beta=1"}
    with pytest.raises(InputError, match=r"'alpha=inf' is not <domain>=<finite number"):
        train_on(workspace, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def measure(workspace: Path, output: Path, restarted: bool) -> dict[str, float]:
    context = parallel.init(threads=1)
    reader = TokenReader(workspace / "tokens", 16)
    model = None
    if not restarted:
        source = workspace / "model"
        shape = load_config(source)
        model = build_model(shape, train_options(), context, load=pretrained(source))
    return start_reference(output, model, reader, 2, context)


def test_a_restart_reads_what_was_measured(workspace: Path, tmp_path: Path) -> None:
    [measured] = run_ranks(measure, 1, workspace, tmp_path, False)
    assert set(measured) == {"alpha", "beta"}
    assert all(5 < loss < 6 for loss in measured.values())
    assert run_ranks(measure, 1, workspace, tmp_path, True) == [measured]
    several = run_ranks(measure, 2, workspace, tmp_path / "two", False)
    assert several[0] == several[1] == pytest.approx(measured, abs=1e-5)
    assert run_ranks(measure, 2, workspace, tmp_path / "two", True) == several


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        '{"reference": {"alpha": 2.0}}',
        '{"reference": {"alpha": null}}',
        f'{{"reference": {{"alpha": {HUGE}, "beta": 1}}}}',
    ],
)
def test_lost_measurements(workspace: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "reference.json").write_text(content)
    with pytest.raises(InputError, match=r"reference\.json .* is missing or damaged"):
        measure(workspace, tmp_path, restarted=True)


def train_on(
    workspace: Path, output: Path, *, model: Path | None = None, **changes: Any
) -> Trainer:
    trainer = pretrain(
        train_options(steps=6, save_interval=2),
        model=model or workspace / "model",
        data=workspace / "tokens",
        output=output,
        **changes,
    )
    assert trainer is not None
    return trainer


def steering(trainer: Trainer) -> tuple[str, dict[str, float]]:
    """Kind and reference losses of the run's mixture."""
    [callback] = [c for c in trainer.callbacks if isinstance(c, MixtureCallback)]
    return callback.mixture.config.kind, callback.mixture._reference


def test_a_model_without_shearing_is_its_own_reference(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train_on(workspace, tmp_path / "straight")
    kind, reference = steering(straight)
    assert kind == "dynamic" and reference == measure(workspace, tmp_path / "own", restarted=False)

    output = tmp_path / "resumed"
    original = Trainer.train_step

    def stop_after_three(self: Trainer) -> None:
        original(self)
        self.stopping = self.step == 3

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after_three)
        assert train_on(workspace, output).step == 3
    monkeypatch.setattr(cpt, "pretrained", lambda source: None)
    resumed = train_on(workspace, output)
    assert resumed.step == 6 and steering(resumed) == (kind, reference)
    assert resumed.loss == straight.loss


def test_random_weights_are_no_reference(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = train_on(workspace, tmp_path, init="random")
    assert steering(trainer)[0] == "fixed" and not (tmp_path / "reference.json").exists()
    assert "the domain weights stay fixed" in capsys.readouterr().out


def test_a_sheared_model_is_no_reference(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "shear"
    shutil.copytree(workspace / "model", run / "model")
    (run / "shear.json").write_text(json.dumps(SHEARED))
    trainer = train_on(workspace, tmp_path / "out", model=run / "model")
    assert steering(trainer)[0] == "fixed"
    assert "the domain weights stay fixed" in capsys.readouterr().out


def test_a_fit_steers_continued_pre_training(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = write_fit(tmp_path / "fit.json", "alpha", "beta")
    parameters = load_config(workspace / "model").num_parameters()
    trainer = train_on(workspace, tmp_path / "out", reference_fit=str(fit))
    loss = round(50 * parameters**-0.2 + 1, 4)
    assert steering(trainer)[1] == pytest.approx({"alpha": loss, "beta": loss}, abs=1e-3)
    assert not (tmp_path / "out" / "reference.json").exists()
    printed = capsys.readouterr()
    assert f"alpha fitted at {parameters:,} parameters: {loss:.4f}" in printed.out
    assert f"warning: {parameters:,} parameters lie" in printed.err


def test_fits_are_checked_before_weights_load(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cpt, "build_model")
    fit = write_fit(tmp_path / "fit.json", "gamma")
    with pytest.raises(InputError, match=r"has losses of \['gamma'\]"):
        train_on(workspace, tmp_path / "out", reference_fit=str(fit))
    with pytest.raises(InputError, match=r"--reference-losses .* and --reference-fit"):
        train_on(
            workspace, tmp_path / "out", reference_fit=str(fit), reference_losses="alpha=1,beta=1"
        )
    assert not (tmp_path / "out").exists()


def test_what_a_model_s_history_does_not_give_is_said(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second stage draws the data of the first again, and a copied model has no report."""
    first, again = tmp_path / "first", "data begins at its start, with the 48 samples that"
    train_on(workspace, first)
    assert "no shear.json lies in" in (printed := capsys.readouterr().out)
    assert again not in printed
    train_on(workspace, tmp_path / "second", model=first)
    assert again in (printed := capsys.readouterr().out) and "no shear.json" not in printed
    changes: tuple[tuple[int, dict[str, Any]], ...] = ((7, {}), (0, {"init": "random"}))
    for number, (seed, options) in enumerate(changes):
        place, train = tmp_path / str(number), train_options(steps=2, seed=seed)
        pretrain(train, model=first, data=workspace / "tokens", output=place, **options)
        assert again not in capsys.readouterr().out
    report = json.loads((first / "cpt.json").read_text())
    samples, reader = report["samples"], TokenReader(workspace / "tokens", 16)
    written = first / "cpt.json"
    assert drawn_again(written, reader, 0) == 48 and drawn_again(written, reader, 1) == 0
    damages: tuple[Any, ...] = (
        [],
        None,
        samples | {"used": {"alpha": "x"}},
        samples | {"used": [1]},
    )
    for damaged in damages:
        (first / "cpt.json").write_text(json.dumps(report | {"samples": damaged}))
        assert drawn_again(written, reader, 0) == 0


def test_samples_of_another_length_are_counted(workspace: Path) -> None:
    short, long = (TokenReader(workspace / "tokens", length) for length in (16, 32))
    used = {"alpha": 5, "beta": 3}
    samples = {"data": short.fingerprint, "sizes": short.sizes, "seed": 0, "used": used}
    assert drawn_otherwise({"samples": samples}, long) == 8
    assert drawn_otherwise({"samples": samples}, short) == 0
    assert drawn_otherwise({"samples": samples | {"data": "other"}}, long) == 0
    assert drawn_otherwise(None, long) == drawn_otherwise({}, long) == 0
