"""Decoding latency as a function of the shape, from a small table measured on this device.

At batch 1 a decoding step reads every weight once and starts a fixed number of kernels per block,
so its time is close to linear in bytes and blocks:

    seconds = call + layers * block + bytes of the blocks * b + bytes of the head * h

The four coefficients are fitted, none below 0, to the times of a few models with random weights in
plain transformers: four shapes, each in two depths, which tell the blocks' share from the rest.
"""

import inspect
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from data.progress import Progress
from pruner.budget import propose
from pruner.shapes import config_of
from trainer.models.config import ModelConfig

POSITIONS = 128
"""Positions in the key/value cache when the first timed token is decoded."""
TOKENS = 4
"""Tokens a model decodes in its turn; the first is not timed, for it finds cold caches."""
ROUNDS = 12
"""Turns of each model that count."""
SECONDS = 10.0
"""After that long, no turns are started beyond the second that counts."""
BLOCK_BYTES = 10**9
"""The deeper of two depths holds about this much, so that processor caches do not; less where the
source itself has less."""
_TILE = 1 << 20

Timer = Callable[[Sequence[ModelConfig]], list[float]]
"""Median seconds per decoded token of each model."""


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Predicts the seconds of one decoding step at batch 1."""

    call: float
    """Seconds of a step besides blocks and head."""
    block: float
    """Seconds of a block besides reading its bytes."""
    block_byte: float
    """Seconds per byte of the blocks: weights and cached keys and values."""
    head_byte: float
    """Seconds per byte of the output head."""
    itemsize: int
    """Bytes per weight and cached value."""
    error: float
    """Largest relative difference from the times it was fitted to."""

    def predict(self, config: ModelConfig) -> float:
        """Seconds per token of `config`."""
        coefficients = (self.call, self.block, self.block_byte, self.head_byte)
        features = _features(config, self.itemsize)
        return sum(c * f for c, f in zip(coefficients, features, strict=True))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure_latency(source: ModelConfig, timer: Timer, itemsize: int) -> LatencyModel:
    """Times the calibration models of `source` and fits the model to them."""
    configs = calibration_models(source, itemsize)
    return fit(configs, timer(configs), itemsize)


def fit(configs: Sequence[ModelConfig], seconds: Sequence[float], itemsize: int) -> LatencyModel:
    """The coefficients, none below 0, of least squared relative error on measured times."""
    features = np.array([_features(config, itemsize) for config in configs])
    times = np.array(seconds)
    rows = features / times[:, None]
    solutions = []
    # With four coefficients, trying each set of positive ones is exact and short.
    for size in range(1, features.shape[1] + 1):
        for chosen in itertools.combinations(range(features.shape[1]), size):
            part = rows[:, chosen]
            scale = np.maximum(np.abs(part).max(axis=0), np.finfo(float).tiny)
            values = np.linalg.lstsq(part / scale, np.ones(len(times)), rcond=None)[0] / scale
            if (values >= 0).all():
                coefficients = np.zeros(features.shape[1])
                coefficients[list(chosen)] = values
                solutions.append((float(((rows @ coefficients - 1) ** 2).sum()), coefficients))
    best = min(solutions, key=lambda solution: solution[0])[1]
    error = float(np.abs(rows @ best - 1).max())
    call, block, block_byte, head_byte = (float(value) for value in best)
    return LatencyModel(call, block, block_byte, head_byte, itemsize, error)


def _features(config: ModelConfig, itemsize: int) -> tuple[float, float, float, float]:
    head = config.vocab_size * config.hidden_size * itemsize
    return 1.0, float(config.num_layers), float(_block_bytes(config, itemsize)), float(head)


def _block_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of all blocks that a step reads: weights and the cache of POSITIONS positions."""
    cached = 2 * POSITIONS * config.kv_size * config.num_layers
    return (config.num_parameters(embeddings=False) + cached) * itemsize


