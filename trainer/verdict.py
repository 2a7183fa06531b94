"""What a run has come to: held-out losses from the source to now, compared on equal text only."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import INFO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.errors import InputError
from data.hub import is_hub_id
from data.log import logger
from data.paths import as_word
from data.records import fits, read_json
from data.tables import print_table
from data.terminal import passing_over_what_is_not_shown
from trainer.evaluate import DomainLoss, overall, report
from trainer.loop import Trainer
from trainer.models.config import ModelConfig

SHEARED, TRAINED, TUNED = "sheared", "trained", "fine-tuned"
REPORTS = {"shear.json": SHEARED, "cpt.json": TRAINED, "finetune.json": TUNED}
"""The reports of runs, and what their models are called."""
LEAST_GAP = 0.005
"""Nats per token below which a share of the gap would be a share of rounding."""
_NUMBER = (int, float)
_LOSSES = {"*": {"loss": (*_NUMBER, type(None)), "tokens": int}}
_ON = {"data": str, "seq_len": int}
_STAGE = {
    "name": str,
    "model": str,
    "held_out": _LOSSES,
    "held_out_on?": (dict, type(None)),
    "parameters?": [int],
    "seconds_per_token?": (int, float, type(None)),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One model on the way, and what was measured of it."""

    name: str
    """"source", "sheared", "trained" or "fine-tuned"."""
    model: str
    """Its folder."""
    losses: dict[str, DomainLoss]
    """Held-out losses per domain; empty where none were measured."""
    on: dict[str, Any] | None
    """Fingerprint of the "data" and "seq_len" of the losses, and "documents" where they are apart;
    None: not known."""
    parameters: tuple[int, int] | None = None
    """All parameters, and those without embeddings."""
    seconds: float | None = None
    """Per decoded token at batch 1, where a speedup was asked for."""

    def to_json(self) -> dict[str, Any]:
        """What `read_stage` reads."""
        return {
            "name": self.name,
            "model": self.model,
            "held_out": report(self.losses),
            "held_out_on": self.on,
            "parameters": list(self.parameters or ()),
            "seconds_per_token": self.seconds,
        }

    def comparable(self, other: "Stage") -> bool:
        """Whether both were measured on the same sequences, as far as is known."""
        tokens = [{name: d.tokens for name, d in stage.losses.items()} for stage in (self, other)]
        return bool(self.losses) and self.on == other.on is not None and tokens[0] == tokens[1]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A table and sentences below it."""

    header: list[str]
    rows: list[list[str]]
    """A row for every domain and one for their mean; none where nothing was measured."""
    lines: list[str]


def read_stage(entry: object) -> Stage | None:
    """A stage that a report carries; None for what is none."""
    if not isinstance(entry, dict) or not fits(entry, _STAGE):
        return None
    parameters = entry.get("parameters") or []
    return Stage(
        entry["name"],
        entry["model"],
        losses_of(entry["held_out"]),
        entry["held_out_on"] if fits(entry.get("held_out_on"), _ON) else None,
        (parameters[0], parameters[1]) if len(parameters) == 2 else None,
        entry.get("seconds_per_token"),
    )


def losses_of(held_out: object) -> dict[str, DomainLoss]:
    """The losses {domain: {loss, tokens}} of a report that are finite; none for what is none."""
    if not isinstance(held_out, dict) or not fits(held_out, _LOSSES):
        return {}
    finite = {d: row for d, row in held_out.items() if row["loss"] is not None}
    return {d: DomainLoss(row["loss"], row["tokens"]) for d, row in finite.items()}


def stages_of(run: Path) -> list[Stage]:
    """The stages that led to the model of the finished run in the folder `run`, the run's own last;
    none where there is no report that can be read."""
    for name, called in REPORTS.items():
        if not (run / name).is_file():
            continue
        try:
            content = read_json(run / name, "restore the file")
            identity = (
                read_json(run / "run.json", "restore the file")
                if (run / "run.json").is_file()
                else {}
            )
        except InputError as error:
            logger.warning(f"what led to {run} is not known: {error}")
            return []
        return _stages(run, called, content, identity)
    return []


def _stages(
    run: Path, called: str, content: dict[str, Any], identity: dict[str, Any]
) -> list[Stage]:
    on = content.get("held_out_on")
    if not fits(on, _ON):
        # Reports of former versions leave that to run.json.
        on = {"data": identity.get("data"), "seq_len": identity.get("seq_len")}
    on = on if fits(on, _ON) else None
    sizes = content.get("parameters")

    def parameters(which: str) -> tuple[int, int] | None:
        blocks = f"{which}_non_embedding"
        if not isinstance(sizes, dict) or not fits(sizes, {which: int, blocks: int}):
            return None
        return sizes[which], sizes[blocks]

    before = content.get("before")
    if isinstance(before, list):
        stages = [stage for entry in before if (stage := read_stage(entry)) is not None]
    elif called == SHEARED:
        losses = losses_of(content.get("source_held_out"))
        stages = [Stage("source", str(content.get("source")), losses, on, parameters("source"))]
    else:
        stages = []
    seconds = content.get("seconds_per_token")
    own = Stage(
        called,
        str(run / "model"),
        losses_of(content.get("held_out")),
        on,
        parameters("target"),
        seconds if fits(seconds, float) else None,
    )
    return [*stages, own]


def sizes_of(model: ModelConfig) -> tuple[int, int]:
    """All parameters of a model, and those without embeddings."""
    return model.num_parameters(), model.num_parameters(embeddings=False)


def measured_on(trainer: Trainer) -> dict[str, Any]:
    """Which text a run's held-out losses belong to: reports carry it as "held_out_on"."""
    reader = trainer.stream.reader
    on: dict[str, Any] = {"data": reader.fingerprint, "seq_len": trainer.config.seq_len}
    return on if reader.documents == "joined" else on | {"documents": reader.documents}


