"""Documents from text files: JSON Lines, parquet, and plain text, compressed or not."""

import glob
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import InputError

COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
KNOWN_SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".txt")
REDPAJAMA_FIELD = "meta.redpajama_set_name"
REDPAJAMA_PREFIX = "RedPajama"
FOLDER = "folder"
AUTO = "auto"
READ_BYTES = 1 << 20
GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Document:
    """One text with where it came from."""

    text: str
    domain: str
    path: Path
    row: int
    """Line of a JSON Lines file or row of a parquet file, from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """Where records keep their text and domain."""

    text: str = "text"
    """Dotted path of the text in a record."""
    domain: str = AUTO
    """Dotted path of the domain's name in a record; "folder": the name of the file's folder;
    "auto": meta.redpajama_set_name in records, the folder for plain text files."""


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files that match any of the patterns, sorted by path, each once.

    A pattern is a file, a glob (`**` crosses folders) or a folder (all its files of known
    formats). A suffix of no known format counts as plain text if the pattern itself ends with it.

    Raises:
        InputError: a pattern matches nothing, or files of unknown format.
    """
    found: set[Path] = set()
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        paths = [Path(name) for name in glob.glob(expanded, recursive=True)]  # noqa: PTH207
        if Path(expanded).is_dir():
            paths = [path for path in Path(expanded).rglob("*") if _is_known(path)]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise InputError(
                f"--input {pattern!r} matches no files; correct it (quote globs: '**' crosses "
                f"folders; a folder is searched for {', '.join(KNOWN_SUFFIXES)})"
            )
        literal = Path(pattern).suffix
        if not literal or GLOB_CHARACTERS & set(literal):
            unknown = sorted(path for path in paths if not _is_known(path))
            if unknown:
                raise InputError(
                    f"--input {pattern!r} matches {len(unknown)} files of unknown format, such as "
                    f"{unknown[0]}; end the pattern with the wanted suffix ('**/*.md' reads each "
                    "file as one document)"
                )
        found.update(paths)
    return sorted(found, key=str)


def iterate_documents(
    path: Path, fields: Fields, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Document]:
    """Yields the documents of one file in order; empty texts and blank lines are left out.

    Args:
        path: .jsonl, .parquet, or any other suffix for a text file that is one document; JSON and
            text may be compressed (.zst, .gz).
        fields: where the text and the domain are.
        advance: told the bytes of the file (as stored) read since the last call.

    Raises:
        InputError: the file is empty, truncated or not what its suffix says, or a record lacks its
            text or domain. The message names path and line.
    """
    if format_suffix(path) == ".parquet":
        documents = _parquet_documents(path, fields, advance)
    elif format_suffix(path) in JSON_SUFFIXES:
        documents = _json_documents(path, fields, advance)
    else:
        yield from _text_document(path, fields, advance)
        return
    empty = True
    for document in documents:
        empty = False
        if document.text:
            yield document
    if empty:
        raise InputError(
            f"{path} holds no documents ({path.stat().st_size:,} bytes); download it again or "
            "remove it from the input"
        )


