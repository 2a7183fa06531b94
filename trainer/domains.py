"""Initial domain weights and reference losses of a run, from options, from the run that made the
model, or measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.log import logger
from data.mixture import FORMER_INTERVAL, MixtureConfig, parse_values
from data.reader import TokenReader
from data.records import fits, is_finite, is_kind, read_json
from data.weight_history import WeightHistory, read_history
from trainer.config import DistillationConfig, TrainConfig
from trainer.evaluate import evaluate
from trainer.models.decoder import CausalLM
from trainer.parallel import DistributedContext
from trainer.saving import publish
from trainer.scaling import fitted_reference

FILE = "reference.json"
REFERENCE_SEQUENCES = 32
"""Training sequences per domain on which a start model's loss is measured."""


@dataclass(frozen=True, slots=True)
class DomainOptions:
    """What the user says about the domains; None leaves it to `starting_domains`."""

    weights: str | None = None
    """--domain-weights, "c4=0.6,github=0.4"."""
    reference: str | None = None
    """--reference-losses, "c4=2.1,github=0.9"."""
    reference_fit: str | None = None
    """--reference-fit, a file of losses by model size."""

    def __post_init__(self) -> None:
        if self.reference is not None and self.reference_fit is not None:
            raise InputError(
                f"--reference-losses {self.reference!r} and --reference-fit {self.reference_fit} "
                "both give reference losses: leave one out"
            )


@dataclass(frozen=True, slots=True)
class Domains:
    """Starting point of a mixture."""

    weights: dict[str, float]
    """Sampling probability per domain; sums to 1."""
    reference: dict[str, float]
    """Loss in nats per token that each domain is steered towards; empty when unknown."""
    notes: list[str]
    """What the user should know about where these came from."""
    warnings: list[str] = field(default_factory=list)
    """What makes them doubtful."""
    history: WeightHistory | None = None
    """The weights of another run that are repeated."""

    def log(self) -> None:
        """Says the notes and warnings."""
        for text in self.notes:
            logger.info(f"note: {text}")
        for text in self.warnings:
            logger.warning(text)


def starting_domains(
    sizes: Mapping[str, int],
    options: DomainOptions,
    *,
    parameters: int,
    sheared: dict[str, Any] | None,
    needs_reference: bool,
    apart: bool = False,
) -> Domains:
    """Chooses weights and reference losses for the domains of `sizes` (sequences per domain).

    Each comes from its option if given (a fit is evaluated at `parameters`), else from `sheared` (a
    shear.json), else weights are proportional to tokens and references are unknown.
    `needs_reference` says that then nothing else provides them to a dynamic mixture, so that it
    becomes a fixed one, which is noted; `apart` that a dynamic one has documents apart, whose
    losses shearing's are not. Raises InputError for options that name other domains than the data
    has, and for a fit that cannot be made.
    """
    notes: list[str] = []
    warnings: list[str] = []
    weights = options.weights
    if weights is not None:
        chosen = _match(parse_values(weights, "--domain-weights"), sizes, "--domain-weights")
    else:
        chosen = {d: w for d, w in (sheared or {}).get("weights", {}).items() if d in sizes}
        if chosen.keys() != sizes.keys():
            if chosen:
                notes.append(
                    f"the sheared run's weights lack {sorted(sizes.keys() - chosen.keys())}: "
                    "starting with weights proportional to tokens (--domain-weights sets others)"
                )
            chosen = {domain: float(size) for domain, size in sizes.items()}
    total = sum(chosen.values())
    if total <= 0:
        raise InputError(f"--domain-weights {weights!r}: the weights sum to 0; give one above 0")
    if options.reference_fit is not None:
        fitted = fitted_reference(Path(options.reference_fit), set(sizes), parameters)
        losses, warnings = fitted.losses, fitted.warnings
        notes += fitted.notes
    else:
        losses = _reference(sizes, options.reference, sheared)
        if apart and losses and options.reference is None:
            warnings.append(
                "the losses to steer towards are shearing's, of documents that see each other; "
                "apart, tokens have less to go by and higher losses, by other amounts in each "
                "domain: give some that were measured apart with --reference-losses, or use "
                "--mixture fixed"
            )
    if needs_reference and not losses:
        notes.append(
            "no reference losses are known for these domains, so the domain weights stay fixed; "
            "--reference-losses 'c4=2.1,...' or --reference-fit makes them dynamic"
        )
    return Domains({d: chosen[d] / total for d in sizes}, losses, notes, warnings)


