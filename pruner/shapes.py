"""Target shapes: presets, parsing and the rules a shape must meet before any weight is read.

A shape is uniform: every layer of the target has the same sizes, except that some blocks may lack
attention or the feed-forward layer. Head dim and vocabulary are never pruned. Presets are the sizes
of Sheared LLaMA (arXiv 2310.06694, appendix D) for a LLaMA-2-7B source, and those of Pythia-160m
(arXiv 2304.01373, table 1) for a Pythia-410m source.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace

from data.errors import InputError
from trainer.models.config import ModelConfig
from trainer.models.layer_sizes import LayerSizes


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that pruning can change, plus the head dim that it cannot."""

    layers: int
    """Decoder blocks."""
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Query heads per block."""
    kv_heads: int
    """Key/value heads per block; each serves heads / kv_heads query heads."""
    head_dim: int
    """Channels per head; the same in source and target."""
    ffn: int
    """Channels of a feed-forward layer; where they differ, the mean."""
    attention_layers: int | None = None
    """Blocks with attention, where others lack it; None: all have it."""
    mlp_layers: int | None = None
    """Blocks with a feed-forward layer, where others lack it; None: all have it."""

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def describe(self) -> str:
        """The shape in the notation of --target."""
        apart = [key for key, name in _APART.items() if getattr(self, name) is not None]
        return ",".join(f"{key}={self.size(key)}" for key in [*_FIELDS, *apart])

    def to_json(self) -> dict[str, int]:
        """The sizes by field; those of layers apart only where blocks lack some."""
        return {name: size for name, size in asdict(self).items() if size is not None}

    def size(self, key: str) -> int:
        """The size that --target calls `key`."""
        size: int | None = getattr(self, (_FIELDS | _APART)[key])
        return self.layers if size is None else size

    @property
    def even(self) -> bool:
        """Whether all blocks have both layers."""
        return self.attention_layers is None and self.mlp_layers is None


_FIELDS = {
    "layers": "layers",
    "hidden": "hidden",
    "heads": "heads",
    "kv-heads": "kv_heads",
    "ffn": "ffn",
}

_APART = {"attention-layers": "attention_layers", "mlp-layers": "mlp_layers"}
"""Sizes that are not learned: docs/decisions/0021."""


@dataclass(frozen=True, slots=True)
class PresetSource:
    """The model that presets are made for."""

    description: str
    head_dim: int


_LLAMA_2_7B = PresetSource(
    "LLaMA-2-7B (layers=32,hidden=4096,heads=32,kv-heads=32,ffn=11008, head dim 128)", 128
)
_PYTHIA_410M = PresetSource(
    "Pythia-410m (layers=24,hidden=1024,heads=16,kv-heads=16,ffn=4096, head dim 64)", 64
)
PRESETS: dict[str, dict[str, int]] = {
    "1.3b": {"layers": 24, "hidden": 2048, "heads": 16, "ffn": 5504},
    "2.7b": {"layers": 32, "hidden": 2560, "heads": 20, "ffn": 6912},
    "370m": {"layers": 24, "hidden": 1024, "heads": 8, "ffn": 2816},
    "pythia-160m": {"layers": 12, "hidden": 768, "heads": 12, "ffn": 3072},
}
PRESET_SOURCES = dict.fromkeys(PRESETS, _LLAMA_2_7B) | {"pythia-160m": _PYTHIA_410M}


def shape_of(config: ModelConfig) -> Shape:
    """The prunable sizes of a model."""
    attention, feeding = (
        sum(bool(sizes[position]) for sizes in config.blocks) for position in (0, 2)
    )
    return Shape(
        layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        ffn=sum(sizes.intermediate_size for sizes in config.blocks) // max(1, feeding),
        attention_layers=None if attention == config.num_layers else attention,
        mlp_layers=None if feeding == config.num_layers else feeding,
    )


def require_even(model: ModelConfig, name: str) -> None:
    """Raises InputError for the source called `name` whose blocks differ in size: it cannot be
    pruned."""
    if model.layer_sizes is not None:
        raise InputError(
            f"--source {name}: its blocks differ in size already, and only models of even blocks "
            "can be pruned; name the model that it was cut from"
        )


def config_of(shape: Shape, source: ModelConfig) -> ModelConfig:
    """The architecture of `source` in another shape; where it leaves open which blocks lack a
    layer, the last ones lack attention, and the first ones the feed-forward layer."""
    attends, feeds = shape.size("attention-layers"), shape.size("mlp-layers")
    sizes = [
        LayerSizes(
            shape.heads if index < attends else 0,
            shape.kv_heads if index < attends else 0,
            shape.ffn if index >= shape.layers - feeds else 0,
        )
        for index in range(shape.layers)
    ]
    return replace(
        source,
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        layer_sizes=None if shape.even else tuple(sizes),
    )


def parse_target(text: str, source: Shape, *, apart: bool = False) -> Shape:
    """Read `1.3b` or `layers=24,hidden=432,heads=6,kv-heads=2,ffn=1152` and validate it.

    A key that is left out keeps the source's size; without kv-heads, a source that has one KV head
    per query head keeps it so. `apart` allows attention-layers and mlp-layers. Raises InputError
    naming value, limit and fix.
    """
    sizes = parse_sizes(text, apart=apart)
    preset = PRESET_SOURCES.get(text.strip().lower())
    if preset is None:
        target = _complete(sizes, source)
        validate(target, source)
        return target
    if source.head_dim != preset.head_dim:
        reason = f"its head dim {preset.head_dim} is not the source's"
        raise _preset_error(text, preset, source, reason)
    target = _complete(sizes, source)
    try:
        validate(target, source)
    except InputError as error:
        raise _preset_error(text, preset, source, str(error)) from None
    return target


def parse_default(text: str, default: str, source: Shape) -> Shape:
    """`parse_target` for a command whose own default may not fit the source that was given."""
    try:
        return parse_target(text, source)
    except InputError:
        if text != default:
            raise
        raise InputError(
            f"the default --target {text} does not fit this source ({source.describe()}): give "
            f"one that does, for example --target {example_shape(source)}"
        ) from None


def validate(target: Shape, source: Shape) -> None:
    """Refuse a target that no choice of units of the source can meet. Raises InputError."""
    check_sizes({key: target.size(key) for key in _FIELDS | _APART}, source)
    if target.head_dim != source.head_dim:
        raise InputError(
            f"target head dim {target.head_dim} differs from the source's {source.head_dim}: "
            "head dim is never pruned, leave it as it is"
        )
    _validate_heads(target, source)
    if target == source:
        raise InputError(
            f"target {target.describe()} is the source's own shape, so there is nothing to prune: "
            "make at least one of its sizes smaller"
        )


def check_sizes(sizes: Mapping[str, int], source: Shape) -> None:
    """Raises InputError unless each size, by its name in --target, is at least 1 and at most the
    source's."""
    for key, size in sizes.items():
        limit = source.size(key)
        if not 1 <= size <= limit:
            fix = f"use for example {key}=1"
            if size > 0:
                fix = f"use a smaller number, or {key}={limit} to keep all"
            raise InputError(
                f"target {key}={size} is outside 1..{limit} (the source has {limit}): "
                f"pruning only removes units, {fix}"
            )


