"""Texts that perplexity is measured on: files, and the sets of publications by their names."""

import gzip
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from data.errors import InputError, MissingInput, naming
from data.formats import Format, compression_of, format_of
from data.hub import is_offline
from data.places import odd_name
from data.records import read_text
from data.tokenizers import holds_tokenizer, load_tokenizer
from launch.evaluate.document import resolve_bos, scored_rows
from trainer.models.config import ModelConfig
from trainer.parallel import DistributedContext


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSet:
    """A set on the Hugging Face hub, as published perplexities take it: rows joined to one text, of
    which whole windows count alone."""

    repository: str
    files: str
    """Its file there; a pattern that meets one."""
    column: str
    joined: str
    """What stands between two rows."""
    revision: str = "main"
    rows: int | None = None
    """The first rows that are taken; None: all."""
    windows: int | None = None
    """The first windows that are taken; None: all."""


TEXT_SETS = {
    "wikitext2": TextSet(
        repository="Salesforce/wikitext",
        files="wikitext-2-raw-v1/test-*.parquet",
        column="text",
        joined="\n\n",
    ),
    "ptb": TextSet(
        repository="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        files="penn_treebank/*validation*",
        column="sentence",
        joined="\n\n",
    ),
    "c4": TextSet(
        repository="allenai/c4",
        files="en/c4-validation.00000-of-00008.json.gz",
        column="text",
        joined=" ",
        rows=1100,
        windows=256,
    ),
}
"""WikiText-2's raw test split and the validation split of Penn Treebank as in LLM-Pruner (Ma et al.
2023) and Shortened LLaMA; the documents of C4 as in GPTQ (Frantar et al. 2023)."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text as the user named it."""

    name: str
    text: str
    published: TextSet | None
    """None for a file."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text in a model's tokens."""

    name: str
    """As the user wrote it."""
    ids: list[int]
    """Tokens that are scored, no special ones."""
    text_bytes: int
    """UTF-8 length of the text; of a text that is scored in part, that part's share of it."""
    bos: str
    """The resolved BOS rule: "no", "yes" or "every"."""
    bos_id: int | None
    published: TextSet | None


def shared_texts(names: tuple[str, ...], context: DistributedContext) -> list[Text]:
    """The texts of --text on every rank; rank 0 alone reads them, for a pipe can be read once.
    Raises InputError on every rank."""

    def read() -> list[Text]:
        return [read_named(name) for name in names] if context.is_main else []

    shared: list[Text] = context.broadcast(context.raise_on_any_rank(read))
    return shared


def read_named(name: str) -> Text:
    """A file, or the set called `name` where there is no such file. Raises InputError for a file
    that cannot be read or is empty, and for a set that cannot be had."""
    known = TEXT_SETS.get(name)
    if known is None or Path(name).exists():
        return Text(name, read_document(Path(name)), None)
    rows = itertools.islice(_rows(_file_of(name, known), known), known.rows)
    return Text(name, known.joined.join(rows), known)


def read_document(path: Path) -> str:
    """The text of a file. Raises InputError for one that cannot be read, or is empty."""
    if path.is_file():
        _require_plain(path)
    sets = f"give a readable UTF-8 file, or the name of a set: {', '.join(TEXT_SETS)}"
    try:
        text = read_text(path, odd_name(str(path), patterns=False) or sets)
    except InputError as error:
        raise InputError(f"--text {error}") from None
    if not text:
        raise InputError(f"--text {path}: the file is empty; there is nothing to score")
    return text


def _require_plain(path: Path) -> None:
    """Raises InputError for a file whose name says that it is no plain text."""
    if compression_of(path):
        raise InputError(f"--text {path}: is compressed; unpack it, and name what comes out")
    if format_of(path) is not Format.TEXT:
        raise InputError(
            f"--text {path}: is {format_of(path).value} by its name, and one document is scored as "
            "it stands, names and braces too: write the text of a record into a .txt file (or link "
            "to the file as .txt), or tokenize all records with `shorn tokenize` and give --data"
        )


def _file_of(name: str, known: TextSet) -> Path:
    """The file of a set in the local Hugging Face cache, fetched where it is not there."""
    from huggingface_hub import snapshot_download

    wanted: dict[str, Any] = {"repo_type": "dataset", "revision": known.revision}
    wanted["allow_patterns"] = [known.files]
    reason = "HF_HUB_OFFLINE forbids to ask the hub (unset it to download)"
    for local in (True, False):
        if not local and is_offline():
            break
        try:
            folder = snapshot_download(known.repository, local_files_only=local, **wanted)
        # The library raises what its transport happens to raise.
        except Exception as error:
            if not local:
                reason = f"cannot be downloaded ({(str(error).splitlines() or [repr(error)])[0]})"
            continue
        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        # As the hub's library matches: a star stands for parts of a path too.
        found = [file for file in files if fnmatch(str(file.relative_to(folder)), known.files)]
        if found:
            return found[0]
        reason = f"{known.repository} holds no {known.files} any more"
    raise MissingInput(
        f"--text {name}: is not in the local Hugging Face cache, and {reason}. Fetch it on a "
        f"machine that can, and copy the cache (HF_HUB_CACHE): hf download {known.repository} "
        f"--repo-type dataset --revision {known.revision} --include '{known.files}'; or write its "
        "text into a file, and name that"
    )


def _rows(path: Path, known: TextSet) -> Iterator[str]:
    """The texts of a set's file. Raises InputError for a file that does not hold any."""
    fix = f"delete it, to have {known.repository} fetched again"
    try:
        if path.suffix == ".parquet":
            yield from parquet.read_table(path, columns=[known.column])[known.column].to_pylist()
            return
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)[known.column] for line in lines)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {fix}") from None


def tokenized(
    text: Text, path: Path, shape: ModelConfig, *, rule: str, window: int, stride: int | None
) -> Document:
    """`text` in the tokens of the model at `path`, under a BOS `rule` as --bos takes it; of a
    published set the whole windows.

    Raises InputError when window, stride, BOS or length do not fit it, or an id is beyond the
    model's rows.
    """
    if not holds_tokenizer(path):
        raise InputError(
            f"--text {text.name} is tokenized by the model's own tokenizer, and {path} holds "
            "none: copy tokenizer.json and tokenizer_config.json (or tokenizer.model) there from "
            "the model that it was made from, or measure it with --data"
        )
    tokenizer = load_tokenizer(path)
    bos = resolve_bos(rule, tokenizer.bos_id, tokenizer.adds_bos)
    ids = [int(token) for token in tokenizer.encode([text.text])[0]]
    size = len(text.text.encode())
    if text.published is not None:
        taken = _in_whole_windows(len(ids), bos, window, text.published.windows)
        size, ids = round(size * taken / max(1, len(ids))), ids[:taken]
    with naming(f"--text {text.name}"):
        rows = scored_rows(ids, bos, tokenizer.bos_id, window, stride)
    largest = max(max(row) for row, _ in rows)
    if largest >= shape.vocab_size:
        raise InputError(
            f"--text {text.name}: the tokenizer of {path} gives id {largest}, for which the "
            f"model has no row: it has {shape.vocab_size}; fetch the tokenizer that it was trained "
            f"with, or remove the tokens that were added (or set as bos_token) in {path}"
        )
    return Document(text.name, ids, size, bos, tokenizer.bos_id, text.published)


def _in_whole_windows(length: int, bos: str, window: int, most: int | None) -> int:
    """How many of `length` tokens fill whole windows, `most` of them; all where none is full."""
    once, every = int(bos == "yes"), int(bos == "every")
    full = (length + once) // (window - every)
    taken = (full if most is None else min(full, most)) * (window - every) - once
    return taken if full else length