def _reference(
    sizes: Mapping[str, int], reference: str | None, sheared: dict[str, Any] | None
) -> dict[str, float]:
    if reference is not None:
        return _match(parse_values(reference, "--reference-losses"), sizes, "--reference-losses")
    known = (sheared or {}).get("reference") or {}
    losses = {d: _loss(v) for d, v in known.items() if d in sizes}
    return losses if losses.keys() == sizes.keys() else {}


def _match(values: dict[str, float], sizes: Mapping[str, int], flag: str) -> dict[str, float]:
    if values.keys() != sizes.keys():
        raise InputError(
            f"{flag} names {sorted(values)}, the data has the domains {sorted(sizes)}; "
            "give each exactly once"
        )
    return values


def replayed(
    domains: Domains,
    mixture: MixtureConfig,
    options: DomainOptions,
    reader: TokenReader,
    train: TrainConfig,
    used: Mapping[str, int],
) -> Domains:
    """`domains` with the weights of the run that `mixture` repeats, if it does.

    `used` samples of each domain are passed over. Raises InputError when the history cannot be
    read, or when with it samples would not be drawn in that run's order.
    """
    if mixture.kind != "replay":
        return domains
    assert mixture.history is not None
    if options.weights is not None:
        raise InputError(
            f"--domain-weights {options.weights!r}: --mixture replay takes all weights from "
            "--mixture-history, the first ones too; leave --domain-weights out"
        )
    history = read_history(Path(mixture.history))
    order = {
        "data": reader.fingerprint,
        "sizes": reader.sizes,
        "seed": train.seed,
        "seq_len": train.seq_len,
        "global_batch": train.global_batch,
        "used": {domain: used.get(domain, 0) for domain in reader.domains},
    }
    history.require(order, mixture.interval, train.steps)
    return replace(domains, weights=history.weights[0], history=history)


def mixture_identity(mixture: MixtureConfig, domains: Domains, steps: int) -> dict[str, Any]:
    """What identifies the mixture of a run of `steps`: its options, and the content of a history
    in place of its path."""
    history = domains.history
    return asdict(mixture) | {"history": None if history is None else history.digest(steps)}


def resolve_mixture(saved: dict[str, Any], mixture: MixtureConfig) -> dict[str, Any]:
    """The saved identity of a run as this version would save it.

    Former versions could not replay a history, and updated every 10 steps where nothing else was
    asked for, which such a run goes on with.
    """
    known = saved.get("mixture")
    if not isinstance(known, dict) or "history" in known:
        return saved
    default = mixture.interval is None and known.get("interval") == FORMER_INTERVAL
    resolved = {"history": None, "interval": None if default else known.get("interval")}
    return saved | {"mixture": known | resolved}


def samples_used(sheared: dict[str, Any] | None, reader: TokenReader, seed: int) -> dict[str, int]:
    """Samples of each domain that the shearing run drew, in the order that `reader` and `seed` give
    too; none where its data, sample length or seed was another."""
    drawn = (sheared or {}).get("samples") or {}
    known = (drawn.get("data"), drawn.get("sizes"), drawn.get("seed"))
    if known != (reader.fingerprint, reader.sizes, seed):
        return {}
    used: dict[str, int] = drawn.get("used") or {}
    return {domain: count for domain, count in used.items() if domain in reader.sizes}


def drawn_otherwise(sheared: dict[str, Any] | None, reader: TokenReader) -> int:
    """Samples that the shearing run drew from the data of `reader`, where it drew others than
    `reader` has: sequences of another length."""
    drawn = (sheared or {}).get("samples") or {}
    if drawn.get("data") != reader.fingerprint or drawn.get("sizes") == reader.sizes:
        return 0
    return sum(count for count in (drawn.get("used") or {}).values())


def begins_anew(drawn: int, run: Path) -> str:
    """What to say of the samples that the model of `run` has seen and the next run draws again."""
    return (
        f"note: the data begins at its start, with the {drawn:,} samples that the model of {run} "
        "has seen; another --seed draws another order"
    )


def drawn_again(report: Path, reader: TokenReader, seed: int) -> int:
    """Samples that the run of `report` drew and that its model's next run draws again, because
    `reader` and `seed` give the same order; 0 where the report does not tell."""
    try:
        samples = read_json(report, "").get("samples")
    except InputError:
        return 0
    if not isinstance(samples, dict) or not isinstance(samples.get("used"), dict):
        return 0
    used = samples_used({"samples": samples}, reader, seed)
    return sum(count for count in used.values() if is_kind(count, int))


