"""A run of shortening: blocks, or their layers, scored, the least of them removed, and the rest
refitted."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from data.errors import InputError
from data.files import finite_only
from data.log import logger
from data.records import read_json
from data.tables import print_table
from data.terminal import passing_over_what_is_not_shown
from pruner.divergence import PARTS, Divergence
from pruner.evolution import evolve
from pruner.inputs import Inputs, find_source, open_inputs, require_same_inputs
from pruner.measurements import sequences_ahead
from pruner.refitted import cut, importance_of, refitted_divergence
from pruner.run import prune, require_room_for
from pruner.selection import Selection
from pruner.shapes import config_of, parse_sizes, parse_target, shape_of
from pruner.shorten import scores
from pruner.shorten.config import SEARCHES, ShortenConfig
from pruner.shorten.kept import FOLDER, KeptRows
from pruner.shorten.parts import KINDS, WORDS, Part, left_over, marks, parts_of, without
from pruner.shorten.ranking import count_of, in_doubt, removable, take
from pruner.shorten.scores import Scores
from pruner.shorten.search import Removed, exchanged
from pruner.units import measured_sizes, unit_sizes
from trainer import parallel
from trainer.identity import named, read_identity, require_own, require_same_options
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.masks import Masks
from trainer.output import owned
from trainer.parallel import DistributedContext
from trainer.run import build_model, choose_kernels, pretrained
from trainer.saving import open_or_finished, publish, require_copy

SHOWN = 12
"""Blocks or layers in the printed table."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The parts that go, by their numbers, and how they were found."""

    scores: Scores
    """Of all parts of the source."""
    removed: list[int]
    """In the order in which they went, where they went one by one; else ascending."""
    divergence: dict[str, Any] | None = None
    """What a search came to."""


def shorten(config: ShortenConfig) -> None:
    """Removes blocks as `config` says; writes what shearing writes, and OUTPUT/scores/.

    Resumes what OUTPUT holds. Raises InputError before any weight is read for what cannot work,
    also when another process works in OUTPUT.
    """
    context = parallel.init(threads=config.threads)
    kernels = choose_kernels(config.kernels, context)
    require_copy(context, config.json, Path(config.output) / "shear.json")
    output = Path(config.output)

    def opened() -> tuple[Inputs, int]:
        with context.rank_zero_first():
            return _open(config)

    report, train = output / "shear.json", config.train
    found = open_or_finished(
        opened,
        report,
        train,
        context,
        names=named(source=config.source, data=config.data),
        copy=config.json,
        dtype=config.save_dtype,
    )
    if found is None:
        return
    inputs, count = found
    require_same_inputs(inputs, context)
    with owned(output, "shear.json", context):
        options = _options(config, count)

        def check() -> None:
            require_own(output)
            if (output / "shear.json").exists():
                # Before anything is scored that a finished run has no use for. A run without a
                # selection is one of shearing.
                if "selection" not in (read_identity(output) or {"selection": ""}):
                    raise InputError(f"{output} holds a run of shorn shear: name another --output")
                schedule = {"seed": config.seed, "seq_len": config.seq_len}
                require_same_options(output, options | schedule | _refit(config))

        context.raise_on_any_rank(check if context.is_main else lambda: None)
        if context.broadcast(not report.exists()):
            # Before hours of scoring.
            require_room_for(inputs, context)
        inputs = _selected(config, inputs, count, context)
        assert inputs.selection is not None
        selection = replace(inputs.selection, options=options)
        prune(replace(inputs, selection=selection), context, None, kernels)


def _refit(config: ShortenConfig) -> dict[str, Any]:
    """The refit's options, as the run's identity names them."""
    if not config.refit.refit:
        return {"refit.refit": False}
    return {f"refit.{name}": value for name, value in asdict(config.refit).items()}


def _open(config: ShortenConfig) -> tuple[Inputs, int]:
    """What the options name, and how many blocks or layers go."""
    _, model = find_source(config.shearing({"layers": 1}))
    count = count_of(
        model,
        model if config.then is None else _narrowed(config.then, model),
        remove=config.remove,
        ratio=config.ratio,
        params=config.params,
        first=config.protect_first,
        last=config.protect_last,
        units=config.units,
    )
    # Which go is still to be found; of --units both it may be other numbers of each kind.
    removed = parts_of(config.units, model.num_layers)[:count]
    return open_inputs(config.shearing(left_over(removed, model.num_layers)), apart=True), count


