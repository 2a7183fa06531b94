"""Targets given as a budget: the shape that spends it with the source's proportions.

`--target params=70m` and `--target speedup=2` leave the sizes open. Among the valid shapes whose
cost (parameters, or predicted seconds per token) stays within the limit and uses at least 97% of
it, the one nearest to the source is proposed. With r_x = log(source size / target size), the
distance is

    1.6 r_layers^2 + r_hidden^2
        + 20 (r_ffn - r_hidden)^2 + 10 (r_heads - r_hidden)^2 + 2 (r_kv - r_hidden)^2

so that feed-forward channels and heads shrink with the width, and depth shrinks less than width.
The weights 1.6 and 20 were chosen on a coarse grid, so that the sizes of the three published shapes
of Sheared LLaMA (arXiv 2310.06694, appendix D) give, from LLaMA-2-7B, the shapes nearest to theirs.
Heads count less and KV heads least: a model has few of them, and could not keep the proportions of
the rest otherwise. Where the steps between shapes are so coarse that none uses 97% of the limit,
the nearest of the largest (within 3% of the largest) is proposed.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.errors import InputError
from pruner.shapes import PRESETS, Shape, check_sizes, config_of, parse_sizes, shape_of
from trainer.models.config import ModelConfig

PARAMETERS = "params"
BLOCK_PARAMETERS = "params-non-embedding"
SPEEDUP = "speedup"
BUDGETS = (PARAMETERS, BLOCK_PARAMETERS, SPEEDUP)
SHARE = 0.97
"""Part of the budget that a proposal uses at least, where the steps between shapes allow it."""
DEPTH_WEIGHT = 1.6
FFN_WEIGHT = 20.0
HEADS_WEIGHT = 10.0
KV_WEIGHT = 2.0
MULTIPLES = (128, 64, 32, 16, 8)
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}

Cost = Callable[[ModelConfig], float]
"""What a model spends of the budget: affine in its layers, and each layer's in its channels."""
_Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Budget:
    """What --target asks for when it does not name a shape."""

    text: str
    """As the user wrote it, without spaces."""
    kind: str
    """One of BUDGETS."""
    amount: float
    """Parameters, or the source's seconds per token over the target's."""
    fixed: Mapping[str, int]
    """Sizes that were given too, by their name in --target."""
    align: int | None = None
    """What hidden and feed-forward sizes must be multiples of; None: `multiple` decides."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A valid shape within a budget."""

    shape: Shape
    cost: float
    """In the unit of the limit."""
    limit: float


def parse_budget(text: str) -> Budget | None:
    """The budget in the text of --target; None for a preset or an explicit shape.

    A number of parameters alone, such as 70m, is one too, unless a preset is called so. Needs no
    source. Raises InputError for a malformed amount, for two budgets, and for sizes
    beside the budget that are malformed.
    """
    pairs = [_spelled(pair.strip()) for pair in text.split(",")]
    split = {pair: _key(pair) in BUDGETS for pair in pairs}
    budgets = [pair for pair in pairs if split[pair]]
    if not budgets:
        return None
    if len(budgets) > 1:
        raise InputError(f"target {text!r} gives {len(budgets)} budgets: give one, {budgets[0]}")
    others = [pair for pair in pairs if not split[pair]]
    for other in others:
        if other.lower() in PRESETS:
            raise InputError(
                f"target {text!r}: the preset {other} fixes every size, which leaves nothing to "
                f"{budgets[0]}: give one of the two"
            )
    kind, value = _key(budgets[0]), budgets[0].partition("=")[2].strip()
    amount = _speedup(value) if kind == SPEEDUP else _parameters(kind, value)
    fixed = parse_sizes(",".join(others)) if others else {}
    return Budget("".join(",".join(pairs).lower().split()), kind, amount, fixed)