def sheared_report(model: Path) -> dict[str, Any] | None:
    """The shear.json of the run whose `model` folder this is, or None.

    Raises InputError when it cannot be read or has weights or losses that are none.
    """
    path = model.parent / "shear.json"
    if not path.is_file():
        return None
    fix = f"restore it, or copy {model} to another folder to train it without the run's report"
    report: dict[str, Any] = read_json(path, fix)
    for name in ("weights", "reference"):
        values = {} if report.get(name) is None else report[name]
        if not isinstance(values, dict) or not all(is_finite(_loss(v)) for v in values.values()):
            raise InputError(f"{path}: `{name}` must hold a finite number per domain; {fix}")
        report[name] = values
    samples = report.get("samples") or {}
    used = samples.get("used") or {} if isinstance(samples, dict) else None
    if not isinstance(used, dict) or not all(is_kind(n, int) and n >= 0 for n in used.values()):
        raise InputError(f"{path}: `samples` must hold the samples used per domain; {fix}")
    known = report.get("distillation") or {}
    if not _is_distillation(known):
        raise InputError(f"{path}: `distillation` is not what shearing writes; {fix}")
    if known.get("weight") and not is_kind(report.get("source"), str):
        raise InputError(f"{path}: `source` must name the model that shearing learned from; {fix}")
    return report


def _is_distillation(known: object) -> bool:
    """Whether a report says this of a teacher; former versions left some of it out."""
    form = {"weight?": (float, type(None)), "kind?": str, "temperature?": float, "top_k?": int}
    if not isinstance(known, dict) or not fits(known, form):
        return False
    default = asdict(DistillationConfig())
    try:
        DistillationConfig(**{name: known.get(name, value) for name, value in default.items()})
    except InputError:
        return False
    return bool(known.get("kind", default["kind"]) == default["kind"])


def _loss(value: Any) -> Any:
    return value.get("loss") if isinstance(value, dict) else value


def measured_reference(
    model: CausalLM, reader: TokenReader, sequences: int, batch: int, context: DistributedContext
) -> dict[str, float]:
    """Loss per domain (nats per token) of `model` on `sequences` training sequences of each, spread
    evenly; collective. Raises InputError when one is not finite."""
    data = (reader, reader.domains, sequences, batch, context)
    measured = evaluate(model, *data, spread=True, description="measure on training text")
    losses = {domain: result.loss for domain, result in measured.items()}
    bad = [domain for domain, loss in losses.items() if not isfinite(loss)]
    if bad:
        raise InputError(
            f"the start model's loss on training text of {', '.join(bad)} is not finite: its "
            "weights are damaged, or --precision does not suit them (--precision fp32 is the safe "
            "one)"
        )
    return losses


def start_reference(
    output: Path,
    model: CausalLM | None,
    reader: TokenReader,
    batch: int,
    context: DistributedContext,
) -> dict[str, float]:
    """Loss per domain (nats per token) of the start model on training text; collective.

    `model` holds the start weights; its losses are measured and kept in OUTPUT/reference.json. None
    once training has begun: then the kept ones are read, so that a resumed run steers towards the
    same numbers. Raises InputError when they are lost or not finite.
    """
    path = output / FILE
    if model is None:
        kept = context.broadcast(_read_kept(path, reader) if context.is_main else None)
        if kept is None:
            raise InputError(
                f"{path} (the start model's losses) is missing or damaged, and training has begun: "
                f"restore the file, or delete {output} to start over"
            )
        losses: dict[str, float] = kept
    else:
        losses = measured_reference(model, reader, REFERENCE_SEQUENCES, batch, context)
        publish(context, {"reference": losses, "sequences": REFERENCE_SEQUENCES}, path)
    values = ", ".join(f"{domain} {loss:.4f}" for domain, loss in losses.items())
    logger.info(f"reference losses (the start model's on training text, {path}): {values}")
    return losses


def _read_kept(path: Path, reader: TokenReader) -> dict[str, float] | None:
    try:
        losses = read_json(path, "restore it", keys={"reference": dict})["reference"]
    except InputError:
        return None
    kept = {domain: losses.get(domain) for domain in reader.domains}
    return kept if all(is_finite(loss) for loss in kept.values()) else None