def calibration_models(source: ModelConfig, itemsize: int) -> list[ModelConfig]:
    """Models to time: the source's blocks, halves and quarters of them, and halves of its width,
    each shallow and deep."""

    def block_parameters(config: ModelConfig) -> float:
        return float(config.num_parameters(embeddings=False))

    shapes = [source]
    for fraction, fixed in ((0.5, ("layers",)), (0.25, ("layers",)), (0.5, ("layers", "hidden"))):
        sizes = {"layers": source.num_layers, "hidden": source.hidden_size}
        limit = fraction * block_parameters(source)
        found = propose(source, block_parameters, limit, {name: sizes[name] for name in fixed})
        if found is not None:
            shapes.append(config_of(found.shape, source))
    deep = BLOCK_BYTES * source.num_layers // _block_bytes(source, itemsize)
    deep = max(2, min(source.num_layers, deep))
    depths = (max(1, deep // 4), deep)
    # Without a head of its own a model is smaller; decoding reads one head and one row either way.
    models = [
        replace(shape, num_layers=layers, tie_embeddings=True)
        for shape in shapes
        for layers in depths
    ]
    return [model for index, model in enumerate(models) if model not in models[:index]]


def decode_timer(device: torch.device, dtype: torch.dtype) -> Timer:
    """Times greedy decoding at batch 1 in plain transformers on `device`.

    The models take turns, so that load on the machine meets all alike; the median of up to ROUNDS
    turns of TOKENS tokens counts, after one turn that does not.
    """

    def timer(configs: Sequence[ModelConfig]) -> list[float]:
        # Nothing drawn here may move the random numbers of the run.
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            decoders = [_Decoder(config, device, dtype) for config in configs]
            times = _alternate(decoders)
        del decoders
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return times

    return timer


class _Decoder:
    """A model with random weights that has read POSITIONS tokens."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, DynamicCache

        self.name = f"{config.num_layers} x {config.hidden_size}"
        self.device = device
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config.to_hf(), dtype=dtype)
        self.model: Any = model.eval().to_empty(device=device)
        self.model.tie_weights()
        _fill(self.model)
        prompt = torch.ones(1, POSITIONS, dtype=torch.long, device=device)
        # transformers gave the argument a shorter name in version 5, and warns of the longer one.
        names = inspect.signature(self.model.forward).parameters
        cache = DynamicCache(config=self.model.config)
        self.cache = {"cache" if "cache" in names else "past_key_values": cache}
        self.model(input_ids=prompt, use_cache=True, **self.cache)
        self.token = prompt[:, :1]

    def decode(self) -> float:
        """Seconds until one more token is known."""
        start = time.perf_counter()
        output = self.model(input_ids=self.token, use_cache=True, **self.cache)
        output.logits.argmax().item()
        return time.perf_counter() - start


def _fill(model: torch.nn.Module) -> None:
    """Writes random weights. Memory that was never written is mapped to one page and reads faster
    than any weight; drawing each value of a large model would take minutes."""
    generator = torch.Generator().manual_seed(0)
    tile = torch.empty(_TILE).normal_(0.0, 0.02, generator=generator)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), _TILE):
            part = flat[start : start + _TILE]
            part.copy_(tile[: part.numel()])
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.fill_(1.0)


def _alternate(decoders: Sequence[_Decoder]) -> list[float]:
    """Median seconds per token of each decoder."""
    seconds: list[list[float]] = [[] for _ in decoders]
    start = time.perf_counter()
    with Progress("measure decoding", total=(ROUNDS + 1) * len(decoders), unit="turn") as bar:
        for turn in range(ROUNDS + 1):
            if turn > 2 and time.perf_counter() - start > SECONDS:
                break
            for decoder, times in zip(decoders, seconds, strict=True):
                decoder.decode()
                found = [decoder.decode() for _ in range(TOKENS - 1)]
                if turn > 0:
                    times += found
                bar.update(1, model=decoder.name)
    return [statistics.median(times) for times in seconds]
