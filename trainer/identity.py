"""What makes a run this run: only the configuration that started an output folder resumes it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.errors import InputError, failure
from data.files import write_json
from data.hub import pinned, split_revision, was_revision
from data.log import logger
from data.mixture import MixtureConfig
from data.options import options_of
from data.records import fits, is_kind, read_json
from trainer.agreement import SAME_FILES, require_same
from trainer.checkpoint_files import MARKER, committed, step_of, way_around
from trainer.config import DistillationConfig, TrainConfig
from trainer.models.config import ModelConfig
from trainer.parallel import DistributedContext

FILE = "run.json"
DIFFERENCES = "run.differences.json"
"""Where everything is listed by which a refused run differs from the one in its output folder."""
MOST = 3
"""Differences that a message names."""
CUT = "..."
"""Stands for the rest of a long value."""
WRITTEN = (
    "model",
    "model.unchecked",
    "shear.json",
    "cpt.json",
    "finetune.json",
    "adapter",
    "masks.safetensors",
    "moments.safetensors",
    "source.safetensors",
    "reference.json",
    "target.json",
)
"""What runs write over in their output folder. Without run.json beside it, it is not a run's."""
SCHEDULE_FIELDS = (
    "steps",
    "seq_len",
    "global_batch",
    "lr",
    "min_lr_ratio",
    "warmup_ratio",
    "optimizer",
    "weight_decay",
    "beta1",
    "beta2",
    "eps",
    "clip",
    "seed",
)
"""Options that decide the trajectory. The others (micro-batch, intervals, threads, ...) may change
on resume."""
PRECISIONS = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}
"""What --precision calls the dtypes that runs note."""
CHANGEABLE = ("lr", "min_lr_ratio", "clip", "weight_decay")
"""Those of SCHEDULE_FIELDS that may change on resume too: they bring a diverging run back on track,
and the order of the data does not depend on them."""
NOTED = "revisions"
"""What names on the hub stood for, by option. It tells what a name was, and makes no other run."""

NAMES = "names"
"""Where a run's inputs were, by option. It makes no other run either."""

_BLOCKS = {f"shorten.{name}" for name in ("units", "criterion", "remove", "then", "search")} | {
    f"shorten.{name}" for name in ("protect_first", "protect_last", "sequences")
}
FOLLOWING = {
    "shorten.sequences": {"seq_len"},
    "distill.teacher": {"source"},
    "selection": _BLOCKS | {"layer_widths"} | {"domain_weights", "seed"},
    "target": _BLOCKS,
    "domain_weights": {"data", "seq_len"},
    "reference_losses": {"data", "seq_len", "mixture"},
    "warmup_ratio": {"moments"},
    "lora_r": {"method"},
    "lora_alpha": {"method"},
    "lora_dropout": {"method"},
    "target_modules": {"method"},
    "last_blocks": {"method"},
    "head": {"method"},
    "documents": {"data"},
}
"""What differs, where it was not given, because one of these fields does."""
NOT_ALWAYS_NOTED = ("refit.", "shorten.")
"""Beginnings of fields that former versions did not note: where one is missing, nothing is known of
it."""


def run_identity(
    config: TrainConfig,
    model: ModelConfig,
    *,
    precision: str,
    data: str,
    documents: str = "joined",
    **others: Any,
) -> dict[str, Any]:
    """Everything that decides the sequence of losses: schedule, shape, compute precision, data
    fingerprint, whether documents are joined, `others`."""
    shape = {key: value for key, value in asdict(model).items() if key != "hf"}
    if model.layer_sizes is None:
        del shape["layer_sizes"]
    options = asdict(config)
    return {
        **{name: options[name] for name in SCHEDULE_FIELDS},
        "muon_momentum": config.momentum,
        "precision": precision,
        "data": data,
        "documents": documents,
        **{f"model.{name}": value for name, value in shape.items()},
        **others,
    }


def revisions(names: Mapping[str, tuple[str | None, Path]]) -> dict[str, Any]:
    """Entry of a run's identity: what those of its models stood for that were named by a hub id.

    Args:
        names: by option, the name that it gave and the folder that was found.
    """
    found = {option: pinned(name, folder) for option, (name, folder) in names.items() if name}
    known = {option: name for option, name in found.items() if name is not None}
    return {NOTED: known} if known else {}


def named(**names: str) -> dict[str, Any]:
    """Entry of a run's identity: where its inputs are, by option (without dashes)."""
    return {NAMES: {f"--{option}": str(Path(name).absolute()) for option, name in names.items()}}


