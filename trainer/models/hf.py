"""Reads and writes Hugging Face model folders, straight into and out of FSDP shards."""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.errors import InputError, failure
from data.files import follow_umask, partial_path, replace_file, replace_folder
from data.manifest import ChatRecord
from data.records import read_json
from trainer.models import uneven
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.export import add_chat, copy_companions, widen
from trainer.models.families import Role
from trainer.models.layer_sizes import LayerSizes
from trainer.models.weights import (
    INDEX_FILE,
    SINGLE_FILE,
    names_remedy,
    open_tensors,
    original_dtype,
    other_class,
    tensor_files,
)
from trainer.parallel import local_region

SHARD_BYTES = 5 * 10**9
"""Largest safetensors file written, in bytes, as transformers does by default."""
# Checkpoints of old transformers versions store these buffers; they follow from the config.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".masked_bias")
_COMPARED_ROWS = 4096
"""Rows of head and embedding that are read at once to compare them."""


def load_config(path: Path) -> ModelConfig:
    """The architecture described by the config.json in folder `path`.

    Raises:
        InputError: the file is missing or not JSON, a value in it cannot be used, or the
            architecture is not supported.
    """
    file = path / "config.json"
    values = read_json(file, "give a folder with a Hugging Face model, fetched whole")
    try:
        return ModelConfig.from_hf(values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def load_model(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CausalLM:
    """The whole model of folder `path` on one device, in `dtype`.

    Raises:
        InputError: as load_config and load_sharded.
    """
    config = load_config(path)
    with torch.device("meta"):
        model = CausalLM(config).to(dtype)
    model.to_empty(device=device)
    load_sharded(model, path)
    return model


def check_weights(path: Path, config: ModelConfig) -> None:
    """Refuse a folder whose tensors are not those of `config`; loads none of them.

    Raises:
        InputError: as load_sharded.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    _stored_tensors(model, path)


@torch.no_grad()
def load_sharded(model: CausalLM, path: Path) -> None:
    """Fill a model's parameters from folder `path`; every rank reads only the rows it holds.

    Works on plain parameters and on the DTensors that fully_shard leaves (build on the meta device,
    shard, to_empty, then this). No collective is called. Values are converted to the parameters'
    dtype. With tied embeddings a stored head must equal the embedding.

    Raises:
        InputError: before anything is loaded, tensors are missing, unexpected or of another shape,
            the config ties embedding and head and the files do not, or the other way round; or a
            file is damaged.
    """
    expected = dict(model.named_parameters())
    for file, names in _stored_tensors(model, path).items():
        with open_tensors(file) as stored:
            for name, stored_name in names.items():
                local, region = local_region(expected[name])
                if local.numel():
                    local.copy_(stored.get_slice(stored_name)[region])


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is stored."""

    file: Path
    name: str
    """Its name there."""


def _stored_tensors(model: CausalLM, path: Path) -> dict[Path, dict[str, str]]:
    """For each file of folder `path` that holds tensors of `model`, the model's name and the stored
    name of each; all tensors are there, with the right shapes."""
    expected = dict(model.named_parameters())
    places = _places(model, path)
    _require_same_tie(model, places, path)
    if model.config.tie_embeddings:
        head = places.pop(f"{model.names.head}.weight", None)
        if head is not None:
            # As transformers, of which some programs store one name of the two, some the other.
            places.setdefault(f"{model.names.embedding}.weight", head)
    _require_same_names(expected, places, path, other_class(model.config.hf))
    by_file: dict[Path, dict[str, str]] = {}
    for name, place in places.items():
        by_file.setdefault(place.file, {})[name] = place.name
    for file, names in by_file.items():
        with open_tensors(file) as stored:
            for name, stored_name in names.items():
                tensor, wanted = stored.get_slice(stored_name), tuple(expected[name].shape)
                if tuple(tensor.get_shape()) != wanted:
                    rows = _vocabulary_rows(model, places)
                    raise InputError(_mixed(name, tuple(tensor.get_shape()), wanted, file, rows))
                if "F" not in tensor.get_dtype():
                    raise InputError(
                        f"{name} is of type {tensor.get_dtype()} in {file}, which holds no weights "
                        "of an unquantized model; fetch the file again, or the original"
                    )
    return by_file


def _vocabulary_rows(model: CausalLM, places: dict[str, _Place]) -> set[int]:
    """How many rows the stored embedding and head have."""
    rows = set()
    for module in (model.names.embedding, model.names.head):
        place = places.get(f"{module}.weight")
        if place is not None:
            with open_tensors(place.file) as stored:
                rows.add(int(stored.get_slice(place.name).get_shape()[0]))
    return rows


def _mixed(
    name: str, stored: tuple[int, ...], wanted: tuple[int, ...], file: Path, rows: set[int]
) -> str:
    """What a tensor of another shape than the config's means, and what helps; `rows` are those of
    embedding and head."""
    text = f"{name} has shape {stored} in {file}, but config.json gives {wanted}"
    if rows == {stored[0]} and stored[1:] == wanted[1:]:
        return (
            f"{text}: set vocab_size to {stored[0]} there if the model was given other ids "
            "(resize_token_embeddings), or fetch the config.json that was saved with these weights"
        )
    return f"{text}; the folder mixes two models: fetch config.json and weights from one place"


def _places(model: CausalLM, path: Path) -> dict[str, _Place]:
    """Where folder `path` stores what, by the model's names.

    A model that was saved without its head lacks the first part of every name ("model."), which
    transformers adds too.
    """
    stored = tensor_files(path)
    expected = {name for name, _ in model.named_parameters()}
    prefix = f"{model.names.blocks.partition('.')[0]}."
    places = {}
    for name, file in stored.items():
        if name.endswith(_IGNORED_SUFFIXES):
            continue
        bare = name not in expected and f"{prefix}{name}" in expected
        full = f"{prefix}{name}" if bare and f"{prefix}{name}" not in stored else name
        places[full] = _Place(file, name)
    return places


def _require_same_tie(model: CausalLM, places: dict[str, _Place], path: Path) -> None:
    """A stored head that differs from a tied embedding would be used by transformers, and a missing
    one drawn at random."""
    head, embedding = f"{model.names.head}.weight", f"{model.names.embedding}.weight"
    stored, tied = head in places, model.config.tie_embeddings
    if not tied and not stored and embedding in places:
        other = other_class(model.config.hf)
        if other is not None:
            raise InputError(_no_language_model(path, other))
        raise InputError(
            f"{path} stores no {head}, but its config.json does not tie it to the embedding: fetch "
            "the missing tensor, or set tie_word_embeddings to true there if the model shares them"
        )
    if tied and stored and embedding in places:
        own, shared = places[head], places[embedding]
        with open_tensors(own.file) as first, open_tensors(shared.file) as second:
            same = _same_values(first.get_slice(own.name), second.get_slice(shared.name))
        if not same:
            raise InputError(
                f"{path} stores a {head} other than {embedding}, but its config.json ties the two: "
                "set tie_word_embeddings to false there if the model has a head of its own"
            )


def _same_values(first: Any, second: Any) -> bool:
    """Whether two stored matrices are equal, without holding either."""
    if first.get_shape() != second.get_shape():
        return False
    rows = first.get_shape()[0]
    parts = (slice(start, start + _COMPARED_ROWS) for start in range(0, rows, _COMPARED_ROWS))
    return all(bool((first[part] == second[part]).all()) for part in parts)


def _no_language_model(where: Path, other: str) -> str:
    return (
        f"{where} holds a {other} (`architectures` in config.json), which has another head than a "
        "language model: give the model that it was made from, or another with a head of its own"
    )


def _require_same_names(
    expected: Iterable[str], found: Iterable[str], where: Path, other: str | None = None
) -> None:
    """`other` is `other_class` of the config."""
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    if not missing and not unexpected:
        return
    if other is not None:
        raise InputError(_no_language_model(where, other))
    parts = []
    for label, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{label}: {', '.join(names[:3])}{more}")
    raise InputError(
        f"the tensors of {where} do not fit its config ({'; '.join(parts)}); "
        f"{names_remedy(missing, unexpected)}"
    )


def save_model(
    config: ModelConfig,
    state: dict[str, Tensor] | Iterable[tuple[str, Tensor]],
    path: Path,
    tokenizer_from: Path | None = None,
    dtype: torch.dtype = torch.float32,
    chat: ChatRecord | None = None,
) -> ModelConfig:
    """Write a folder that plain transformers loads; it appears whole or not at all.

    Args:
        config: everything the tensors' shapes do not tell; sizes are taken from the tensors.
        state: full (not sharded) tensors by Hugging Face name; an iterator is consumed one tensor
            at a time, so that at most SHARD_BYTES are held.
        path: the folder, replaced if it exists.
        tokenizer_from: a model folder whose companions are copied (`export.companions`).
        dtype: dtype of the stored weights. Where the original's is another, config.json keeps its
            name as `original_dtype`.
        chat: how the model's conversations are written, as its tokenizer says then.

    Returns:
        The config as derived from the tensors.

    Raises:
        InputError: missing tensors or some that do not fit, a shape that transformers cannot
            express, values too large for `dtype`, or a failure to write.
    """
    path = path.absolute()
    _require_companions(tokenizer_from, path)
    temporary = path.with_name(f".{path.name}.partial")
    pairs = iter(state.items() if isinstance(state, dict) else state)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot create {path}: {failure(error)}") from error
    try:
        shapes = _write_tensors(pairs, temporary, dtype)
        derived = _config_from_shapes(config, shapes)
        hf_config = derived.to_hf()
        hf_config.dtype = dtype
        original = original_dtype(config.hf, tokenizer_from)
        if original is not None and f"torch.{original}" != str(dtype):
            hf_config.original_dtype = original
        hf_config.save_pretrained(temporary)
        if derived.layer_sizes is not None:
            shutil.copyfile(uneven.SOURCE, temporary / uneven.FILE)
        if tokenizer_from is not None:
            copy_companions(tokenizer_from, temporary)
        if chat is not None:
            add_chat(chat, temporary)
        widen(temporary)
        replace_folder(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {failure(error)}") from error
    except SafetensorError as error:
        raise InputError(f"cannot write {path}: {error}; free space or choose another") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return derived


def _require_companions(source: Path | None, path: Path) -> None:
    """Raises InputError where the folder is gone whose companions are to go along into `path`."""
    if source is not None and not source.is_dir():
        raise InputError(
            f"{source}: is gone by now, and its tokenizer and licence are to go along into "
            f"{path}; put it back, and run the same command again"
        )


def _write_tensors(
    pairs: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype
) -> dict[str, torch.Size]:
    """Write safetensors files of at most SHARD_BYTES and their index; returns all shapes."""
    shapes: dict[str, torch.Size] = {}
    shards: list[list[str]] = []
    total = held = 0
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        save_tensors(pending, folder / f"shard-{len(shards)}", {"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in pairs:
        stored = tensor.detach().to("cpu", dtype).contiguous()
        if dtype is torch.float16 and not bool(stored.isfinite().all()):
            raise InputError(
                f"{name} has values beyond what float16 holds (65,504): use --save-dtype bfloat16"
            )
        size = stored.numel() * stored.element_size()
        if pending and held + size > SHARD_BYTES:
            flush()
            held = 0
        pending[name] = stored
        shapes[name] = stored.shape
        held += size
        total += size
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE_FILE)
        return shapes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return shapes


def _config_from_shapes(config: ModelConfig, shapes: dict[str, torch.Size]) -> ModelConfig:
    """`config` with the sizes of the given tensors."""
    names = config.traits.names
    prefix = f"{names.blocks}."
    indices = {int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)}
    try:
        sizes = [_sizes_from_shapes(config, shapes, f"{prefix}{index}.") for index in indices]
        vocabulary, hidden = shapes[f"{names.embedding}.weight"]
        heads, kv_heads, channels = map(max, zip(*sizes, strict=True))
    except (KeyError, ValueError) as error:
        raise InputError(f"the tensors to save are no whole decoder: {error} is missing") from error
    derived = dataclasses.replace(
        config,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=channels,
        num_layers=len(indices),
        num_heads=heads,
        num_kv_heads=kv_heads,
        tie_embeddings=f"{names.head}.weight" not in shapes,
        layer_sizes=tuple(sizes),
    )
    with torch.device("meta"):
        expected = {name: p.shape for name, p in CausalLM(derived).named_parameters()}
    _require_same_names(expected, shapes, Path("the model to save"))
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise InputError(
                f"{name} has shape {tuple(shape)} where the others of its block and the embedding "
                f"imply {tuple(expected[name])}"
            )
    return derived


def _sizes_from_shapes(
    config: ModelConfig, shapes: dict[str, torch.Size], block: str
) -> LayerSizes:
    """The sizes of the block whose tensors' names begin with `block`. Raises KeyError where one
    that tells them is missing."""
    names = config.traits.names

    def width(role: Role, dim: int) -> int:
        return shapes[f"{block}{names.with_role(role)}.weight"][dim]

    own = {name[len(block) :].rpartition(".")[0] for name in shapes if name.startswith(block)}
    heads = kv_heads = channels = 0
    if any(names.attends(module) for module in own & names.modules.keys()):
        heads = width(Role.ATTENTION_OUTPUT, 1) // config.head_dim
        kv_heads = heads if config.traits.fused_qkv else width(Role.KEYS, 0) // config.head_dim
    if not all(names.attends(module) for module in own & names.modules.keys()):
        channels = width(Role.FEED_FORWARD_OUTPUT, 1)
    return LayerSizes(heads, kv_heads, channels)


@torch.no_grad()
def init_weights(model: CausalLM, std: float = 0.02, seed: int = 0) -> None:
    """Random weights as transformers draws them: matrices N(0, std^2), gains 1, biases 0.

    Each tensor has its own generator, seeded by `seed` and the tensor's position, and every rank
    keeps its part of the whole draw: the result does not depend on sharding or device.
    """
    for position, (name, parameter) in enumerate(model.named_parameters()):
        local, region = local_region(parameter)
        if parameter.ndim >= 2:
            own = (seed * 1_000_003 + position) % 2**64
            generator = torch.Generator().manual_seed(own)
            values = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
            local.copy_(values[region])
        else:
            local.fill_(0.0 if name.endswith(".bias") else 1.0)


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file. Raises OSError or SafetensorError when that fails."""
    partial = partial_path(path)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, partial, metadata=metadata)
        follow_umask(partial)
        replace_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)