def format_suffix(path: Path) -> str:
    """The suffix that tells the format, compression left out."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes else ""


def domain_name(name: str) -> str:
    """A name fit for folders and flags: "RedPajamaC4" is "c4", "Wikipedia (en)" "wikipedia-en"."""
    name = name.removeprefix(REDPAJAMA_PREFIX) or name
    return re.sub(r"[^a-z0-9._+-]+", "-", name.lower()).strip("-.")


def _is_known(path: Path) -> bool:
    return path.is_file() and format_suffix(path) in KNOWN_SUFFIXES


def _json_documents(
    path: Path, fields: Fields, advance: Callable[[int], None]
) -> Iterator[Document]:
    for number, line in enumerate(_lines(path, advance), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}:{number}: not a JSON record: {error}; repair or remove the line, or "
                "download the file again"
            ) from None
        yield _document(record, fields, path, number)


def _parquet_documents(
    path: Path, fields: Fields, advance: Callable[[int], None]
) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    size, reported, row = path.stat().st_size, 0, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            total = file.metadata.num_rows
            wanted = {dotted.split(".")[0] for dotted in (fields.text, _domain_field(fields))}
            columns = [name for name in file.schema_arrow.names if name in wanted]
            others = [name for name in file.schema_arrow.names if name not in wanted]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield _document(record, fields, path, row, others)
                done = size * row // total
                advance(done - reported)
                reported = done
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(_unreadable(path, error)) from None
    advance(size - reported)


def _text_document(
    path: Path, fields: Fields, advance: Callable[[int], None]
) -> Iterator[Document]:
    content = b"".join(_blocks(path, advance)) if path.stat().st_size else b""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start:,}: {error.reason}); convert it or leave "
            "it out of --input"
        ) from None
    if fields.domain not in (AUTO, FOLDER):
        raise InputError(
            f"{path}: a plain text file has no field {fields.domain!r}; use --domain-field folder"
        )
    if text:
        yield Document(text=text, domain=_folder_domain(path), path=path, row=1)


def _document(
    record: Any, fields: Fields, path: Path, row: int, other_keys: Sequence[str] = ()
) -> Document:
    where = f"{path}:{row}"
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a record {{...}}, found {type(record).__name__}")
    text = _lookup(record, fields.text)
    if not isinstance(text, str):
        raise InputError(
            f"{where}: no text under {fields.text!r}; keys present: "
            f"{_keys(record, other_keys)}; name the right one with --text-field"
        )
    if fields.domain == FOLDER:
        domain = _folder_domain(path)
    else:
        name = _lookup(record, _domain_field(fields))
        domain = domain_name(name) if isinstance(name, str) else ""
        if not domain:
            raise InputError(
                f"{where}: no domain under {_domain_field(fields)!r}; keys present: "
                f"{_keys(record, other_keys)}; name the right one with --domain-field, or use "
                "--domain-field folder to take the name of each file's folder"
            )
    return Document(text=_valid_unicode(text), domain=domain, path=path, row=row)


def _domain_field(fields: Fields) -> str:
    return REDPAJAMA_FIELD if fields.domain == AUTO else fields.domain


def _folder_domain(path: Path) -> str:
    domain = domain_name(path.resolve().parent.name)
    if not domain:
        raise InputError(f"{path}: its folder's name cannot serve as a domain; rename the folder")
    return domain


def _lookup(record: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        if not isinstance(record, dict):
            return None
        record = record.get(part)
    return record


def _keys(record: dict[str, Any], others: Sequence[str]) -> str:
    names = []
    for key, value in record.items():
        names += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
    return ", ".join([*names, *others]) or "none"


def _valid_unicode(text: str) -> str:
    """Half surrogate pairs, which JSON can spell but no encoding has, become U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _lines(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    rest = io.BytesIO()
    for block in _blocks(path, advance):
        *complete, last = block.split(b"\n")
        for line in complete:
            rest.write(line)
            yield rest.getvalue()
            rest = io.BytesIO()
        rest.write(last)
    if rest.getvalue():
        yield rest.getvalue()


def _blocks(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Decompressed content in blocks.

    pyarrow's streams are used because, unlike zstandard's, they raise on a truncated file.
    """
    import pyarrow

    if path.stat().st_size == 0:
        raise InputError(
            f"{path} is empty (0 bytes); download it again or remove it from the input"
        )
    reported = 0
    with _readable(path), pyarrow.OSFile(str(path)) as raw:
        compression = COMPRESSIONS.get(path.suffix)
        stream = pyarrow.CompressedInputStream(raw, compression) if compression else raw
        while True:
            block = stream.read(READ_BYTES)
            position = raw.tell()
            advance(position - reported)
            reported = position
            if not block:
                return
            yield block


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(_unreadable(path, error)) from None


def _unreadable(path: Path, error: Exception) -> str:
    return (
        f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: {error}; download it "
        "again"
    )
