"""Units that another pruned model keeps: of a run of shearing, or of a model cut elsewhere.

A run has written down what it kept. In a model that was cut elsewhere, units are found by their
weights, which must be the source's still: embedding columns give the hidden dimensions, and rows
of the reading matrices the channels and heads.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data.errors import InputError
from data.places import what_is
from data.records import read_json
from pruner.config import ShearConfig
from pruner.shapes import Shape, shape_of
from pruner.units import APART, measured_sizes, unit_sizes
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.families import Role
from trainer.models.hf import load_config, load_model
from trainer.models.sources import weights_fingerprint
from trainer.models.weights import stored_dtype
from trainer.output import run_of
from trainer.verdict import SHEARED, stages_of

MASKS = "masks.safetensors"
COMPARED_IDS = 4096
"""Rows of the embedding by which hidden dimensions are told apart."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The units to keep."""

    shape: Shape
    """What they amount to."""
    z: dict[str, Tensor]
    """[rows, units] of all kinds, or only of those that are decided, fp64: 1 for a kept unit, 0 for
    another."""
    rotation: Tensor | None
    """[d, d] fp64: the basis in which hidden dimensions are kept; None: the source's own."""
    told: Mapping[str, Any] | None = None
    """What the report says of how they were found, `init` (the measure) and `search` among it, if
    that is more than where they come from."""
    options: Mapping[str, Any] | None = None
    """Options that decided it, as the run's identity names them."""
    noted_key: str | None = None
    """The key of a finished run's, of which nothing else is needed."""

    @property
    def complete(self) -> bool:
        """Whether the units of all kinds are decided; others are still to be measured."""
        return self.z.keys() >= measured_sizes(self.shape).keys()

    @property
    def key(self) -> str:
        """Tells selections apart."""
        if self.noted_key is not None:
            return self.noted_key
        digest = hashlib.sha256()
        for name, values in sorted(self.z.items()):
            digest.update(name.encode() + values.numpy().tobytes())
        if self.rotation is not None:
            digest.update(self.rotation.float().numpy().tobytes())
        if self.told is not None:
            digest.update(json.dumps([self.told["init"], self.told["search"]]).encode())
        return digest.hexdigest()[:16]


def read_selection(path: str, source: Path, model: ModelConfig) -> Selection:
    """The units of `source` (its folder, and its architecture `model`) that `path` keeps: the
    output of a run of shearing, or a Hugging Face folder.

    Raises InputError where they are not units of this source.
    """
    folder = Path(path)
    run = folder if (folder / MASKS).exists() else run_of(folder)
    if (run / MASKS).exists():
        return _of_run(run, source, model)
    for trained in (folder, run):
        if any((trained / name).is_file() for name in ("cpt.json", "finetune.json")):
            raise _trained(path, trained)
    if (folder / "shear.json").is_file():
        raise InputError(
            f"--selection {path}: is a finished run, but its {MASKS} is gone, which says what was "
            "kept; put the file back, or name its model folder if its weights were only cut"
        )
    if not (folder / "config.json").exists():
        found = what_is(folder)
        raise InputError(
            f"--selection {path}: is neither a finished run of shorn shear nor a Hugging Face "
            f"folder{found and f' (it is {found})'}; name one of these"
        )
    return _of_model(folder, source, model)


def selected(config: ShearConfig, selection: Selection) -> ShearConfig:
    """`config` with the shape and basis of `selection`. Raises InputError where it asks for others.

    A target left at its default does not count as asked for.
    """
    basis: Literal["principal", "source"] = "source" if selection.rotation is None else "principal"
    if config.masks.basis not in (None, basis):
        raise InputError(
            f"--basis {config.masks.basis}: --selection {config.selection} keeps dimensions of the "
            f"basis {basis}; leave --basis out"
        )
    shape = selection.shape.describe()
    default = ShearConfig.__dataclass_fields__["target"].default
    if config.target not in (default, shape):
        raise InputError(
            f"--target {config.target}: --selection {config.selection} keeps {shape}; leave "
            "--target out"
        )
    init = config.masks.init if config.masks.init not in (None, "flat") else "importance"
    masks = replace(config.masks, basis=basis, init=init)
    return replace(config, target=shape, masks=masks)


