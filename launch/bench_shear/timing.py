"""What `python -m launch.bench_shear` measures: source, masked, compact and target steps."""

import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.batches import Batch
from data.errors import InputError
from data.files import require_writable, write_copy
from data.log import logger
from data.progress import Progress
from data.tables import print_table
from launch.bench_model import llama, now
from launch.bench_shear.config import BenchShearConfig
from pruner.budget import refuse_budget
from pruner.callback import ShearCallback
from pruner.config import DEFAULTS, MaskConfig, resolve_masks
from pruner.scores import make_rule
from pruner.shapes import config_of, parse_default, parse_target, shape_of
from pruner.timing import Timing, too_busy
from pruner.units import indicator, unit_kinds
from trainer import parallel
from trainer.config import TrainConfig
from trainer.disk import size_text
from trainer.kernels import registry
from trainer.loop import Callback, Trainer
from trainer.models import folding
from trainer.models.config import ModelConfig
from trainer.optimizer import build_optimizer
from trainer.parallel import DistributedContext, to_local
from trainer.run import build_model, random_init
from trainer.throughput import Throughput

RUN_STEPS = 1000
"""Steps of the run whose schedule the timed steps are taken from."""
TRAINED = "compact, 50% of the way"
FROZEN = f"{TRAINED}, weights frozen"
"""Steps that differ only in whether weights are trained."""
MEMORY = ("dense source", FROZEN, "target", "target, by Muon")
"""Kinds of steps whose weights, gradients and moments are counted."""
PROGRESS = (0.0, 0.25, 0.5, 0.75)
"""Fractions of the way to the target at which compact steps are timed, besides the target."""


class RandomStream:
    """The same random batch at every step."""

    domains = ("random",)

    def __init__(self, vocabulary: int, config: TrainConfig) -> None:
        shape = (config.global_batch, config.seq_len)
        ids = np.random.default_rng(config.seed).integers(0, vocabulary, shape)
        self.batch = Batch(ids=ids, domains=np.zeros(len(ids), dtype=np.int64), step=0)

    def next(self) -> Batch:
        return self.batch


class Clock(Callback):
    """Times of one step: forward and backward, masks included, and all of it."""

    name: ClassVar[str] = "clock"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.backward = self.end = 0.0

    def now(self) -> float:
        return now(self.device)

    def on_step_start(self, trainer: Trainer) -> None:
        self.start = self.now()


class Stopwatch(Callback):
    """Reads the clock where the measured parts end."""

    name: ClassVar[str] = "stopwatch"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def after_backward(self, trainer: Trainer) -> None:
        self.clock.backward = self.clock.now()

    def after_optimizer_step(self, trainer: Trainer) -> None:
        self.clock.end = self.clock.now()


@dataclass(frozen=True, slots=True)
class Variant:
    """One kind of step: a trainer, the step of the schedule it stands at, and its masks."""

    trainer: Trainer
    step: int = 0
    shear: ShearCallback | None = None

    def run(self, clock: Clock) -> tuple[float, float]:
        """Seconds of forward and backward, and of the whole step."""
        trainer = self.trainer
        trainer.masks, trainer.step = None, self.step
        trainer.callbacks = [clock, *([self.shear] if self.shear else []), Stopwatch(clock)]
        trainer.train_step()
        return clock.backward - clock.start, clock.end - clock.start


def run(config: BenchShearConfig) -> None:
    """Measures, prints the result and writes it to --json."""
    require_writable(config.json, "--json")
    result = measure(config)
    print_result(result)
    write_copy(config.json, result)


