"""A run of shortening: blocks scored, the least of them removed, and the rest refitted."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from data.errors import InputError
from data.log import logger
from data.records import read_json
from data.tables import print_table
from data.terminal import passing_over_what_is_not_shown
from pruner.divergence import PARTS, Divergence
from pruner.measurements import sequences_ahead
from pruner.refitted import cut, importance_of, refitted_divergence
from pruner.run import Inputs, find_source, open_inputs, prune, require_same_inputs
from pruner.selection import Selection
from pruner.shapes import config_of, parse_sizes, parse_target, shape_of
from pruner.shorten import scores
from pruner.shorten.config import SEARCHES, ShortenConfig
from pruner.shorten.deletion import without
from pruner.shorten.kept import FOLDER, KeptRows
from pruner.shorten.ranking import count_of, in_doubt, removable, take
from pruner.shorten.scores import BlockScores
from pruner.shorten.search import Removed, evolve
from pruner.units import unit_sizes
from trainer import parallel
from trainer.identity import require_own, require_same_options
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.masks import Masks
from trainer.models.sources import weights_fingerprint
from trainer.output import owned
from trainer.parallel import DistributedContext
from trainer.run import build_model, choose_kernels, pretrained
from trainer.saving import publish, require_copy

SHOWN = 12
"""Blocks in the printed table."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The blocks that go, and how they were found."""

    scores: BlockScores
    """Of all blocks of the source."""
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
    with context.rank_zero_first():
        inputs, count = _open(config)
    require_same_inputs(inputs, context)
    output = Path(config.output)
    with owned(output, "shear.json", context):
        options = _options(config, count)

        def check() -> None:
            require_own(output)
            if (output / "shear.json").exists():
                require_same_options(output, options)

        context.raise_on_any_rank(check if context.is_main else lambda: None)
        selection = replace(_select(config, inputs, count, context), options=options)
        prune(replace(inputs, selection=selection), context, None, kernels)


def _open(config: ShortenConfig) -> tuple[Inputs, int]:
    """What the options name, and how many blocks go."""
    _, model = find_source(config.shearing(1))
    count = count_of(
        model,
        model if config.then is None else _narrowed(config.then, model),
        remove=config.remove,
        ratio=config.ratio,
        params=config.params,
        first=config.protect_first,
        last=config.protect_last,
    )
    return open_inputs(config.shearing(model.num_layers - count)), count


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
    names = ["criterion", "then", "search", "protect_first", "protect_last"]
    names += [] if config.idle().get("sequences") else ["sequences"]
    values = {name: getattr(config, name) for name in names} | {"remove": count}
    if config.search in SEARCHES:
        values |= dict(zip(("generations", "offspring"), config.rounds, strict=True))
    if "sequences" in values:
        values["sequences"] = config.scored_sequences
    return {f"shorten.{name}": value for name, value in values.items()}


def _select(
    config: ShortenConfig, inputs: Inputs, count: int, context: DistributedContext
) -> Selection:
    """The blocks to keep; collective."""
    layers = inputs.model.num_layers
    allowed = removable(layers, config.protect_first, config.protect_last)
    scorer = Scorer(config, inputs, context)
    search: list[Any] = [config.seed, *config.rounds]
    if config.search == "refitted":
        search += [config.then, asdict(config.refit)]
    path = scorer.path("chosen", [config.criterion, config.search, count, allowed, *search])
    told = context.broadcast(_chosen(path) if context.is_main else None)
    if told is None:
        logger.info(
            f"scoring {layers} blocks by {config.criterion}; {count} of the {len(allowed)} that "
            "are not protected will go"
        )
        choice = scorer.choose(allowed, count)
        told = _told(scorer, choice, allowed)
        publish(context, told, path)
        if context.is_main:
            _show(choice, allowed)
    sizes = unit_sizes(inputs.source)
    decided = sizes if config.then is None else ["layer"]
    z = {name: torch.ones(sizes[name], dtype=torch.float64) for name in decided}
    z["layer"][0, told["removed"]] = 0
    return Selection(inputs.target, z, None, told)