def same_names(output: Path, names: Mapping[str, Any]) -> bool:
    """Whether the run in `output` noted these `named` inputs as its own."""
    return (read_identity(output) or {}).get(NAMES) == names[NAMES]


def same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two identities, as JSON gives them back, are of one run, as far as both tell."""
    names = (saved.keys() & wanted.keys()) - {*CHANGEABLE, NOTED, NAMES}
    return all(saved[name] == wanted[name] for name in names)


def verify_run(
    output: Path,
    identity: dict[str, Any],
    context: DistributedContext,
    *,
    started: bool,
    resolve: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Writes OUTPUT/run.json, or compares with the one there when the run has `started` (has state
    worth keeping), and with what the newest checkpoint says of its run.

    Changes of CHANGEABLE options are noted and kept while the run is unfinished. `resolve` brings a
    saved identity that a former version wrote into today's form. A run.json that is lost is made
    again from the checkpoint. Raises InputError on every rank: ranks have different identities,
    other fields differ, nothing says which run it is, or OUTPUT holds what is not a run's.
    """
    wanted = json.loads(json.dumps(identity))
    if context.world > 1:
        require_same(_on_ranks(wanted), context.gather, SAME_FILES)

    def verify() -> None:
        if started:
            _resume(output, wanted, lambda saved: _completed(resolve(saved)))
        else:
            require_own(output)
            _write(output / FILE, wanted)

    context.raise_on_any_rank(verify if context.is_main else lambda: None)


def require_same_options(output: Path, options: Mapping[str, Any]) -> None:
    """Raises InputError where the run in `output` was started with others of the `options`, which
    are a part of its identity."""
    saved = read_identity(output) or {}
    wanted = json.loads(json.dumps(dict(options)))
    own = {name: value for name, value in saved.items() if name in wanted}
    _refuse_differences(output, str(output), own, wanted)


def require_own(output: Path) -> None:
    """Raises InputError when a new run would replace what no run wrote."""
    found = [name for name in WRITTEN if (output / name).exists()]
    if found and not (output / FILE).exists():
        raise InputError(
            f"--output {output}: holds {found[0]}, but no {FILE}, so it is not from a run here and "
            "is not replaced; name another folder"
        )


