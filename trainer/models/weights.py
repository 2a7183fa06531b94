"""Which files of a folder hold its model's weights: those that transformers would load."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from data.errors import InputError, failure
from data.log import logger
from data.records import is_kind, read_json, require_regular, word_for

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FETCH_AGAIN = "fetch the file again"
_INDEX_FIX = "fetch it again, or save the model once more with transformers' save_pretrained"
# In names of tensors that GPTQ, AWQ, MLX, bitsandbytes and fp8 formats add.
_QUANTIZED = (".qweight", ".scales", ".weight_scale", ".weight.absmax", ".weight.quant", ".SCB")
_NAMES = {name: name for name in ("float32", "float16", "bfloat16")} | {"float64": "float32"}
_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in `folder`, by name. Reads no weights.

    In transformers' order: the file that config.json names as `transformers_weights`, else
    model.safetensors, else the files of model.safetensors.index.json. Whatever else is there, such
    as an averaged copy, an adapter or another layout, is not the model; a line says so once.

    Raises:
        InputError: there are none of these, a named file is absent, or the index cannot be used.
    """
    entry = _entry(folder)
    files = [entry] if entry.suffix == ".safetensors" else sorted(set(_read_index(entry).values()))
    others = {path.name for path in (*folder.glob("*.safetensors"), *folder.glob(INDEX_FILE))}
    ignored = others - {entry.name, *(file.name for file in files)}
    if ignored:
        _log_ignored(folder, entry.name, ", ".join(sorted(ignored)))
    return files


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of `weight_files` that holds each tensor of the model in `folder`.

    Raises:
        InputError: as `weight_files`, a file is damaged, or does not hold what the index says.
    """
    entry = _entry(folder)
    if entry.suffix != ".safetensors":
        names = _read_index(entry)
        _require_held(entry, names)
        return names
    with open_tensors(entry) as stored:
        return dict.fromkeys(stored.keys(), entry)


def stored_dtype(folder: Path) -> str | None:
    """Name of the dtype in which the model in `folder` is stored, by its first tensor: "float32",
    "float16" or "bfloat16"; None for any other."""
    with open_tensors(weight_files(folder)[0]) as stored:
        name = next(iter(stored.keys()), None)
        return None if name is None else _DTYPES.get(stored.get_slice(name).get_dtype())


def original_dtype(config: dict[str, Any], folder: Path | None) -> str | None:
    """Name of the dtype in which the original of a model was published: "float32", "float16" or
    "bfloat16"; None where neither its config.json (`config`) nor its weights in `folder` tell.

    Between shearing and training, models are kept in another dtype than the one they end in.
    """
    for key in ("original_dtype", "dtype", "torch_dtype"):
        stated = str(config.get(key)).removeprefix("torch.")
        if stated in _NAMES:
            return _NAMES[stated]
    try:
        return None if folder is None else stored_dtype(folder)
    except InputError:
        return None


def other_class(config: dict[str, Any]) -> str | None:
    """The class of a model with another head, such as a classifier, that config.json (`config`)
    names; None where it names none."""
    stated = config.get("architectures")
    names = [str(name) for name in stated] if isinstance(stated, list) else []
    return next((name for name in names if "For" in name and "ForCausalLM" not in name), None)


def names_remedy(missing: list[str], unexpected: list[str]) -> str:
    """What helps where a folder lacks tensors of its model, or holds others."""
    tails = {
        name: next((one for one in missing if name.endswith(f".{one}")), "") for name in unexpected
    }
    prefixes = {name.removesuffix(tail) for name, tail in tails.items()}
    if unexpected and all(tails.values()) and len(prefixes) == 1:
        return (
            f"all names begin with {prefixes.pop()!r}, as those of a model inside another: save "
            "the inner model with its own save_pretrained, and name that folder"
        )
    if any(part in name for name in unexpected for part in _QUANTIZED):
        return "its weights are quantized: give the unquantized original"
    if any("lora_" in name for name in unexpected):
        return (
            "it holds an adapter beside the weights: merge it once, with peft's merge_and_unload "
            "and save_pretrained, and name that folder"
        )
    if not missing:
        return (
            "transformers would leave these out: where the model is whole without them, load it "
            "there once and use save_pretrained; else it is of another architecture"
        )
    return "the folder is incomplete or of another architecture"


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file; raises InputError for one that cannot be read."""
    require_regular(file, _FETCH_AGAIN)
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except OSError as error:
        fix = None if error.errno else _FETCH_AGAIN
        raise InputError(f"cannot read {file}: {failure(error, fix)}") from error
    except SafetensorError as error:
        raise InputError(f"cannot read {file}: {error}; {_FETCH_AGAIN}") from error