def _spelled(pair: str) -> str:
    """`pair`, but params=70m for 70m."""
    bare = re.fullmatch(r"\d+(\.\d+)?[kmb]", pair.lower())
    return f"{PARAMETERS}={pair}" if bare and pair.lower() not in PRESETS else pair


def _key(pair: str) -> str:
    return pair.partition("=")[0].strip().lower().replace("_", "-")


def number_of_parameters(text: str) -> int:
    """What 70m, 1.3b or 70000000 stand for; 0 where `text` is no such number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text.lower().replace("_", ""))
    number = float(match[1]) * _SUFFIXES[match[2]] if match else 0.0
    return round(number) if math.isfinite(number) else 0


def _parameters(kind: str, value: str) -> int:
    amount = number_of_parameters(value)
    if amount < 1:
        raise InputError(
            f"target {kind}={value!r} is not a number of parameters: write for example "
            f"{kind}=70m, {kind}=1.3b or {kind}=70000000"
        )
    return amount


def _speedup(value: str) -> float:
    try:
        amount = float(value)
    except ValueError:
        amount = math.nan
    if not math.isfinite(amount):
        raise InputError(f"target speedup={value!r} is not a number: write for example speedup=2")
    if amount <= 1:
        raise InputError(
            f"target speedup={value} asks for nothing faster than the source; it must be above 1: "
            "write for example speedup=2"
        )
    return amount


def multiple(source: Shape) -> int:
    """What hidden and feed-forward sizes of a proposal are multiples of: the largest of MULTIPLES
    that is at most 1/16 of the source's width (128 is a tensor-core tile; small models need finer
    steps)."""
    return next((size for size in MULTIPLES if size * 16 <= source.hidden), MULTIPLES[-1])


def propose(
    source: ModelConfig,
    cost: Cost,
    limit: float,
    fixed: Mapping[str, int] | None = None,
    align: int | None = None,
) -> Proposal | None:
    """The shape nearest to `source` (see the module's docstring) that costs at most `limit`.

    `fixed` gives sizes that the shape must have, by their name in --target, `align` what its hidden
    and feed-forward sizes are multiples of. None when no valid shape costs so little. Raises
    InputError when no valid shape has the fixed sizes.
    """
    space = _Space(source, cost, fixed or {}, align)
    floor = space.floor(limit)
    if floor is None:
        return None
    nearest = space.first(space.nearest(floor, limit))
    assert nearest is not None
    return Proposal(*nearest, limit)


def alternatives(
    source: ModelConfig, cost: Cost, limit: float, fixed: Mapping[str, int], align: int | None
) -> list[tuple[Shape, float]]:
    """Shapes for every depth that the budget allows, with their costs: what `propose` gives; the
    same half-way to the source's width; and with the source's width and heads, so that depth and
    channels alone are cut."""
    space = _Space(source, cost, fixed, align)
    shape = space.shape
    floor = space.floor(limit)
    found: dict[Shape, float] = {}
    if floor is None:
        return []
    for layers in space.options["layers"]:
        nearest = space.first(space.nearest(floor, limit, layers=layers))
        if nearest is not None:
            found |= dict([nearest])
            widths = [size for size in space.options["hidden"] if size > nearest[0].hidden]
            middle = widths[len(widths) // 2] if len(widths) > 1 else None
            between = space.nearest(floor, limit, layers=layers, hidden=middle)
            other = space.first(between) if middle else None
            found |= dict([other] if other else [])
        uncut = [base for base in space.bases if base == replace(shape, hidden=base.hidden)]
        widest = max(uncut, key=lambda base: base.hidden, default=None)
        if widest is not None:
            other = space.first(space.nearest(floor, limit, layers=layers, only=widest))
            found |= dict([other] if other else [])
    return list(found.items())


def smallest(
    source: ModelConfig,
    cost: Cost,
    fixed: Mapping[str, int] | None = None,
    align: int | None = None,
) -> tuple[Shape, float]:
    """The valid shape of least cost, and its cost. Raises InputError as `propose`."""
    space = _Space(source, cost, fixed or {}, align)
    found = space.first(space.cheapest())
    assert found is not None
    return found


_Candidate = tuple[tuple[float, ...], Shape, float]
"""What it is sorted by, the shape, its cost."""


class _Space:
    """All shapes of a source, as a plane of depths and channels for each width and heads.

    A base fixes the width and the heads. The cost is affine in the layers, and a layer's in its
    channels, so four costs give those of the base's whole plane, which NumPy then searches at once.
    For example SmolLM2-135M (30 layers, width 576, 9 heads, 3 KV heads, 1536 channels): 18 widths
    in steps of 32 with 9 choices of heads are 162 bases, and each has a plane of 30 depths by 48
    numbers of channels: 233,280 shapes at 648 evaluations of the cost.
    """

    def __init__(
        self, source: ModelConfig, cost: Cost, fixed: Mapping[str, int], align: int | None
    ) -> None:
        self.source = source
        self.shape = shape_of(source)
        self.cost = cost
        self._expressible: dict[tuple[int, int, int], bool] = {}
        check_sizes(fixed, self.shape)
        step = align or multiple(self.shape)
        steps = {"layers": 1, "hidden": step, "heads": 1, "kv-heads": 1, "ffn": step}
        self.options = {
            key: [fixed[key]] if key in fixed else _multiples(step, self.shape.size(key))
            for key, step in steps.items()
        }
        for key in ("hidden", "ffn") if align else ():
            if key not in fixed:
                self.options[key] = list(range(step, self.shape.size(key) + 1, step))
                if not self.options[key]:
                    size = self.shape.size(key)
                    raise InputError(
                        f"--align {step}: the source's {key} is {size}, below any multiple of it; "
                        f"use --align {size} or less, or give {key}={size} beside the budget"
                    )
        self.layers = np.array(self.options["layers"], dtype=np.float64)
        self.channels = np.array(self.options["ffn"], dtype=np.float64)
        self.bases = {base: self._coefficients(base) for base in self._bases()}
        if not any(self.expressible(base) for base in self.bases):
            sizes = ",".join(f"{key}={size}" for key, size in fixed.items())
            aligned = f" in multiples of {align} (--align)" if align else ""
            raise InputError(
                f"target: no valid shape of this source ({self.shape.describe()}) has "
                f"{sizes or 'such sizes'}{aligned}: fix fewer sizes beside the budget"
            )

    def _bases(self) -> Iterator[Shape]:
        """One shape per width and number of heads, with the source's depth and channels."""
        for hidden in self.options["hidden"]:
            for kv_heads in self.options["kv-heads"]:
                for heads in self.options["heads"]:
                    if heads % kv_heads == 0 and heads // kv_heads <= self.shape.group:
                        yield replace(self.shape, hidden=hidden, heads=heads, kv_heads=kv_heads)

    def expressible(self, shape: Shape) -> bool:
        """Whether the family's config can hold this width with these heads."""
        key = (shape.hidden, shape.heads, shape.kv_heads)
        if key not in self._expressible:
            try:
                config_of(shape, self.source).to_hf()
                self._expressible[key] = True
            except InputError:
                self._expressible[key] = False
        return self._expressible[key]

    def first(self, candidates: Iterable[_Candidate]) -> tuple[Shape, float] | None:
        """The first candidate, in sorted order, that the family's config can hold."""
        for _, shape, cost in sorted(candidates, key=lambda candidate: candidate[0]):
            if self.expressible(shape):
                return shape, cost
        return None

    def floor(self, limit: float) -> float | None:
        """Least cost that a proposal within `limit` has; None where no valid shape costs so
        little. Where the steps between shapes are so coarse that none uses the SHARE of the limit,
        it is the SHARE of what the largest costs."""
        largest = self.first(self.most_expensive(limit))
        if largest is None:
            return None
        return SHARE * (limit if largest[1] >= SHARE * limit else largest[1])

    def most_expensive(self, limit: float) -> Iterator[_Candidate]:
        """Per width and heads, the shape of highest cost within `limit`."""
        for base in self.bases:
            costs = self._costs(base)
            yield from self._best(base, np.where(costs <= limit, -costs, np.inf), costs)

    def nearest(
        self,
        floor: float,
        limit: float,
        *,
        layers: int | None = None,
        hidden: int | None = None,
        only: Shape | None = None,
    ) -> Iterator[_Candidate]:
        """Per width and heads, the shape nearest to the source with a cost in [floor, limit]; of
        that depth, of that width, or `only` with that base, if they are given."""
        for base in self.bases if only is None else [only]:
            if hidden not in (None, base.hidden):
                continue
            costs = self._costs(base)
            allowed = (costs >= floor) & (costs <= limit)
            if layers is not None:
                allowed &= (self.layers == layers)[:, None]
            if allowed.any():
                distances = np.where(allowed, self._distances(base), np.inf)
                yield from self._best(base, distances, costs)

    def cheapest(self) -> Iterator[_Candidate]:
        """Per width and heads, the shape of lowest cost."""
        for base in self.bases:
            costs = self._costs(base)
            yield from self._best(base, costs, costs)

    def _best(self, base: Shape, scores: _Array, costs: _Array) -> Iterator[_Candidate]:
        """`base` in the depth and channels of lowest finite score; the larger wins a tie."""
        score = float(scores.min())
        if not math.isfinite(score):
            return
        row, column = np.argwhere(scores == score)[-1]
        shape = replace(base, layers=int(self.layers[row]), ffn=int(self.channels[column]))
        cost = float(costs[row, column])
        yield (score, -cost, -shape.hidden, -shape.heads, -shape.kv_heads), shape, cost

    def _coefficients(self, base: Shape) -> tuple[float, float, float]:
        """Cost of `base` without blocks, of a block with one channel, and of a further channel."""
        last = max(2, self.shape.ffn)

        def at(layers: int, ffn: int) -> float:
            return self.cost(config_of(replace(base, layers=layers, ffn=ffn), self.source))

        narrow, wide = at(2, 1) - at(1, 1), at(2, last) - at(1, last)
        return at(1, 1) - narrow, narrow, (wide - narrow) / (last - 1)

    def _costs(self, base: Shape) -> _Array:
        """Cost of `base` in every depth (rows) and number of channels (columns)."""
        outside, narrow, channel = self.bases[base]
        block = narrow + channel * (self.channels - 1)
        return np.asarray(outside + self.layers[:, None] * block[None, :])

    def _distances(self, base: Shape) -> _Array:
        """Distance from the source of `base` in every depth and number of channels."""
        source = self.shape
        hidden = math.log(source.hidden / base.hidden)
        heads = math.log(source.heads / base.heads) - hidden
        kv_heads = math.log(source.kv_heads / base.kv_heads) - hidden
        depth = np.log(source.layers / self.layers)[:, None]
        ffn = np.log(source.ffn / self.channels)[None, :] - hidden
        width = hidden**2 + FFN_WEIGHT * ffn**2 + HEADS_WEIGHT * heads**2 + KV_WEIGHT * kv_heads**2
        return np.asarray(width + DEPTH_WEIGHT * depth**2)


def _multiples(step: int, size: int) -> list[int]:
    """Multiples of `step` below `size`, and `size` itself."""
    return [*range(step, size, step), size]


def refuse_budget(option: str, sizes: str) -> None:
    """Raises InputError where `sizes` leave a shape open, which only pruner.shear resolves."""
    if parse_budget(sizes) is not None:
        raise budget_error(option, sizes)


def budget_error(option: str, text: str) -> InputError:
    """Says that `text` is a budget, and what to give instead."""
    return InputError(
        f"{option} {text!r}: budgets are resolved by pruner.shear only; give the sizes it prints"
    )