def _trained(path: str, run: Path) -> InputError:
    """Names the run of shearing that the model of `run`, one that trained it further, began as,
    which knows its units."""
    sheared = next((stage.model for stage in stages_of(run) if stage.name == SHEARED), "")
    command = "cpt" if (run / "cpt.json").is_file() else "finetune"
    fix = f"a run of shorn shear{sheared and f', such as the one it came from: {sheared}'}"
    return InputError(
        f"--selection {path}: is a run of shorn {command}, whose weights no longer tell what was "
        f"kept; name {fix}"
    )


def _of_run(run: Path, source: Path, model: ModelConfig) -> Selection:
    path = run / MASKS
    fix = "name a finished run of shorn shear from this --source"
    report = read_json(run / "shear.json", fix, keys={"source_weights": str})
    if report["source_weights"] != weights_fingerprint(source):
        # A folder of the hub's cache tells the commit.
        then = f" ({report['source']})" if report.get("source") else ""
        raise InputError(
            f"--selection {run}: was cut from another model than --source{then}; {fix}"
        )
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); {fix}") from error
    z = {}
    for name, size in unit_sizes(shape_of(model)).items():
        if name in APART and f"z.{name}" not in stored:
            continue
        found = stored.get(f"z.{name}", torch.ones(size))
        if tuple(found.shape) != size:
            raise InputError(
                f"{path}: z.{name} is {list(found.shape)}, and the source has {list(size)}; {fix}"
            )
        z[name] = (found > 0).double()
    basis = stored.get("basis")
    return Selection(_shape(z, model), z, None if basis is None else basis.double())


def _of_model(folder: Path, source: Path, model: ModelConfig) -> Selection:
    pruned_config = load_config(folder)
    if pruned_config.layer_sizes is not None:
        raise InputError(
            f"--selection {folder}: its blocks differ in size, and are not matched by their "
            "weights; name the run of shorn that made it"
        )
    for name in ("family", "vocab_size", "head_dim", "tie_embeddings"):
        own, other = getattr(model, name), getattr(pruned_config, name)
        if own != other:
            raise InputError(
                f"--selection {folder}: {name} is {other!r}, and {own!r} in --source; name a model "
                "that was cut from it"
            )
    # What 16 bits round to the same is hardly another row. A cut in fp16 was rounded so already.
    dtype = torch.float16 if stored_dtype(folder) == "float16" else torch.bfloat16
    pruned, whole = (load_model(path, dtype=dtype) for path in (folder, source))
    return Matcher(whole, pruned, folder).match()


def _shape(z: dict[str, Tensor], model: ModelConfig) -> Shape:
    """The shape of what is kept, which must be uniform (every row keeps as many units)."""
    counts = {name: int(values[0].sum()) for name, values in z.items()}
    kept = {name: int((z["layer"][0] * z[name][0]).sum()) for name in APART if name in z}
    attention, feeding = (kept.get(name, counts["layer"]) for name in APART)
    return replace(
        shape_of(model),
        layers=counts["layer"],
        attention_layers=None if attention == counts["layer"] else attention,
        mlp_layers=None if feeding == counts["layer"] else feeding,
        hidden=counts["hidden"],
        heads=counts["kv_group"] * counts["query_head"],
        kv_heads=counts["kv_group"],
        # Where blocks differ, their mean.
        ffn=int((z["layer"][0] @ z["intermediate"].sum(-1)).item()) // counts["layer"],
    )