def carry(trainer: Trainer, start: Path | None) -> dict[str, Any]:
    """What reports of training say about the models before: "before", "held_out_on" and
    "parameters".

    `start` is the folder of the model that training started from; None for random weights.
    """
    before: list[Stage] = []
    if start is not None:
        # A link to a run's model leads to its run.
        before = stages_of(start.parent) or stages_of(start.resolve().parent)
    target, blocks = sizes_of(trainer.model.config)
    return {
        "before": [stage.to_json() for stage in before],
        "held_out_on": measured_on(trainer),
        "parameters": {"target": target, "target_non_embedding": blocks},
    }


def show_trained(
    content: dict[str, Any], output: Path, start: Path | None, data: str, called: str = TRAINED
) -> None:
    """Prints the verdict on training, whose report is `content`.

    `start` as for `carry`, `data` the token folder, `called` what the model is called now.
    """
    stages = _stages(output, called, content, {})
    models = [stage.model for stage in stages]
    if start is not None and len(stages) == 1:
        models = [str(start), *models]
    on = content["held_out_on"]
    verdict = conclude(stages, content.get("weights", {}))
    if start is None:
        verdict.lines.append("it started from random weights")
    elif len(stages) == 1 and stages[0].losses:
        verdict.lines.append("the model before training was not measured on this text")
    models_here = [Path(stage.model) for stage in stages if stage.name != "source"]
    runs = [as_word(model.parent) for model in models_here if model.exists()]
    apart = on.get("documents") == "apart"
    commands = [compare_command(models, data, on["seq_len"], apart)] if stages[-1].losses else []
    show(verdict, [*commands, shlex.join(["shorn", "report", *runs])])


def compare_command(models: Iterable[str], data: str, seq_len: int, apart: bool = False) -> str:
    """The command that measures all `models` on equal sequences, with their documents `apart` or
    joined, and their speed; those that are gone by now are left out."""
    there = [as_word(model) for model in models if is_hub_id(model) or Path(model).exists()]
    words = ["--model", *there, "--data", as_word(data), "--seq-len", str(seq_len), "--speed"]
    return shlex.join(["shorn", "evaluate", *words, *(["--documents", "apart"] if apart else [])])


def conclude(stages: Sequence[Stage], weights: Mapping[str, float]) -> Verdict:
    """The verdict on the last of `stages`, which are at least one, in the order of their making.

    `weights` are the shares of the domains in the training data.
    """
    now = stages[-1]
    shown = [*(stage for stage in stages[:-1] if stage.comparable(now)), now]
    lines = []
    rows: list[list[str]] = []
    header = ["domain", *(stage.name for stage in shown)]
    if now.name in (TRAINED, TUNED):
        header[-1] = "now"
    if now.losses:
        closed = _share_of_gap(shown)
        header += [*([] if closed is None else ["gap closed"]), *(["weight"] if weights else [])]
        missing = [domain for domain in weights if domain not in now.losses]
        rows = [_row(shown, domain, closed is not None) for domain in now.losses]
        rows += [[domain, *("no text" for _ in header[1:-1])] for domain in missing]
        for row in rows if weights else ():
            row.append(f"{weights.get(row[0], 0.0):.3f}")
        means = [replace(stage, losses={"mean": overall(stage.losses)}) for stage in shown]
        rows.append(_row(means, "mean", closed is not None))
        rows[-1] += [f"{sum(weights.values()):.3f}"] if weights else []
        lines.append(_summary(shown, header[1 : len(shown) + 1], closed))
    lines += [*_gaps(stages, shown, weights), *_sizes(stages)]
    return Verdict(header, rows, lines)