def _entry(folder: Path) -> Path:
    """The file that transformers opens first: one with all tensors, or the index."""
    named = _named_by_config(folder)
    if named is not None:
        return _inside(folder, named, "config.json names as `transformers_weights`")
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).is_file():
            return folder / name
    raise InputError(_no_weights(folder))


def _named_by_config(folder: Path) -> str | None:
    """`transformers_weights` of config.json. A config that cannot be read is `load_config`'s."""
    try:
        named = read_json(folder / "config.json", _FETCH_AGAIN).get("transformers_weights")
    except InputError:
        return None
    return named if isinstance(named, str) else None


def adapter_advice(folder: Path) -> str | None:
    """What to do with a folder that holds an adapter and no model; None for another folder."""
    if not (folder / "adapter_config.json").is_file():
        return None
    merged = folder.parent / "model"
    if (folder.parent / "finetune.json").is_file() and (merged / "config.json").is_file():
        return f"{folder} holds an adapter and no model: name {merged}, in which it is merged"
    return (
        f"{folder} holds an adapter (adapter_config.json) and no model: merge it into its base "
        "once, with peft's merge_and_unload and save_pretrained, and name that folder"
    )


def _no_weights(folder: Path) -> str:
    adapter = adapter_advice(folder)
    if adapter is not None:
        return adapter
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        shown = ", ".join(others[:3]) + (" and others" if len(others) > 3 else "")
        return (
            f"{folder} holds {shown}, but neither {SINGLE_FILE} nor {INDEX_FILE}: rename the file "
            f"that holds the whole model to {SINGLE_FILE}, or fetch {INDEX_FILE} to its parts"
        )
    binary = next((path.name for path in sorted(folder.glob("*.bin"))), None)
    reason = f"only {binary}" if binary else "no weights"
    return (
        f"{folder} holds no *.safetensors ({reason}). Save the model once with transformers' "
        "save_pretrained, or fetch a safetensors version"
    )


def _read_index(index: Path) -> dict[str, Path]:
    """The file of each tensor; all of them are there."""
    fix = _INDEX_FIX
    weight_map = read_json(index, fix, keys={"weight_map": dict})["weight_map"]
    if not weight_map:
        raise InputError(f"{index}: `weight_map` names no tensors; {fix}")
    names = {}
    for tensor, name in weight_map.items():
        if not is_kind(name, str):
            raise InputError(f"{index}: the file of {tensor} is {word_for(name)}, not text; {fix}")
        if name not in names:
            names[name] = _inside(index.parent, name, f"{index.name} names")
    missing = sorted(name for name, file in names.items() if not file.is_file())
    if missing:
        raise InputError(
            f"{index.parent} lacks {', '.join(missing)}, which {INDEX_FILE} names; "
            "fetch the missing files"
        )
    return {tensor: names[name] for tensor, name in weight_map.items()}


def _require_held(index: Path, names: dict[str, Path]) -> None:
    for file in sorted(set(names.values())):
        with open_tensors(file) as stored:
            held = set(stored.keys())
        lacking = [name for name in sorted(names) if names[name] == file and name not in held]
        if lacking:
            raise InputError(
                f"{index} says that {lacking[0]} is in {file.name}, which does not hold it; "
                f"{_INDEX_FIX}"
            )


def _inside(folder: Path, name: str, who: str) -> Path:
    """The file `name` of `folder`; raises InputError where the name leads out of it."""
    parts = PurePosixPath(name)
    if "\0" in name or not parts.parts or parts.is_absolute() or ".." in parts.parts:
        raise InputError(
            f"{folder}: {name!r}, which {who}, is not a file inside this folder; fetch the model "
            "again"
        )
    return folder / name


@lru_cache(maxsize=64)
def _log_ignored(folder: Path, entry: str, names: str) -> None:
    """Once for each folder: several checks look at the same one."""
    logger.info(f"{folder}: {names} ignored; the model is in {entry}, as for transformers")