def _narrowed(sizes: str, model: ModelConfig) -> ModelConfig:
    """The source with all of its blocks in the `sizes` of --then. Raises InputError where it cannot
    have them, or has them already."""
    source = shape_of(model)
    own = {key: source.size(key) for key in parse_sizes(sizes)}
    if parse_sizes(sizes) == own:
        raise InputError(
            f"--then {sizes}: is what the source has; make one of the sizes smaller, or leave "
            "--then out"
        )
    try:
        return config_of(parse_target(sizes, source), model)
    except InputError as error:
        raise InputError(f"--then {sizes}: {error}") from error


def _options(config: ShortenConfig, count: int) -> dict[str, Any]:
    """What decides which blocks go, as the run's identity names it."""
    names = ["units", "criterion", "then", "search", "protect_first", "protect_last"]
    names += [] if config.idle().get("sequences") else ["sequences"]
    values = {name: getattr(config, name) for name in names} | {"remove": count}
    if config.search in SEARCHES:
        values |= dict(zip(("generations", "offspring"), config.rounds, strict=True))
    if "sequences" in values:
        values["sequences"] = config.scored_sequences
    return {f"shorten.{name}": value for name, value in values.items()}


def _selected(
    config: ShortenConfig, inputs: Inputs, count: int, context: DistributedContext
) -> Inputs:
    """`inputs` with what is left once `count` blocks or layers are chosen; collective."""
    layers = inputs.model.num_layers
    allowed = removable(layers, config.protect_first, config.protect_last, config.units)
    scorer = Scorer(config, inputs, context)
    # What is told of them depends on all of it, beside which they are.
    search: list[Any] = [config.seed, *config.rounds, config.then]
    if config.search == "refitted":
        search.append(asdict(config.refit))
    path = scorer.path("chosen", [config.criterion, config.search, count, allowed, *search])
    told = context.broadcast(_chosen(path) if context.is_main else None)
    if told is None:
        words = WORDS[config.units]
        logger.info(
            f"scoring {len(scorer.parts)} {words} by {config.criterion}; {count} of the "
            f"{len(allowed)} that are not protected will go"
        )
        choice = scorer.choose(allowed, count)
        told = _told(scorer, choice, allowed)
        publish(context, told, path)
        if context.is_main:
            _show(scorer, choice, allowed)
    names = {part.name: part for part in scorer.parts}
    removed = [names[name] for name in told["removed"]]
    sizes = left_over(removed, layers)
    if len(KINDS[config.units]) > 1:
        with context.rank_zero_first():
            inputs = open_inputs(config.shearing(sizes), apart=True)
    z = marks(removed, layers)
    if config.then is None:
        every = (measured_sizes if config.units == "block" else unit_sizes)(inputs.source)
    else:
        every = dict.fromkeys(z, (1, layers))
    kept = {name: torch.ones(size, dtype=torch.float64) for name, size in every.items()}
    for name, row in z.items():
        kept[name][0] = row
    return replace(inputs, selection=Selection(inputs.target, kept, None, told))


def _chosen(path: Path) -> dict[str, Any] | None:
    """What was told of the same choice before; None where it was not made."""
    try:
        told: dict[str, Any] = read_json(path, "", keys={"removed": list, "init": str})
    except InputError:
        return None
    return told


@dataclass(frozen=True, slots=True)
class Fitness:
    """What a search compares sets of removed parts by."""

    of: Callable[[Removed, int], float]
    """Divergence from the source on so many parts of the text, in nats per token."""
    keep: Callable[[], None]
    """Keeps what is known."""
    told: Callable[[], dict[str, Any]]
    """What the report says of the work."""


def _name(removed: Removed) -> str:
    return ",".join(map(str, removed))