def measure(config: BenchShearConfig) -> dict[str, Any]:
    """Times all variants in turns and returns medians, ratios and what they were measured on."""
    source = model_config(config)
    refuse_budget("--target", config.target)
    target = parse_default(config.target, BenchShearConfig().target, shape_of(source))
    pruned = config_of(target, source)
    train = TrainConfig(
        steps=RUN_STEPS,
        seq_len=config.seq_len,
        global_batch=config.batch,
        micro_batch=config.micro_batch or config.batch,
        lr=1e-6,
        precision=config.precision,
        threads=config.threads,
        eval_sequences=0,
    )
    if train.global_batch % train.micro_batch:
        raise InputError(
            f"--micro-batch {train.micro_batch} does not divide --batch {train.global_batch}; use "
            f"a divisor, or leave it out for all {train.global_batch} at once"
        )
    context = parallel.init(threads=config.threads)
    large, small = (_trainer(model, train, context) for model in (source, pruned))
    variants = {"dense source": Variant(large), "target": Variant(small)}
    last = int(RUN_STEPS * MaskConfig().harden) - 2
    warmup = DEFAULTS["projection"]["masks"]["target_warmup"]
    for progress in PROGRESS:
        step = max(0, round(progress * RUN_STEPS * warmup) - 1)
        shear = _shear(source, config, context, polarised=False)
        variants[f"compact, {progress:.0%} of the way"] = Variant(large, step, shear)
    at_target = _shear(source, config, context, polarised=True)
    variants["compact at target"] = Variant(large, last, at_target)
    variants["compact, hardened"] = Variant(large, RUN_STEPS - 2, at_target)
    dense = _shear(source, config, context, polarised=True, compact=False)
    variants["dense masked"] = Variant(large, last, dense)
    muon = _trainer(pruned, replace(train, optimizer="muon"), context)
    variants["target, by Muon"] = Variant(muon)
    frozen = _trainer(source, train, context, frozen=True)
    shear = _shear(source, config, context, polarised=False)
    variants[FROZEN] = Variant(frozen, variants[TRAINED].step, shear)
    clock = Clock(context.device)
    seconds = _alternate(variants, clock, config.repeats)
    share = _operator_share(variants["compact at target"], clock, config.repeats)
    held = {name: held_bytes(variants[name].trainer) for name in MEMORY}
    return _result(config, source, pruned, seconds, share, context) | {"held_bytes": held}


def model_config(config: BenchShearConfig) -> ModelConfig:
    """The source's architecture."""
    return llama(
        vocabulary=config.vocabulary,
        hidden=config.hidden,
        ffn=config.ffn,
        layers=config.layers,
        heads=config.heads,
        positions=config.seq_len,
    )


def held_bytes(trainer: Trainer) -> int:
    """What a rank holds between two steps and for the gradients of one: weights, gradients and
    moments, in bytes."""
    total = 0
    for parameter in trainer.model.parameters():
        local = to_local(parameter)
        total += local.nbytes * (1 + parameter.requires_grad)
        state = trainer.optimizer.state.get(parameter, {}).values()
        total += sum(to_local(value).nbytes for value in state)
    return total


def _trainer(
    model: ModelConfig, train: TrainConfig, context: DistributedContext, *, frozen: bool = False
) -> Trainer:
    load = random_init(train.seed)
    network = build_model(model, train, context, load=load, frozen=frozen)
    stream: Any = RandomStream(model.vocab_size, train)
    speed = Throughput(model, seq_len=train.seq_len, device=context.device, world=context.world)
    return Trainer(
        model=network,
        optimizer=build_optimizer(network, train),
        stream=stream,
        config=train,
        context=context,
        throughput=speed,
        callbacks=[],
    )


def _shear(
    source: ModelConfig,
    config: BenchShearConfig,
    context: DistributedContext,
    *,
    polarised: bool,
    compact: bool = True,
) -> ShearCallback:
    """Masks from random scores; `polarised` ones are far apart, as at the end of a run."""
    shape = shape_of(source)
    kinds = unit_kinds(parse_target(config.target, shape), shape)
    generator = torch.Generator().manual_seed(0)
    scores: dict[str, Tensor] = {}
    for name, kind in kinds.items():
        values = torch.randn(kind.rows, kind.units, generator=generator)
        if polarised:
            values = 4 * indicator(values, kind.target) + 0.1 * values
        scores[name] = values.to(context.device)
    masks = resolve_masks(MaskConfig(mask_lr=1e-6, compact=compact))
    return ShearCallback(make_rule(kinds, scores, masks, RUN_STEPS, 0), shape)