class Matcher:
    """Finds what a cut model kept of its source, block by block."""

    def __init__(self, source: CausalLM, pruned: CausalLM, folder: Path) -> None:
        self.source = source
        self.pruned = pruned
        self.folder = folder
        self.names = source.names
        self.hidden = torch.arange(source.config.hidden_size)

    def match(self) -> Selection:
        """The selection. Raises InputError for what is not found."""
        embeddings = [
            model.get_submodule(self.names.embedding).get_parameter("weight")[:COMPARED_IDS].t()
            for model in (self.source, self.pruned)
        ]
        found = self._indices(embeddings[0], embeddings[1], "hidden dimensions")
        self.hidden = torch.tensor(found)
        config, kept = self.source.config, self.pruned.config
        sizes = measured_sizes(shape_of(config))
        targets = {name: size[1] for name, size in measured_sizes(shape_of(kept)).items()}
        # Rows of what is removed keep as many units as all others, whichever.
        z = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        for name, values in z.items():
            if name not in ("hidden", "layer"):
                values[:, : targets[name]] = 1
        z["hidden"][0, found] = 1
        start = 0
        for number, block in enumerate(self.pruned.blocks):
            index = self._block(number, block, start)
            start = index + 1
            z["layer"][0, index] = 1
            self._units(z, index, number, block)
        return Selection(_shape(z, config), z, None)

    def _block(self, number: int, block: nn.Module, start: int) -> int:
        """Number of the source's block that `block` was, from `start` on."""
        wanted = _keys(self._weight(block, Role.CHANNELS)[:1])
        for index in range(start, len(self.source.blocks)):
            rows = self._weight(self.source.blocks[index], Role.CHANNELS)[:, self.hidden]
            if wanted[0] in _keys(rows):
                return index
        raise self._missing(f"block {number}")

    def _units(self, z: dict[str, Tensor], index: int, number: int, block: nn.Module) -> None:
        """Marks the kept units of a block of the source."""
        channels = self._kept(index, block, Role.CHANNELS, 1, f"channels of block {number}")
        z["intermediate"][index] = _marks(channels, z["intermediate"].shape[1])
        config = self.source.config
        group = config.num_heads // config.num_kv_heads
        width = config.head_dim
        if config.traits.fused_qkv:
            queries = self._kept(index, block, Role.FUSED, 3 * width, f"heads of block {number}")
            keys = queries
        else:
            queries = self._kept(index, block, Role.QUERIES, width, f"heads of block {number}")
            keys = self._kept(index, block, Role.KEYS, width, f"KV heads of block {number}")
        z["kv_group"][index] = _marks(keys, config.num_kv_heads)
        for key in keys:
            own = [query - key * group for query in queries if query // group == key]
            if len(own) * len(keys) != len(queries):
                raise InputError(
                    f"--selection {self.folder}: KV head {key} of block {number} keeps {len(own)} "
                    f"of its query heads, and others more or fewer; each must keep as many"
                )
            z["query_head"][index * config.num_kv_heads + key] = _marks(own, group)

    def _kept(self, index: int, block: nn.Module, role: Role, size: int, what: str) -> list[int]:
        """Numbers of the units, `size` rows each, of block `index` that `block` keeps."""
        rows = self._weight(self.source.blocks[index], role)[:, self.hidden]
        own = self._weight(block, role)
        units = [w.reshape(len(w) // size, -1) for w in (rows, own)]
        return self._indices(units[0], units[1], what)

    def _indices(self, source: Tensor, pruned: Tensor, what: str) -> list[int]:
        """Where the rows of `pruned` are among those of `source`, in ascending order."""
        # The first place behind the last one: rows may repeat, such as zeros of dead channels.
        places = iter(enumerate(_keys(source)))
        found = []
        for key in _keys(pruned):
            index = next((index for index, other in places if other == key), None)
            if index is None:
                raise self._missing(what)
            found.append(index)
        return found

    def _weight(self, block: nn.Module, role: Role) -> Tensor:
        return block.get_submodule(self.names.with_role(role)).get_parameter("weight").detach()

    def _missing(self, what: str) -> InputError:
        return InputError(
            f"--selection {self.folder}: its {what} are not the source's, in their order: it was "
            "trained or changed since it was cut, or cut from another model; name a model whose "
            "weights are still those of --source, or a run of shorn shear"
        )


def _keys(rows: Tensor) -> list[bytes]:
    """What tells rows [n, m] of bf16 or fp16 apart."""
    values: Any = rows.contiguous().view(torch.int16).numpy()
    return [row.tobytes() for row in values]


def _marks(indices: Iterable[int], count: int) -> Tensor:
    marks = torch.zeros(count, dtype=torch.float64)
    marks[list(indices)] = 1
    return marks