def _validate_heads(target: Shape, source: Shape) -> None:
    heads, kv_heads = target.heads, target.kv_heads
    if heads % kv_heads or target.group > source.group:
        fitting = range(kv_heads, kv_heads * source.group + 1, kv_heads)
        # With the source's own number there may be nothing left to prune.
        allowed = [n for n in fitting if replace(target, heads=n) != source] or fitting
        reason = (
            f"is not a multiple of its {kv_heads} KV heads (kv-heads)"
            if heads % kv_heads
            else f"needs {target.group} query heads for each of its {kv_heads} KV heads (kv-heads)"
        )
        raise InputError(
            f"target heads={heads} {reason}; every KV head must keep the same number of query "
            f"heads, 1..{source.group} as in the source: use heads={_nearest(heads, allowed)}, "
            "or change kv-heads"
        )


def parse_sizes(text: str, *, apart: bool = False) -> dict[str, int]:
    """The sizes that `text` names; needs no source. Raises InputError for malformed text."""
    known = _FIELDS | (_APART if apart else {})
    preset = PRESETS.get(text.strip().lower())
    if preset is not None:
        return dict(preset)
    sizes: dict[str, int] = {}
    for pair in text.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        key = key.lower().replace("_", "-")
        if key in PRESETS:
            raise InputError(
                f"target {text!r}: a preset stands alone, because {key} fixes every size: give "
                f"--target {key}, or the sizes without it"
            )
        if key in _APART and not apart:
            raise InputError(
                f"target {pair.strip()!r}: attention and feed-forward layers are not removed apart "
                "here; use layers=, which removes whole blocks, or `shorn shorten --units "
                "attention` (or feed-forward, or both)"
            )
        if not equals or key not in known:
            raise InputError(
                f"target {text!r}: {pair.strip()!r} is neither a preset ({', '.join(PRESETS)}) nor "
                f"key=size with a key of {', '.join(_FIELDS)}: write for example "
                "layers=24,hidden=2048,heads=16,ffn=5504, or a budget: params=1.3b or speedup=2"
            )
        if key in sizes:
            raise InputError(f"target {text!r} gives {key} twice: give each size once")
        try:
            sizes[key] = int(value)
        except ValueError:
            raise InputError(
                f"target {key}={value!r} is not a whole number: write for example {key}=8"
            ) from None
    return sizes


def _complete(sizes: dict[str, int], source: Shape) -> Shape:
    complete = {field.name: getattr(source, field.name) for field in fields(Shape)}
    complete |= {(_FIELDS | _APART)[key]: size for key, size in sizes.items()}
    if "kv-heads" not in sizes and source.kv_heads == source.heads:
        complete["kv_heads"] = complete["heads"]
    return Shape(**complete)


def _preset_error(name: str, preset: PresetSource, source: Shape, reason: str) -> InputError:
    return InputError(
        f"target preset {name} is made for {preset.description} and does not fit this source "
        f"({source.describe()}, head dim {source.head_dim}): {reason}. Give the sizes instead, "
        f"for example --target {example_shape(source)}, or a budget: --target params=N with fewer "
        "parameters than the source has"
    )


def example_shape(source: Shape) -> str:
    """A valid shape of about three quarters of the source's sizes, as wide as its heads together
    where the source is (GPT-NeoX requires it)."""
    step = 1 if source.kv_heads == source.heads else source.kv_heads
    heads = max(step, source.heads * 3 // 4 // step * step)
    hidden = heads * source.head_dim
    if source.hidden != source.heads * source.head_dim:
        hidden = _nearest(source.hidden * 3 // 4, range(heads, source.hidden + 1, heads))
    layers = max(1, source.layers * 3 // 4)
    example = _complete(
        {"layers": layers, "hidden": hidden, "heads": heads, "ffn": max(1, source.ffn * 3 // 4)},
        source,
    )
    return example.describe()


def _nearest(value: int, allowed: Iterable[int]) -> int:
    return min(allowed, key=lambda size: (abs(size - value), -size))