def _alternate(
    variants: dict[str, Variant], clock: Clock, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Times of each variant, one step of each in turn; the first round is not counted."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    with Progress("bench", total=(repeats + 1) * len(variants), unit="step") as bar:
        for round_number in range(repeats + 1):
            for name, variant in variants.items():
                taken = variant.run(clock)
                if round_number:
                    seconds[name].append(taken)
                bar.update()
    return seconds


def _operator_share(variant: Variant, clock: Clock, repeats: int) -> float:
    """Median share of gather-scale, forward and backward, in the whole step."""
    shares = []
    for _ in range(repeats):
        spent = [0.0]
        with _timed_operator(clock, spent):
            _, whole = variant.run(clock)
        shares.append(spent[0] / whole)
    return statistics.median(shares)


@contextmanager
def _timed_operator(clock: Clock, spent: list[float]) -> Iterator[None]:
    """Adds the time of every call of the operator to spent[0]."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = clock.now()
            result = function(*arguments)
            spent[0] += clock.now() - start
            return result

        return call

    names = ("gather_scale", "gather_scale_backward")
    originals = {name: getattr(folding, name) for name in names}
    for name, function in originals.items():
        setattr(folding, name, timed(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(folding, name, function)


def _result(
    config: BenchShearConfig,
    source: ModelConfig,
    pruned: ModelConfig,
    seconds: dict[str, list[tuple[float, float]]],
    share: float,
    context: DistributedContext,
) -> dict[str, Any]:
    names = ("forward_backward", "step")
    medians = {
        name: {
            kind: statistics.median(times)
            for kind, times in zip(names, zip(*taken, strict=True), strict=True)
        }
        for name, taken in seconds.items()
    }

    rounds = {name: Timing(tuple(step for _, step in taken)) for name, taken in seconds.items()}

    def ratio(over: str, under: str, kind: str) -> float:
        # Of neighbours in time: the machine's own speed drifts.
        index = names.index(kind)
        pairs = zip(seconds[over], seconds[under], strict=True)
        return statistics.median(first[index] / second[index] for first, second in pairs)

    return {
        "source": shape_of(source).describe(),
        "target": shape_of(pruned).describe(),
        "tokens": config.batch * config.seq_len,
        "repeats": config.repeats,
        "device": str(context.device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gather_scale": registry.which("gather_scale", context.device),
        "seconds": medians,
        "spread": {name: timing.spread for name, timing in rounds.items()},
        "busy": too_busy(rounds, {name: name for name in rounds}),
        "compact_target_over_target_cpt": ratio("compact at target", "target", names[0]),
        "step_target_over_target_cpt": ratio("compact at target", "target", names[1]),
        "hardened_over_target_cpt": ratio("compact, hardened", "target", names[0]),
        "dense_masked_over_dense": ratio("dense masked", "dense source", names[0]),
        "dense_masked_step_over_dense": ratio("dense masked", "dense source", names[1]),
        "muon_step_over_adamw": ratio("target, by Muon", "target", names[1]),
        "frozen_step_over_trained": ratio(FROZEN, TRAINED, names[1]),
        "gather_scale_share": share,
    }


def print_result(result: dict[str, Any]) -> None:
    """Prints the medians, and the ratios to the target's own step."""
    console = Console()
    table = Table(title=f"{result['tokens']} tokens, {result['threads']} threads, seconds (median)")
    headings = ("step of", "forward + backward", "÷ target", "whole step", "÷ target", "spread")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "step of" else "right")
    base = result["seconds"]["target"]
    for name, times in result["seconds"].items():
        cells = [name]
        for kind, value in times.items():
            cells += [f"{value:.3f}", f"{value / base[kind]:.2f}"]
        table.add_row(*cells, f"{result['spread'][name]:.0%}")
    print_table(table, console)
    if result["busy"] is not None:
        logger.warning(f"{result['busy']}; measure again on a quiet machine")
    for key in (
        "compact_target_over_target_cpt",
        "step_target_over_target_cpt",
        "hardened_over_target_cpt",
        "dense_masked_over_dense",
        "dense_masked_step_over_dense",
        "muon_step_over_adamw",
        "frozen_step_over_trained",
        "gather_scale_share",
    ):
        console.print(f"{key:32} {result[key]:.3f}")
    for name, held in result["held_bytes"].items():
        console.print(f"{name}: weights, gradients and moments {size_text(held)}")
    console.print(f"gather-scale: {result['gather_scale']}")