def _chosen(path: Path) -> dict[str, Any] | None:
    """What was told of the same choice before; None where it was not made."""
    try:
        told: dict[str, Any] = read_json(path, "", keys={"removed": list, "init": str})
    except InputError:
        return None
    return told


@dataclass(frozen=True, slots=True)
class Fitness:
    """What a search compares sets of removed blocks by."""

    of: Callable[[Removed, int], float]
    """Divergence from the source on so many parts of the text, in nats per token."""
    keep: Callable[[], None]
    """Keeps what is known."""
    told: Callable[[], dict[str, Any]]
    """What the report says of the work."""


def _name(removed: Removed) -> str:
    return ",".join(map(str, removed))


class Scorer:
    """Scores the blocks of a source; collective. The model is loaded when something is scored."""

    def __init__(self, config: ShortenConfig, inputs: Inputs, context: DistributedContext) -> None:
        self.config = config
        self.inputs = inputs
        self.context = context
        self._model: CausalLM | None = None
        self.sequences = sequences_ahead(
            inputs.config, inputs.reader, inputs.domains.weights, config.scored_sequences
        )
        """[n, S], what training draws first."""
        if len(self.sequences) < config.scored_sequences and config.sequences is not None:
            logger.info(
                f"note: --sequences {config.sequences}: {config.data} holds {len(self.sequences)} "
                "in these proportions, and blocks are scored on those"
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
        """`count` of the `allowed` blocks."""
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
                f"without block {removed[-1]} as well: perplexity {scored.values[removed[-1]]:.4f}"
            )
        return Choice(first, removed)

    def _evolved(
        self, scored: BlockScores, start: list[int], allowed: list[int], fitness: Fitness
    ) -> Choice:
        generations, offspring = self.config.rounds
        before = fitness.of(tuple(start), PARTS)
        found = evolve(
            fitness.of,
            tuple(start),
            [index for index in scored.order if index in allowed],
            generations=generations,
            offspring=offspring,
            seed=self.config.seed,
            keep=fitness.keep,
        )
        after = fitness.of(found, PARTS)
        logger.info(f"divergence from the source {before:.4f} -> {after:.4f} nats")
        told = {"before": _finite(before), "after": _finite(after), "start": start}
        told |= {"generations": generations, "offspring": offspring}
        return Choice(scored, list(found), told | fitness.told())

    def _cuts(self) -> Fitness:
        """Sets of blocks by what the model without them predicts."""
        config, device = self.config, self.context.device
        path = self.path("divergence", [])
        data = (self.sequences, self.context, config.micro_batch, path)
        measured = Divergence(self.model, *data)

        def divergence(removed: Removed, parts: int) -> float:
            return measured.of(_name(removed), partial(without, removed, self.model, device), parts)

        def told() -> dict[str, Any]:
            return {"sets": len(measured.known), "sequences_computed": measured.computed}

        return Fitness(divergence, measured.keep, told)

    def _refits(self) -> Fitness:
        """Sets of blocks by what a refit makes of the model without them, in the sizes of --then;
        the source is rotated for it if those cut hidden dimensions."""
        inputs, config = self.inputs, self.inputs.config
        refit = config.refit
        number = refit.refit_sequences + refit.refit_held_out
        ids = sequences_ahead(config, inputs.reader, inputs.domains.weights, number)
        units = {}
        if self.config.then is not None:
            units = importance_of(self.model, config, self.sequences, self.context)
        path = self.path("refitted", [self.config.then, asdict(refit)])
        measured = refitted_divergence(self.model, config, ids, self.context, path)
        held = config.masks.norm_scale == "held"

        def masks(removed: Removed) -> Masks:
            layer = torch.ones(1, inputs.source.layers, dtype=torch.float64)
            layer[0, list(removed)] = 0
            return cut(inputs.model, units | {"layer": layer}, inputs.target, held)

        def divergence(removed: Removed, parts: int) -> float:
            number = max(1, len(measured.ids) * parts // PARTS)
            return measured.of(_name(removed), partial(masks, removed), number)

        return Fitness(divergence, lambda: None, lambda: {"refits": len(measured.known)})

    def _score(self, count: int) -> BlockScores:
        criterion, layers = self.config.criterion, self.inputs.model.num_layers
        data = (self.sequences, self.context)
        batch = self.config.micro_batch
        if criterion == "ppl":
            return self._by_perplexity([])
        if criterion == "magnitude":
            return scores.by_magnitude(self.model, self.context)
        if criterion == "taylor":
            return scores.by_taylor(self.model, *data)
        if criterion == "influence":
            return scores.by_angle(self.model, *data, batch, 1, scores.influence)
        if criterion == "angular":
            return scores.by_angle(self.model, *data, batch, count, scores.angle)
        if criterion == "reverse":
            return scores.by_position(layers)
        return scores.by_chance(layers, self.config.seed)

    def _by_perplexity(self, removed: list[int]) -> BlockScores:
        kept = KeptRows(self.path("losses", sorted(removed), "safetensors"), self.context)
        if kept.rows is not None and len(kept.rows) == len(self.sequences):
            return scores.from_losses(kept.rows, self.sequences.shape[1], self._layers, removed)
        return scores.by_perplexity(
            self.model, self.sequences, self.context, self.config.micro_batch, kept, removed
        )

    @property
    def _layers(self) -> int:
        return self.inputs.model.num_layers

    def path(self, name: str, what: list[Any], suffix: str = "json") -> Path:
        """File of what is kept under `name` of measurements of `what` on this text."""
        precision = parallel.compute_dtype(self.config.precision, self.context.device)
        digest = hashlib.sha256(self.sequences.numpy().tobytes())
        parts = [weights_fingerprint(self.inputs.folder), str(precision), what]
        digest.update(json.dumps(parts).encode())
        folder = Path(self.config.output) / FOLDER
        return folder / f"{name}-{digest.hexdigest()[:16]}.{suffix}"


def _window(scored: BlockScores, allowed: list[int], count: int) -> list[int]:
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
    return {
        "init": config.criterion,
        "search": config.search,
        "order": scored.order,
        "scores": [_finite(value) for value in scored.values],
        "intervals": pairs and [[_finite(low), _finite(high)] for low, high in pairs],
        "intact": scored.whole,
        "protected": [index for index in range(len(scored.values)) if index not in allowed],
        "removed": sorted(choice.removed),
        "removed_in_order": choice.removed,
        "unsure": in_doubt(scored.means, allowed, len(choice.removed))
        if one_shot and scored.means is not None
        else None,
        "divergence": choice.divergence,
        "sequences": None if "sequences" in config.idle() else len(scorer.sequences),
        **({} if config.then is None else {"then": config.then}),
    }


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None


@passing_over_what_is_not_shown()
def _show(choice: Choice, allowed: list[int]) -> None:
    """Prints the blocks of least score, and which go."""
    scored, removed = choice.scores, sorted(choice.removed)
    pairs = scored.intervals
    table = Table(title="blocks, the least score first")
    for heading in ("block", "score", "95% interval", ""):
        table.add_column(heading, justify="right")
    for index in scored.order[: max(SHOWN, len(removed))]:
        span = "" if pairs is None else f"{pairs[index][0]:.5g} .. {pairs[index][1]:.5g}"
        word = "goes" if index in removed else "" if index in allowed else "protected"
        table.add_row(str(index), f"{scored.values[index]:.6g}", span, word)
    print_table(table)
    logger.info(f"removed: blocks {', '.join(map(str, removed))}")
