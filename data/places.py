"""What a path is, in words with the option that takes it, for where it was given to another one."""

import os
import re
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from data.errors import failure
from data.formats import is_known
from data.gguf import gguf_files, is_gguf
from data.hub import cached_snapshot
from data.pipes import INTO_A_FILE, is_of_a_shell
from data.records import open_bytes

_MANIFEST, _RUN = "manifest.json", "run.json"
_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/")
_SPLITS = ("train", "held_out")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_RECORDS = (_CONFIG, "generation_config.json", "tokenizer_config.json", _ADAPTER, *_TOKENIZERS)
_REPORTS = ("shear.json", "cpt.json", "finetune.json")
_RUN_RECORDS = (_RUN, *_REPORTS, "metrics.jsonl", "history.jsonl", "mixture.jsonl")
REPLACED = ("model", "model.unchecked", "model.refitted", "refit", "adapter", "checkpoints")
"""Folders that a run replaces, or writes and removes, in its output folder."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
EMPTY_FOLDER = "an empty folder"
_SHARDS = (".bin", ".idx", ".crc")
_DEEPEST = 3
"""Levels below the folder of a run or of tokens at which something of it lies."""
_RECORD_BYTES = 1 << 16
_TEXT_LOOKED_AT = 1000
"""Entries of a folder among which text is looked for."""


def what_is(path: Path) -> str:
    """What lies at `path`, such as "a folder of tokens, as --data takes it"; empty where nothing
    tells. Never raises."""
    try:
        if path.is_dir():
            return _folder(path)
        if path.is_file():
            return _file(path)
        if path.is_symlink():
            return f"a link that leads nowhere ({path.readlink()})"
        if path.exists():
            return "a pipe or a device"
        above = next((parent for parent in path.parents if os.path.lexists(parent)), path.parent)
        return "" if above.is_dir() else f"below {above}, which is no folder"
    except (OSError, ValueError) as error:
        return f"out of reach ({failure(error)})" if isinstance(error, OSError) else ""


def is_no_text(path: Path) -> bool:
    """Whether a file or folder, by its name and what lies beside or in it, is part of a model, of a
    run or of tokens, of which nothing is read as documents."""
    if path.is_dir():
        ours = _holds_tokens(path) or _holds_model(path) or _holds_run(path)
        return ours or _mentions(path / "tokenizer.json", b'"added_tokens"')
    beside = path.parent
    return (
        (_holds_model(beside) and (path.name in _RECORDS or path.suffix in _WEIGHTS))
        or (path.suffix in _SHARDS and _above(path, _MANIFEST) is not None)
        or (path.name in _RUN_RECORDS and _holds_run(beside))
        or (path.name == _MANIFEST and _holds_tokens(beside))
    )


def run_above(path: Path) -> Path | None:
    """The folder of the run that `path` lies in; None where it lies in none, or is one."""
    return next((folder for folder in list(path.parents)[:_DEEPEST] if _holds_run(folder)), None)


def replaced_by(path: Path) -> Path | None:
    """The run that would replace what lies at `path`; None where it is no part of one."""
    place = Path(os.path.realpath(path))
    run = run_above(place)
    return run if run is not None and place.relative_to(run).parts[0] in REPLACED else None


def is_address(text: str) -> bool:
    """Whether `text` is an address such as s3://bucket/x, or a path that was made of one, which has
    one slash."""
    return _ADDRESS.match(text) is not None


def odd_name(text: str, *, patterns: bool = True) -> str:
    """What helps where a name leads nowhere because it was written for something else than this
    program; empty where it looks like a path. `patterns` says whether the option takes globs."""
    if text.startswith("file:/"):
        return f"give the path alone: /{unquote(text.removeprefix('file:').lstrip('/'))}"
    if text == "-":
        return "standard input is not read: write it to a file, and name that"
    if is_of_a_shell(text):
        return f"it is a pipe that a shell opened for another process; {INTO_A_FILE}"
    if is_address(text):
        return "only what is on this machine is read: download it first, such as with `hf download`"
    if "{" in text and "}" in text:
        return "leave braces outside the quotes, for only a shell knows them"
    if "$" in text:
        return "a variable in single quotes stays as it is: use double quotes"
    if not patterns and set(text) & set("*?["):
        return "only --input takes patterns in quotes: leave them out for the shell, or name one"
    bare = text.strip().strip("'\"").strip()
    if bare != text and _exists(bare):
        return f"leave out the quotes and spaces around the name: {bare}"
    for mark in (",", " ", ":"):
        names = [name.strip() for name in text.split(mark) if name.strip()]
        if len(names) > 1 and all(map(_exists, names)):
            return f"separate names by spaces: {' '.join(names)}"
    return ""


def _folder(path: Path) -> str:
    if not any(path.iterdir()):
        return EMPTY_FOLDER
    if _holds_tokens(path):
        return "a folder of tokens, as --data takes it"
    tokens = _above(path, _MANIFEST)
    if tokens is not None and path.relative_to(tokens).parts[0] in _SPLITS:
        return f"a part of the tokens in {tokens}, which --data takes"
    if _holds_run(path):
        return "the folder of a run"
    run = run_above(path)
    if run is not None and not (path / _CONFIG).is_file():
        return f"a part of the run in {run}"
    if _holds_model(path):
        return "a model's folder, as --model, --source and --tokenizer take it"
    if (path / _ADAPTER).is_file():
        return "the folder of an adapter"
    if any((path / name).is_file() for name in _TOKENIZERS):
        return "a tokenizer's folder, as --tokenizer takes it"
    cached = cached_snapshot(path)
    if cached is not None:
        return f"a folder of the hub's cache, with the model in {cached}"
    if gguf_files(path):
        return "a folder of GGUF files"
    inner = next(
        (file.parent for file in path.glob("*/config.json") if _holds_model(file.parent)), None
    )
    if inner is not None:
        return f"a folder of models, such as {inner}"
    with os.scandir(path) as entries:
        text = any(is_known(Path(entry.name)) for entry in islice(entries, _TEXT_LOOKED_AT))
    return "a folder of text, as --input takes it" if text else "a folder of other files"


def _file(path: Path) -> str:
    beside = path.parent
    if not path.stat().st_size:
        return "an empty file"
    if path.name == _MANIFEST and _holds_tokens(beside):
        return f"the manifest of the tokens in {beside}, which --data takes"
    if path.name in _RUN_RECORDS and _holds_run(beside):
        return f"a record of the run in {beside}"
    if path.suffix in _SHARDS and _above(path, _MANIFEST) is not None:
        return f"a part of the tokens in {_above(path, _MANIFEST)}, which --data takes"
    if path.name in (_ADAPTER, "adapter_model.safetensors"):
        return f"a file of the adapter in {beside}"
    if is_gguf(path):
        return "a model in GGUF, as --model, --source and --tokenizer take it"
    if _holds_model(beside) and (path.name in _RECORDS or path.suffix in _WEIGHTS):
        return f"a file of the model in {beside}, which options take as a folder"
    if path.suffix in _WEIGHTS:
        return "a file of numbers"
    if path.name in _TOKENIZERS:
        return "a tokenizer's file, as --tokenizer takes it"
    return "a file of text" if is_known(path) else "a file"


def _holds_model(folder: Path) -> bool:
    return _mentions(folder / _CONFIG, b'"model_type"')


def _holds_run(folder: Path) -> bool:
    return _mentions(folder / _RUN, b'"command"')


def _mentions(file: Path, word: bytes) -> bool:
    """Whether `word` stands in what may be a record of ours or of transformers: other programs give
    their files the same names."""
    try:
        if not file.is_file():
            return False
        with open_bytes(file) as content:
            return word in content.read(_RECORD_BYTES)
    except OSError:
        return False


def _holds_tokens(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file() and any((folder / split).is_dir() for split in _SPLITS)


def _above(path: Path, name: str) -> Path | None:
    """The folder over `path` that holds the file `name`."""
    above = list(path.parents)[:_DEEPEST]
    return next((folder for folder in above if (folder / name).is_file()), None)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False