class Scorer:
    """Scores the blocks or layers of a source; collective. The model is loaded when something is
    scored."""

    def __init__(self, config: ShortenConfig, inputs: Inputs, context: DistributedContext) -> None:
        self.config = config
        self.inputs = inputs
        self.context = context
        self._model: CausalLM | None = None
        self.parts = parts_of(config.units, inputs.model.num_layers)
        """What could go; numbers below are places in this list."""
        self.sequences = sequences_ahead(
            inputs.config, inputs.reader, inputs.domains.weights, config.scored_sequences
        )
        """[n, S], what training draws first."""
        asked = config.sequences is not None and "sequences" not in config.idle()
        if asked and len(self.sequences) < config.scored_sequences:
            logger.info(
                f"note: --sequences {config.sequences}: {config.data} holds {len(self.sequences)} "
                f"in these proportions, and {WORDS[config.units]} are scored on those"
            )

    @property
    def model(self) -> CausalLM:
        """The source, sharded."""
        if self._model is None:
            inputs = self.inputs
            self._model = build_model(
                inputs.model,
                inputs.config.train,
                self.context,
                load=pretrained(inputs.folder),
                frozen=self.config.criterion != "taylor",
            ).eval()
        return self._model

    def choose(self, allowed: list[int], count: int) -> Choice:
        """`count` of the `allowed` parts."""
        if self.config.search == "greedy":
            return self._one_by_one(allowed, count)
        scored = self._score(count)
        removed = take(scored.order, allowed, count)
        if self.config.criterion == "angular":
            removed = _window(scored, allowed, count)
        if self.config.search == "one-shot":
            return Choice(scored, removed)
        refitted = self.config.search == "refitted"
        return self._evolved(scored, removed, allowed, self._refits() if refitted else self._cuts())

    def _one_by_one(self, allowed: list[int], count: int) -> Choice:
        """Every round scores what the former ones have left."""
        first = self._by_perplexity([])
        removed = take(first.order, allowed, 1)
        while len(removed) < count:
            scored = self._by_perplexity(removed)
            left = [index for index in allowed if index not in removed]
            removed += take(scored.order, left, 1)
            logger.info(
                f"without {self._word(removed[-1])} as well: perplexity "
                f"{scored.values[removed[-1]]:.4f}"
            )
        return Choice(first, removed)

    def _word(self, number: int) -> str:
        name = self.parts[number].name
        return f"block {name}" if isinstance(name, int) else name

    def names(self, numbers: Iterable[int]) -> list[int | str]:
        """Names of parts."""
        return [self.parts[number].name for number in numbers]

    def _gone(self, removed: Iterable[int]) -> list[Part]:
        return [self.parts[number] for number in removed]

    def _evolved(
        self, scored: Scores, start: list[int], allowed: list[int], fitness: Fitness
    ) -> Choice:
        generations, offspring = self.config.rounds
        before = fitness.of(tuple(start), PARTS)
        found = evolve(
            fitness.of,
            tuple(start),
            partial(exchanged, order=[index for index in scored.order if index in allowed]),
            generations=generations,
            offspring=offspring,
            seed=self.config.seed,
            keep=fitness.keep,
        )
        after = fitness.of(found, PARTS)
        logger.info(f"divergence from the source {before:.4f} -> {after:.4f} nats")
        told = {"before": before, "after": after, "start": self.names(start)}
        told |= {"generations": generations, "offspring": offspring}
        return Choice(scored, list(found), told | fitness.told())

    def _cuts(self) -> Fitness:
        """Sets of parts by what the model without them predicts."""
        config, model, device = self.config, self.inputs.model, self.context.device
        path = self.path("divergence", [])
        data = (self.sequences, self.context, config.micro_batch, path)
        measured = Divergence(self.model, *data)

        def divergence(removed: Removed, parts: int) -> float:
            masks = partial(without, self._gone(removed), model, device)
            return measured.of(_name(removed), masks, parts)

        def told() -> dict[str, Any]:
            return {"sets": len(measured.known), "sequences_computed": measured.computed}

        return Fitness(divergence, measured.keep, told)

    def _refits(self) -> Fitness:
        """Sets of parts by what a refit makes of the model without them, in the sizes of --then;
        the source is rotated for it if those cut hidden dimensions."""
        inputs, config = self.inputs, self.inputs.config
        refit = config.refit
        number = refit.refit_sequences + refit.refit_held_out
        ids = sequences_ahead(config, inputs.reader, inputs.domains.weights, number)
        units: dict[str, torch.Tensor] = {}
        if self.config.then is not None:
            units, _ = importance_of(self.model, config, self.sequences, self.context)
        path = self.path("refitted", [self.config.then, asdict(refit)])
        measured = refitted_divergence(self.model, config, ids, self.context, path)
        held = config.masks.norm_scale == "held"

        def masks(removed: Removed) -> Masks:
            rows = marks(self._gone(removed), inputs.model.num_layers)
            sizes = left_over(self._gone(removed), inputs.model.num_layers)
            target = parse_target(self.config.shearing(sizes).target, inputs.source, apart=True)
            own = {name: row[None] for name, row in rows.items()}
            return cut(inputs.model, units | own, target, held)

        def divergence(removed: Removed, parts: int) -> float:
            number = max(1, len(measured.ids) * parts // PARTS)
            return measured.of(_name(removed), partial(masks, removed), number)

        return Fitness(divergence, lambda: None, lambda: {"refits": len(measured.known)})

    def _score(self, count: int) -> Scores:
        criterion, number = self.config.criterion, len(self.parts)
        data = (self.parts, self.sequences, self.context)
        batch = self.config.micro_batch
        if criterion == "ppl":
            return self._by_perplexity([])
        if criterion == "magnitude":
            return scores.by_magnitude(self.model, self.parts, self.context)
        if criterion == "taylor":
            return scores.by_taylor(self.model, *data)
        if criterion == "influence":
            return scores.by_angle(self.model, *data, batch, 1, scores.influence)
        if criterion == "angular":
            return scores.by_angle(self.model, *data, batch, count, scores.angle)
        if criterion == "reverse":
            return scores.by_position(number)
        return scores.by_chance(number, self.config.seed)

    def _by_perplexity(self, removed: list[int]) -> Scores:
        kept = KeptRows(self.path("losses", sorted(removed), "safetensors"), self.context)
        if kept.rows is not None and len(kept.rows) == len(self.sequences):
            seq_len = self.sequences.shape[1]
            return scores.from_losses(kept.rows, seq_len, len(self.parts), removed)
        data = (self.sequences, self.context, self.config.micro_batch)
        return scores.by_perplexity(self.model, self.parts, *data, kept, removed)

    def path(self, name: str, what: list[Any], suffix: str = "json") -> Path:
        """File of what is kept under `name` of measurements of `what` on this text."""
        precision = parallel.compute_dtype(self.config.precision, self.context.device)
        digest = hashlib.sha256(self.sequences.numpy().tobytes())
        parts = [self.inputs.source_key, str(precision), what]
        parts += [] if self.config.units == "block" else [self.config.units]
        digest.update(json.dumps(parts).encode())
        folder = Path(self.config.output) / FOLDER
        return folder / f"{name}-{digest.hexdigest()[:16]}.{suffix}"


def _window(scored: Scores, allowed: list[int], count: int) -> list[int]:
    """The `count` blocks in a row, all `allowed`, with the least score of the first."""
    for first in scored.order:
        window = list(range(first, first + count))
        if set(window) <= set(allowed):
            return window
    raise AssertionError(f"no {count} in a row among {allowed}")


def _told(scorer: Scorer, choice: Choice, allowed: list[int]) -> dict[str, Any]:
    """What the report says of the selection."""
    config, scored = scorer.config, choice.scores
    pairs = scored.intervals
    one_shot = config.search == "one-shot" and config.criterion != "angular"
    told = {
        "init": config.criterion,
        "search": config.search,
        "order": scorer.names(scored.order),
        "scores": scored.values,
        "intervals": pairs,
        "intact": scored.whole,
        "protected": scorer.names(sorted(set(range(len(scored.values))) - set(allowed))),
        "removed": scorer.names(sorted(choice.removed)),
        "removed_in_order": scorer.names(choice.removed),
        "unsure": scorer.names(in_doubt(scored.means, allowed, len(choice.removed)))
        if one_shot and scored.means is not None
        else None,
        "divergence": choice.divergence,
        "sequences": None if "sequences" in config.idle() else len(scorer.sequences),
        **({} if config.then is None else {"then": config.then}),
        **({} if config.units == "block" else {"units": scorer.names(range(len(scorer.parts)))}),
    }
    # The same as when it is read again.
    found: dict[str, Any] = finite_only(told)
    return found


@passing_over_what_is_not_shown()
def _show(scorer: Scorer, choice: Choice, allowed: list[int]) -> None:
    """Prints the parts of least score, and which go."""
    scored, removed = choice.scores, sorted(choice.removed)
    pairs = scored.intervals
    blocks = scorer.config.units == "block"
    table = Table(title=f"{WORDS[scorer.config.units]}, the least score first")
    for heading in ("block" if blocks else "layer", "score", "95% interval", ""):
        table.add_column(heading, justify="right")
    for index in scored.order[: max(SHOWN, len(removed))]:
        span = "" if pairs is None else f"{pairs[index][0]:.5g} .. {pairs[index][1]:.5g}"
        word = "goes" if index in removed else "" if index in allowed else "protected"
        table.add_row(str(scorer.parts[index].name), f"{scored.values[index]:.6g}", span, word)
    print_table(table)
    word = "blocks " if blocks else ""
    logger.info(f"removed: {word}{', '.join(map(str, scorer.names(removed)))}")
