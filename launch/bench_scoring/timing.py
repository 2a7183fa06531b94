"""What `python -m launch.bench_scoring` measures."""

import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.files import require_writable, write_copy
from data.log import logger
from data.progress import Progress
from launch.bench_model import llama, now
from launch.bench_scoring.config import BenchScoringConfig
from pruner.shorten.deletion import deletion_losses
from pruner.shorten.parts import parts_of
from pruner.shorten.ranking import order_of
from pruner.timing import Timing, too_busy
from trainer import parallel
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM, LossOutput, next_token_targets
from trainer.models.hf import load_config
from trainer.models.sources import resolve_model
from trainer.run import build_model, pretrained, random_init


def run(config: BenchScoringConfig) -> None:
    """Measures, prints the result and writes it to --json."""
    require_writable(config.json, "--json")
    result = measure(config)
    print_result(result)
    write_copy(config.json, result)


def _opened(config: BenchScoringConfig) -> tuple[ModelConfig, Callable[[CausalLM], None]]:
    """The architecture to time, and what gives it weights. Raises InputError for one block."""
    if config.source is None:
        model = llama(
            vocabulary=config.vocabulary,
            hidden=config.hidden,
            ffn=config.ffn,
            layers=config.layers,
            heads=config.heads,
            positions=config.seq_len,
        )
        return model, random_init(0)
    folder = resolve_model(config.source, option="--source")
    model = load_config(folder)
    if model.num_layers == 1:
        raise InputError(
            f"--source {config.source}: has a single block, and scores compare blocks; name a "
            "model of two or more"
        )
    return model, pretrained(folder)


def measure(config: BenchScoringConfig) -> dict[str, Any]:
    """Times both in turns; what they take, whether they agree, and what they were measured on."""
    context = parallel.init(threads=config.threads)
    train = TrainConfig(precision=config.precision, seq_len=config.seq_len)
    model, load = _opened(config)
    network = build_model(model, train, context, load=load, frozen=True).eval()
    draw = torch.Generator().manual_seed(0)
    shape = (config.sequences, config.seq_len)
    ids = torch.randint(0, model.vocab_size, shape, generator=draw).to(context.device)
    ways = {"shared": shared, "naive": naive}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, Tensor] = {}
    with Progress("measure", total=(config.repeats + 1) * 2, unit="scoring") as bar:
        for number in range(config.repeats + 1):
            for name, score in ways.items():
                taken, losses[name] = _timed(score, network, ids)
                if number:
                    seconds[name].append(taken)
                bar.update(1)
    if not losses["naive"].isfinite().all():
        raise InputError(
            f"--source {config.source}: its losses are not finite and have no order; the weights "
            "are damaged, or --precision does not suit them: use --precision fp32"
        )
    nats = {name: values.sum(0) / (ids.numel() - len(ids)) for name, values in losses.items()}
    pairs = zip(seconds["shared"], seconds["naive"], strict=True)
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    return {
        "scoring_over_naive": statistics.median(one / other for one, other in pairs),
        "same_order": order_of(nats["shared"].tolist()) == order_of(nats["naive"].tolist()),
        "largest_difference_nats": (nats["shared"] - nats["naive"]).abs().max().item(),
        "smallest_gap_nats": nats["naive"].sort().values.diff().min().item(),
        "seconds": {name: timing.to_json() for name, timing in timings.items()},
        "blocks": model.num_layers,
        "parameters": model.num_parameters(),
        "head_over_block": model.vocab_size
        * model.hidden_size
        * model.num_layers
        / model.block_matrices,
        "sequences": config.sequences,
        "seq_len": config.seq_len,
        "precision": config.precision,
        "source": config.source,
        "device": str(context.device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "busy": too_busy(timings, {name: name for name in timings}),
    }


def shared(model: CausalLM, ids: Tensor) -> Tensor:
    """Summed losses [n, L] without each block, a sequence at a time, all blocks together."""
    blocks = parts_of("block", model.config.num_layers)
    return torch.stack([deletion_losses(model, own[None], blocks)[1:, 0] for own in ids])


@torch.no_grad()
def naive(model: CausalLM, ids: Tensor) -> Tensor:
    """The same, a block at a time."""
    columns = []
    for index in range(model.config.num_layers):
        with without(model, index):
            columns.append(torch.stack([_loss(model, own[None]) for own in ids]))
    return torch.stack(columns, dim=1)


@contextmanager
def without(model: CausalLM, index: int) -> Iterator[None]:
    """The model without a block, whose others stay what they are."""
    parent, _, name = model.names.blocks.rpartition(".")
    whole = model.get_submodule(model.names.blocks)
    kept = [block for number, block in enumerate(whole.children()) if number != index]
    model.get_submodule(parent).register_module(name, nn.ModuleList(kept))
    try:
        yield
    finally:
        model.get_submodule(parent).register_module(name, whole)


def _loss(model: CausalLM, ids: Tensor) -> Tensor:
    targets, valid = next_token_targets(ids)
    output = model(ids, targets=targets, weights=valid.float())
    assert isinstance(output, LossOutput)
    return output.token_loss.double().sum()


def _timed(
    score: Callable[[CausalLM, Tensor], Tensor], model: CausalLM, ids: Tensor
) -> tuple[float, Tensor]:
    start = now(ids.device)
    losses = score(model, ids)
    return now(ids.device) - start, losses


def print_result(result: dict[str, Any]) -> None:
    """Prints the ratio and what it is of."""
    ours, naively = (result["seconds"][name] for name in ("shared", "naive"))
    logger.info(
        f"{result['blocks']} blocks, {result['sequences']} sequences of {result['seq_len']}: "
        f"{ours['seconds']:.2f} s together, {naively['seconds']:.2f} s one by one; ratio "
        f"{result['scoring_over_naive']:.3f} (head {result['head_over_block']:.2f} of a block)"
    )
    same = "the same order" if result["same_order"] else "another order"
    logger.info(
        f"{same}; losses differ by at most {result['largest_difference_nats']:.1e} nats, blocks by "
        f"at least {result['smallest_gap_nats']:.1e}"
    )
    if result["busy"] is not None:
        logger.warning(f"{result['busy']}; measure again on a quiet machine")
