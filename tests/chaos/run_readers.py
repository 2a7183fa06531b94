"""The readers of a run's files and of settings, each with what may come out of it.

The files of a model and its tokenizer are not here: tests/trainer/models has those.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np

from data.cli import parse
from data.errors import InputError, failure
from data.locks import folder_lock
from data.reader import TokenReader
from data.tokenize_config import TokenizeConfig
from launch.compare.losses import _PRUNED as PRUNED
from launch.compare.losses import _losses as losses_of
from launch.compare.stages import read_result
from launch.demo.report import EVALUATION, GENERATION, read_results
from launch.evaluate.__main__ import main as evaluate
from launch.origin import first_names
from launch.report.run_folder import facts, parameters, read_run, removed_layers, unit_counts
from launch.stages import Stages, Task
from pruner.budget import parse_budget
from pruner.history import read_records
from pruner.measurements import load_kept
from pruner.proposal import recorded
from tests.chaos.data_readers import conforms, finite
from tests.chaos.mutations import Reader
from tests.chaos.workspace import Workspace
from tests.trainer.tiny import make_trainer, options, weights
from trainer import parallel
from trainer.callbacks.metrics import truncate_after
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_files import latest_step
from trainer.config import DistillationConfig
from trainer.distillation import resolve_teacher
from trainer.domains import (
    DomainOptions,
    samples_used,
    sheared_report,
    start_reference,
    starting_domains,
)
from trainer.identity import CHANGEABLE, NAMES, read_identity, verify_run
from trainer.models.hf import load_config
from trainer.saving import log_finished
from trainer.scaling import fitted_reference

FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.gz", "parquet")


def checkpoint_readers(chaos: Workspace, root: Path) -> list[Reader]:
    """Readers of a checkpoint, by way of the run that resumes from it."""
    output = root / "checkpointed"
    trainer = make_trainer(chaos.root, output, options(steps=4, seq_len=32, save_interval=2))
    trainer.fit()
    checkpointer = Checkpointer(output / "checkpoints", trainer.context)
    (newest,) = sorted((output / "checkpoints").glob("step-*"))[-1:]

    def restored() -> Any:
        path = checkpointer.latest()
        number = latest_step(output / "checkpoints")
        if path is None or path.name != newest.name:
            return ("older", number)
        checkpointer.restore(trainer, path)
        state = {name: tensor.numpy().tobytes() for name, tensor in weights(trainer).items()}
        return (number, trainer.step, trainer.tokens, state)

    def flaw(value: Any) -> str | None:
        return None if value[0] == "older" else "another state than was saved"

    return [
        Reader(
            name=f"checkpoint {file}",
            file=newest / file,
            read=restored,
            flaw=flaw,
            form="json" if file == "COMMITTED" else "bytes",
            share=0.5,
        )
        for file in ("COMMITTED", ".metadata", "state.pt", "__0_0.distcp")
    ]


def run_readers(chaos: Workspace) -> list[Reader]:
    """Readers of the JSON files of runs."""
    context = parallel.init(threads=1)
    reader = TokenReader(chaos.tokens, 32)
    sheared, trained = chaos.sheared, chaos.trained
    identity = json.loads((trained / "run.json").read_text())

    def verified() -> Any:
        verify_run(trained, json.loads(json.dumps(identity)), context, started=True)
        return json.loads((trained / "run.json").read_bytes())

    def verified_flaw(value: Any) -> str | None:
        differ = {name for name in identity if value.get(name) != identity[name]}
        # Options of the mixture that a record lacks are those that were the only ones once.
        differ -= {*CHANGEABLE, NAMES, "mixture"}
        return f"{sorted(differ)[:3]} differ" if differ else None

    def start() -> Any:
        report = sheared_report(sheared / "model")
        found = starting_domains(
            reader.sizes, DomainOptions(), parameters=1000, sheared=report, needs_reference=True
        )
        resolve_teacher(None, DistillationConfig(), report)
        return [found.weights, found.reference, samples_used(report, reader, 0)]

    def start_flaw(value: Any) -> str | None:
        chosen, reference, used = value
        wrong = conforms(chosen, dict[str, float | int]) or finite(value)
        wrong = wrong or conforms(reference, dict[str, float | int])
        wrong = wrong or conforms(used, dict[str, int])
        if wrong is None and not isclose(sum(chosen.values()), 1.0, abs_tol=1e-9):
            wrong = "the weights do not add up to 1"
        if wrong is None and min([*chosen.values(), *used.values()]) < 0:
            wrong = "a negative weight or number of samples"
        return wrong

    def reported(folder: Path) -> Callable[[], Any]:
        def read() -> Any:
            run = read_run(folder)
            if run.command == "shear":
                unit_counts(run)
            return json.dumps([facts(run), removed_layers(run), parameters(run), run.steps])

        return read

    def finished(folder: Path, name: str) -> Callable[[], Any]:
        return lambda: log_finished(context, folder / name, None)

    found = [
        Reader(
            name="run.json",
            file=trained / "run.json",
            read=verified,
            flaw=verified_flaw,
            form="json",
        ),
        Reader(
            name="run.json, read alone",
            file=trained / "run.json",
            read=lambda: read_identity(trained),
            flaw=lambda value: None if value is None else conforms(value, dict[str, Any]),
            form="json",
        ),
        Reader(
            name="shear.json as the start of cpt",
            file=sheared / "shear.json",
            read=start,
            flaw=start_flaw,
            form="json",
        ),
    ]
    for folder, report in ((sheared, "shear.json"), (trained, "cpt.json")):
        found.append(
            Reader(
                name=f"{report} of a finished run",
                file=folder / report,
                read=finished(folder, report),
                form="json",
            )
        )
        for file in ("run.json", report, "metrics.jsonl"):
            found.append(
                Reader(
                    name=f"{file} in the page of {report.removesuffix('.json')}",
                    file=folder / file,
                    read=reported(folder),
                    form="lines" if file.endswith("jsonl") else "json",
                )
            )
    for file in ("history.jsonl", "masks.safetensors"):
        found.append(
            Reader(
                name=f"{file} in the page of shear",
                file=sheared / file,
                read=reported(sheared),
                form="lines" if file.endswith("jsonl") else "bytes",
            )
        )
    return found


def kept_readers(chaos: Workspace, root: Path) -> list[Reader]:
    """Readers of what a run keeps of its start, and of its metrics."""
    context = parallel.init(threads=1)
    reader = TokenReader(chaos.tokens, 32)
    kept = root / "kept"
    kept.mkdir()
    reference = {"reference": dict.fromkeys(reader.domains, 2.5), "sequences": 32}
    (kept / "reference.json").write_text(json.dumps(reference))
    model = load_config(chaos.model)
    budget = parse_budget("params=20k")
    assert budget is not None
    record = {
        "budget": budget.text,
        "source": "layers=2,hidden=32,heads=4,kv-heads=2,ffn=48",
        "shape": "layers=1,hidden=32,heads=2,kv-heads=1,ffn=24",
        "parameters": {"source": 20000, "target": 10000},
        "used": 0.97,
        "latency": None,
    }
    (kept / "target.json").write_text(json.dumps(record))
    metrics = kept / "metrics.jsonl"
    metrics.write_bytes((chaos.trained / "metrics.jsonl").read_bytes())
    source = metrics.read_bytes()

    def truncated() -> Any:
        try:
            truncate_after(metrics, 4)
            return metrics.read_bytes() if metrics.exists() else b""
        except OSError as error:  # as StepLog.open words it
            raise InputError(f"{metrics}: {failure(error)}") from None
        finally:
            if metrics.is_file() and not metrics.is_symlink():
                metrics.write_bytes(source)

    def metrics_flaw(value: bytes) -> str | None:
        steps = []
        for line in value.splitlines():
            try:
                steps.append(json.loads(line)["step"])
            except (ValueError, TypeError, KeyError):
                return f"a line that is no record stays: {line[:60]!r}"
        wrong = [step for step in steps if isinstance(step, bool) or not isinstance(step, int)]
        if wrong:
            return f"step {wrong[0]!r} stays"
        return None if max(steps, default=0) <= 4 else f"step {max(steps)} stays"

    def measured() -> Any:
        found = load_kept(chaos.sheared, None, context)
        assert found is not None
        tensors = {n: v.double().numpy().tobytes() for n, v in (found.importance or {}).items()}
        rotation = None if found.rotation is None else found.rotation.numpy().tobytes()
        return [found.held_out, found.reference, tensors, rotation]

    def measured_flaw(value: Any) -> str | None:
        held_out, losses, importance, _ = value
        wrong = conforms(losses, dict[str, float]) or finite(held_out) or finite(losses)
        arrays = [np.frombuffer(data, np.float64) for data in importance.values()]
        if wrong is None and not all(np.isfinite(array).all() for array in arrays):
            wrong = "importance is not finite"
        return wrong

    return [
        Reader(
            name="reference.json",
            file=kept / "reference.json",
            read=lambda: start_reference(kept, None, reader, 2, context),
            flaw=lambda value: conforms(value, dict[str, float]) or finite(value),
            form="json",
        ),
        Reader(
            name="target.json",
            file=kept / "target.json",
            read=lambda: recorded(kept, budget, model),
            flaw=_target_flaw,
            form="json",
        ),
        Reader(
            name="metrics.jsonl of a resumed run",
            file=metrics,
            read=truncated,
            flaw=metrics_flaw,
            form="lines",
        ),
        Reader(
            name="metrics.jsonl, read",
            file=metrics,
            read=lambda: read_records(metrics),
            flaw=lambda value: conforms(value, list[dict[str, Any]]),
            form="lines",
        ),
        Reader(
            name="source.safetensors",
            file=chaos.sheared / "source.safetensors",
            read=measured,
            flaw=measured_flaw,
        ),
    ]


def _target_flaw(value: Any) -> str | None:
    from pruner.shapes import parse_target, shape_of  # noqa: F401

    if value is None:
        return None
    return None if isinstance(value.get("shape"), str) else f"shape {value.get('shape')!r}"


def stage_readers(chaos: Workspace, root: Path) -> list[Reader]:
    """Readers of what the stages of a comparison and of the demo leave."""
    folder = root / "stages"
    folder.mkdir()
    evaluation, generation = folder / "evaluation.json", folder / "generation.json"
    words = ["--model", str(chaos.model), "--data", str(chaos.tokens), "--seq-len", "32"]
    evaluate([*words, "--sequences", "2", "--threads", "1", "--json", str(evaluation)])
    said = {"tokens_per_second": 9.0, "continuation": "and", "seconds": [0.1, 0.2]}
    generation.write_text(json.dumps({"source": said}))
    stage = Task("stage", "stage", {}, (), folder, lambda: None)
    sheared = replace(stage, folder=chaos.sheared)
    stages = Stages(folder, 1)
    marker = folder / ".stages" / "stage.json"

    def staged() -> Any:
        calls: list[str] = []
        stages.started, stages.reused = 0, set()
        stages.run("stage", settings={}, folder=folder / "made", action=lambda: calls.append("ran"))
        return calls, stages.seconds["stage"] if not calls else 0.0

    def staged_flaw(value: Any) -> str | None:
        calls, seconds = value
        wrong = None if calls else conforms(seconds, float) or finite(seconds)
        return wrong or (None if seconds >= 0 else f"{seconds} seconds")

    staged()
    content = marker.read_bytes()

    def marked() -> Any:
        try:
            return staged()
        finally:
            # A stage that ran again has written its marker anew.
            if not marker.is_symlink() and not marker.is_dir():
                marker.write_bytes(content)

    names = {"--source": "model", "--input": ["text"]}
    first_names(folder, names, {"--source": "1"})

    def origin_flaw(value: Any) -> str | None:
        return conforms(value["--source"], str) or conforms(value["--input"], list[str])

    def results() -> Any:
        return read_result(sheared, "shear.json", PRUNED)

    def results_flaw(value: Any) -> str | None:
        wrong = conforms(value["steps"], int) or conforms(value["tokens"], int)
        return wrong or conforms(value["kept_not_alive"], dict[str, int])

    return [
        Reader(name="marker of a stage", file=marker, read=marked, flaw=staged_flaw, form="json"),
        Reader(
            name="origin of stages",
            file=folder / ".stages" / "origin.json",
            read=lambda: first_names(folder, names, {"--source": "1"}),
            flaw=origin_flaw,
            form="json",
        ),
        Reader(
            name="evaluation.json of a comparison",
            file=evaluation,
            read=lambda: losses_of(stage),
            # Not finite is what a broken model is measured at.
            flaw=lambda value: conforms(value, dict[str, float]),
            form="json",
        ),
        Reader(
            name="shear.json of a comparison",
            file=chaos.sheared / "shear.json",
            read=results,
            flaw=results_flaw,
            form="json",
        ),
        Reader(
            name="evaluation of the demo",
            file=evaluation,
            read=lambda: read_results(evaluation, EVALUATION),
            flaw=lambda value: conforms(value["overall"]["loss"], float),
            form="json",
        ),
        Reader(
            name="generation of the demo",
            file=generation,
            read=lambda: read_results(generation, {"source": GENERATION}),
            flaw=lambda value: conforms(value["source"]["tokens_per_second"], float),
            form="json",
        ),
    ]


def user_readers(chaos: Workspace, root: Path, monkeypatch: Any) -> list[Reader]:
    """Readers of what a user writes: shorn.toml, and the file of --reference-fit."""
    folder = root / "user"
    folder.mkdir()
    toml = folder / "shorn.toml"
    toml.write_text(
        '[tokenize]\nseq-len = 128\nheld_out = 0.2\nworkers = 2\ninput = ["a", "b"]\n'
        'tokenizer = "t"\noverwrite = true\n[shear]\nsteps = 3\n'
    )
    monkeypatch.setenv("SHORN_CONFIG", str(toml))
    fit = folder / "fit.json"
    sizes = {
        str(size): {"alpha": 2 + 40 / size**0.3, "beta": 1 + 30 / size**0.25}
        for size in (10**6, 10**7, 10**8, 10**9)
    }
    fit.write_text(json.dumps({"sizes": sizes}))

    def parsed() -> TokenizeConfig:
        # What the command line gives is right; so all that can be wrong is in the file.
        return parse(TokenizeConfig, section="tokenize", argv=["--input", "x", "--tokenizer", "y"])

    def fitted() -> Any:
        found = fitted_reference(fit, {"alpha", "beta"}, 5 * 10**7)
        return found.losses

    def fit_flaw(value: Any) -> str | None:
        wrong = conforms(value, dict[str, float]) or finite(value)
        return wrong or (None if min(value.values()) > 0 else f"losses {value}")

    return [
        Reader(
            name="shorn.toml",
            file=toml,
            read=parsed,
            flaw=lambda value: conforms(value, TokenizeConfig) or finite(value.held_out),
        ),
        Reader(name="--reference-fit", file=fit, read=fitted, flaw=fit_flaw, form="json"),
    ]


def lock_readers(root: Path) -> list[Reader]:
    """The lock of an output folder, whose content is only for people."""
    folder = root / "locked"
    folder.mkdir()

    def locked() -> str:
        with folder_lock(folder, "training"):
            return "locked"

    locked()
    return [Reader(name=".lock", file=folder / ".lock", read=locked, checked=True, form="json")]