def _row(stages: Sequence[Stage], domain: str, closed: bool) -> list[str]:
    """A domain's loss at every stage, and what training took back where `closed` asks for it."""
    own = [replace(stage, losses={domain: stage.losses[domain]}) for stage in stages]
    row = [domain, *(f"{stage.losses[domain].loss:.4f}" for stage in own)]
    if closed:
        share = _share_of_gap(own)
        row.append("" if share is None else f"{share:.0%}")
    return row


def _share_of_gap(stages: Sequence[Stage]) -> float | None:
    """The part of the mean loss between source and sheared model that training took back."""
    mean = {stage.name: overall(stage.losses).loss for stage in stages}
    now = stages[-1].name
    if not {"source", SHEARED} <= mean.keys() or now not in (TRAINED, TUNED):
        return None
    gap = mean[SHEARED] - mean["source"]
    return (mean[SHEARED] - mean[now]) / gap if gap >= LEAST_GAP else None


def _summary(shown: Sequence[Stage], names: Sequence[str], closed: float | None) -> str:
    means = [overall(stage.losses).loss for stage in shown]
    text = f"held-out loss {' → '.join(f'{mean:.3f}' for mean in means)} nats per token"
    if len(shown) > 1:
        text += f" ({' → '.join(names)})"
    if closed is not None and closed >= 0:
        text += f": training took back {closed:.0%} of what shearing lost"
    elif closed is not None:
        text += ": training made it worse"
    return text


def _gaps(
    stages: Sequence[Stage], shown: Sequence[Stage], weights: Mapping[str, float]
) -> list[str]:
    """What the table leaves out, and why."""
    now, lines = stages[-1], []
    if not now.losses:
        return ["no held-out text was measured: no verdict on the losses is possible"]
    missing = [domain for domain in weights if domain not in now.losses]
    if missing:
        share = sum(weights[domain] for domain in missing)
        lines.append(
            f"no held-out text to measure: {', '.join(missing)} ({share:.0%} of the training data)"
        )
    for stage in stages:
        if stage in shown:
            continue
        why = "it was not measured"
        if stage.losses:
            known = stage.on is not None and now.on is not None
            why = f"it was {'' if known else 'perhaps '}measured on other sequences"
        lines.append(f"{stage.name}: left out, for {why}")
    return lines


def _sizes(stages: Sequence[Stage]) -> list[str]:
    known = [stage for stage in stages if stage.parameters is not None]
    ends = [known[0], known[-1]] if len(known) > 1 else known
    lines = []
    if ends:
        pairs = [stage.parameters or (0, 0) for stage in ends]
        whole, blocks = zip(*pairs, strict=True)
        lines.append(
            f"parameters {' → '.join(f'{count:,}' for count in whole)}, without embeddings "
            f"{' → '.join(f'{count:,}' for count in blocks)}"
            + (f" ({blocks[-1] / blocks[0]:.0%})" if len(ends) > 1 and blocks[0] else "")
        )
    seconds = [stage.seconds for stage in stages if stage.seconds]
    if len(seconds) > 1:
        lines.append(
            f"decoding {1e3 * seconds[0]:.4g} → {1e3 * seconds[-1]:.4g} ms per token, "
            f"{seconds[0] / seconds[-1]:.2f}x faster (measured when the shape was chosen)"
        )
    else:
        lines.append("decoding speed: not measured (shorn evaluate --speed)")
    return lines


@passing_over_what_is_not_shown()
def show(verdict: Verdict, commands: Sequence[str] = ()) -> None:
    """Prints a verdict and the commands that may come next, unless the log level leaves out what is
    no warning."""
    if not logger.isEnabledFor(INFO):
        return
    console = Console(highlight=False, markup=False)
    if verdict.rows:
        console.print("held-out loss (nats per token):")
        table = Table()
        for index, heading in enumerate(verdict.header):
            table.add_column(heading, justify="right" if index else "left", overflow="fold")
        for row in verdict.rows:
            table.add_row(*row)
        print_table(table, console)
    for line in verdict.lines:
        console.print(line, soft_wrap=True)
    for command in commands:
        console.print(f"next: {command}", soft_wrap=True)