def _resume(
    output: Path,
    wanted: dict[str, Any],
    resolve: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    newest = next(iter(committed(output / "checkpoints")[-1:]), None)
    own = _identity_of(newest)
    written = _written(output, own)
    if written is None and own is None:
        raise InputError(
            f"{output} holds a run, but no {FILE}, so nothing says which; put the file back (the "
            "same command with another --output writes the same one), or name another --output"
        )
    saved = resolve(written or own or {})
    changes = _accepted_changes(newest, saved, wanted)
    _refuse_differences(output, str(output), saved | changes, wanted)
    # What is changed holds from the newest checkpoint on, whatever run.json says by now.
    before = saved if own is None else resolve(own)
    changeable = {name: wanted[name] for name in CHANGEABLE}
    if newest is not None:
        foreign = f"It was put there from another run: move it out of {newest.parent}"
        _refuse_differences(output, str(newest), before | changeable, wanted, foreign)
    if changes or written is None:
        # The names of the start stay.
        _write(output / FILE, wanted | ({NOTED: saved[NOTED]} if NOTED in saved else {}))
    if newest is not None and step_of(newest) < wanted["steps"]:
        for name in CHANGEABLE:
            if before.get(name) != wanted[name]:
                change = f"{name} {before.get(name)} -> {wanted[name]}"
                logger.info(f"note: {change} from step {step_of(newest) + 1}")


def _identity_of(checkpoint: Path | None) -> dict[str, Any] | None:
    """The identity in a checkpoint; former versions wrote none."""
    if checkpoint is None:
        return None
    run = read_json(checkpoint / MARKER, way_around(checkpoint)).get("run")
    return run if isinstance(run, dict) else None


def _written(output: Path, own: dict[str, Any] | None) -> dict[str, Any] | None:
    """The identity in run.json; None where it is lost and a checkpoint holds it too (`own`)."""
    try:
        written = read_identity(output)
    except InputError as error:
        if own is None:
            raise
        cause = str(error).partition(";")[0]
        logger.warning(f"{cause}: it is written again from the newest checkpoint")
        return None
    if written is None and own is not None:
        logger.warning(
            f"{output / FILE} is missing: it is written again from the newest checkpoint"
        )
    return written


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
    """`saved` with the defaults of options that it is too old to know."""
    saved = {"optimizer": "adamw", "muon_momentum": None, "documents": "joined"} | saved
    mixture = saved.get("mixture")
    if isinstance(mixture, dict):
        return saved | {"mixture": asdict(MixtureConfig()) | mixture}
    return saved


def _accepted_changes(
    newest: Path | None, saved: dict[str, Any], wanted: dict[str, Any]
) -> dict[str, Any]:
    """New values of CHANGEABLE options; none when no steps are left that they could change."""
    if newest is None or step_of(newest) >= wanted["steps"]:
        return {}
    return {name: wanted[name] for name in CHANGEABLE if saved.get(name) != wanted[name]}


def _refuse_differences(
    output: Path,
    place: str,
    saved: dict[str, Any],
    wanted: dict[str, Any],
    fix: str = "",
) -> None:
    every = sorted((saved.keys() | wanted.keys()) - {NOTED, NAMES})
    known = [n for n in every if n in saved or not n.startswith(NOT_ALWAYS_NOTED)]
    names = [name for name in known if saved.get(name) != wanted.get(name)]
    if not names:
        return
    if "command" in names:
        kinds = {"shear": "a shearing run", "cpt": "a run of continued pre-training"}
        kinds["finetune"] = "a run of fine-tuning"
        kind = kinds.get(str(saved.get("command")), "another kind of run")
        raise InputError(f"{place} holds {kind}: {fix or 'name another --output'}")
    _require_same_pruning(place, saved, wanted, fix)
    told = _in_words(saved, wanted, names)
    changes = ", ".join(told[:MOST])
    cut_off = any(CUT in entry for entry in told[:MOST])
    if len(told) > MOST or cut_off:
        both = {name: {"was": saved.get(name), "now": wanted.get(name)} for name in names}
        _write(output / DIFFERENCES, both)
        more = f" and {len(told) - MOST} more" if len(told) > MOST else ""
        changes += f"{more} ({'whole: ' if cut_off else ''}{output / DIFFERENCES})"
    if not fix:
        fix = f"{_old_values(saved, wanted, told)}, or choose another --output to start a new run"
        if names == ["steps"]:
            fix += ". Another number of steps is another learning-rate schedule"
            if (output / "model" / "config.json").exists():
                command = "finetune" if wanted.get("command") == "finetune" else "cpt"
                fix += (
                    "; to train the finished model further, start a new run from it: shorn "
                    f"{command} --model {output / 'model'} --output <new folder>"
                )
    raise InputError(f"{place} holds a run of another configuration: {changes}. {fix}")


def _require_same_pruning(
    place: str, saved: dict[str, Any], wanted: dict[str, Any], fix: str
) -> None:
    """Raises InputError where one run is of shorn shorten and the other of shorn shear: neither has
    the other's options. Former versions noted nothing of shortening but its selection."""
    shortened, shortens = (
        any(name.startswith("shorten.") for name in identity) for identity in (saved, wanted)
    )
    sheared = not shortened and "selection" not in saved
    if (shortened and not shortens) or (sheared and shortens):
        kind = "shorn shorten" if shortened else "shorn shear"
        raise InputError(f"{place} holds a run of {kind}: {fix or 'name another --output'}")


def _on_ranks(identity: dict[str, Any]) -> dict[str, str]:
    """What ranks must have in common, in words by flag; at the end what follows from the rest."""
    flags = {"initial_weights": "--model", "reference_losses": "--reference-fit"}
    flags["distill.teacher"] = "--teacher"
    found: dict[str, str] = {}
    last: dict[str, str] = {}
    for name, value in identity.items():
        part, _, field = name.partition(".")
        if name in (NOTED, NAMES):
            continue
        if name == "mixture" and isinstance(value, dict):
            for key, inner in value.items():
                found[_flag(MixtureConfig, key, part)] = _text(inner)
        elif part == "model":
            found[f"{field} of the model"] = _text(value)
        elif part == "distill" and name not in flags:
            found[_flag(DistillationConfig, field, part)] = _text(value)
        else:
            flag = flags.get(name, "--" + (field or name).replace("_", "-"))
            (last if name in FOLLOWING else found)[flag] = _text(value)
    return found | last


def _old_values(saved: dict[str, Any], wanted: dict[str, Any], told: list[str]) -> str:
    """How to resume a run that differs in what is `told`."""
    then, now = _revisions_of(saved), _revisions_of(wanted)
    other = [f"--{m}" for m in ("source", "model", "teacher") if _is_told(f"--{m}", told)]
    moved = [was_revision(then[o], o) for o in other if then.get(o) not in (None, now.get(o))]
    if moved:
        rest = ", repeat the other old values" if len(told) > len(moved) else ""
        return f"{', '.join(moved)}{rest} to resume it"
    # Former versions noted none.
    asked = [
        f"{now[o]} is the revision of now, {o} {split_revision(now[o])[0]}@REVISION another"
        for o in other
        if o in now and o not in then
    ]
    return "Repeat the old values to resume it" + (f" ({', '.join(asked)})" if asked else "")


def _is_told(option: str, told: list[str]) -> bool:
    return any(entry.startswith(f"{option} is another model") for entry in told)


def _revisions_of(identity: dict[str, Any]) -> dict[str, str]:
    found = identity.get(NOTED)
    return found if isinstance(found, dict) and fits(found, {"*": str}) else {}


def _in_words(saved: dict[str, Any], wanted: dict[str, Any], names: list[str]) -> list[str]:
    """Differences as flags, one for each thing that differs, the most telling first."""
    told: dict[str, str] = {}
    model = "--source" if wanted.get("command") == "shear" else "--model"
    for name in names:
        old, new = saved.get(name), wanted.get(name)
        part, _, field = name.partition(".")
        values = f"was {_short(old)}, now {_short(new)}"
        if name in ("initial_weights", "muon_momentum") and None in (old, new):
            continue  # --init and --optimizer say it
        if name in FOLLOWING and not FOLLOWING[name].isdisjoint(names):
            continue
        if name == "reference_losses" and old and not new:
            told["--reference-losses"] = (
                "--reference-losses, which came with the model: name the run of shorn shear that "
                "it is of, or put the shear.json of that run beside the model's folder"
            )
        elif name in ("source", "initial_weights"):
            told.setdefault(model, f"{model} is another model")
        elif part == "model":
            told.setdefault(
                model, f"{model} is another model ({field} was {_short(old)}, now {_short(new)})"
            )
        elif name == "data":
            told["--data"] = "--data holds other tokens"
        elif part == "distill" and (saved.get("distill.teacher") is None) != (
            wanted.get("distill.teacher") is None
        ):
            had = "no teacher" if saved.get("distill.teacher") is None else "a teacher"
            told["--teacher"] = f"--teacher, --distill-weight: it had {had}"
        elif name == "moments":
            told["--moments"] = "--no-moments: it started with the moments of shearing"
        elif name == "distill.teacher":
            told["--teacher"] = "--teacher is another model"
        elif isinstance(old, dict) and isinstance(new, dict) and name == "mixture":
            for key in (k for k in new | old if old.get(k) != new.get(k)):
                flag = _flag(MixtureConfig, key, "mixture")
                values = f"was {_short(old.get(key))}, now {_short(new.get(key))}"
                told[flag] = f"{flag} {values}"
        else:
            flag = "--" + (field or name).replace("_", "-")
            if part == "distill":
                flag = _flag(DistillationConfig, field, part)
            told[flag] = f"{flag} {values}"
    first = [model, "--data", "--target", "--rule", "--steps"]
    return [told[flag] for flag in sorted(told, key=lambda flag: (flag not in first, flag))]


def _flag(config: type, field: str, prefix: str) -> str:
    """The flag of a field of a nested config, which may be called like the field or not."""
    names = {option.name for option in options_of(config)}
    own = field if field in names else f"{prefix}_{field}"
    return "--" + (own if own in names else prefix).replace("_", "-")


def _short(value: Any) -> str:
    """A value as it is given to its flag, where that is a matter of words."""
    text = _text(value)
    return text if len(text) <= 60 else f"{text[:57]}{CUT}"


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "not given", True: "on", False: "off"}[value]
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items())
    if isinstance(value, str):
        return PRECISIONS.get(value) or repr(value)
    return repr(value)


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        write_json(path, content)
    except OSError as error:
        raise InputError(
            f"--output {path.parent} cannot be written: {failure(error)}, or choose another folder"
        ) from None


def moments_of(output: Path) -> int:
    """Steps of shearing whose moments the run in `output` started with; 0 where there are none."""
    try:
        steps: Any = (read_identity(output) or {}).get("moments")
    except InputError:
        # Whether it can be done without is judged where the run is verified.
        return 0
    return int(steps) if is_kind(steps, int) else 0


def read_identity(output: Path) -> dict[str, Any] | None:
    """The identity of the run in `output`, or None when there is no run.

    Raises InputError when run.json cannot be read.
    """
    path = output / FILE
    if not path.exists():
        return None
    identity: dict[str, Any] = read_json(
        path,
        "restore it: the checkpoints beside it are not touched (the same command with another "
        "--output writes the same file)",
    )
    return identity
