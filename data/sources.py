"""Documents from text files: JSON Lines, parquet, and plain text, compressed or not."""

import itertools
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from data.conversations import FIELDS, TOOLS, Turn, Unfit, as_text, is_conversation, turns_of
from data.domain_names import LONGEST, domain_name, folder_domain
from data.errors import InputError
from data.formats import Format, compression_of, format_of
from data.joined import SEPARATED, SEPARATOR, refuse_several
from data.log import logger
from data.records import ABSENT, TWICE, lookup, parse_json, word_for
from data.streams import (
    ONE_A_LINE,
    damaged,
    head_of,
    is_wide,
    read_blocks,
    read_lines,
    read_whole,
    reading,
    refuse_pointer,
    too_large,
    true_content,
)

REDPAJAMA_FIELD = "meta.redpajama_set_name"
FOLDER = "folder"
AUTO = "auto"
MAX_RECORD_MIB = 64
_TO_UTF_8 = "iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
"""Where text is not UTF-8, it most often is what Windows wrote, or Latin-1 within that."""
_BY_A_GLOB = "(a quoted glob in a folder's place takes only what it matches)"
ROWS = 1024
"""Rows of a parquet file that are held at once, fewer where they are large."""
BYTES_OF_ROWS = 64 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text with where it came from."""

    text: str
    domain: str
    path: Path
    row: int
    """Line of a JSON Lines file or row of a parquet file, from 1."""
    name: str = field(default="", compare=False)
    """What the input calls the domain."""
    turns: tuple[Turn, ...] = ()
    """Those of a conversation, of which `text` is but another spelling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """Where records keep their text and domain, and what to do with those that do not fit."""

    text: str = "text"
    """Dotted path of the text in a record; a key with this very name, dots and all, comes first."""
    domain: str = AUTO
    """Dotted path of the domain's name in a record; "folder": the name of the file's folder;
    "auto": meta.redpajama_set_name in records, the folder for plain text and conversations."""
    conversations: bool = False
    """Take records as conversations (data.conversations) and no text."""
    skip_incomplete: bool = False
    """Leave out records whose text or domain is absent or null, and conversations that cannot be
    trained on, instead of refusing them."""
    max_bytes: int = MAX_RECORD_MIB << 20
    """Length, in bytes, above which a record is refused: a line of JSON Lines, the text of a row, a
    plain text file."""


def iterate_documents(
    path: Path,
    fields: Fields,
    advance: Callable[[int], None] = lambda _: None,
    left_out: Callable[[int, str], None] = lambda *_: None,
) -> Iterator[Document]:
    """Yields the documents of one file in order; empty texts and blank lines are left out.

    Args:
        path: JSON Lines, parquet, or any other suffix for a text file that is one document; JSON
            and text may be compressed (data/formats.py).
        fields: where the text and the domain are.
        advance: told the bytes of the file (as stored) read since the last call.
        left_out: told the row of each record that `fields.skip_incomplete` leaves out, and why in
            words that all such records have in common.

    Raises:
        InputError: the file is unreadable, empty, truncated or not what its suffix says, or a
            record lacks its text or domain or is too large. The message names path and line. A
            parquet file without rows is sound.
    """
    if format_of(path) is Format.TEXT:
        yield from _text_document(path, fields, advance)
        return
    rows = _parquet_documents if format_of(path) is Format.PARQUET else _json_documents
    empty = format_of(path) is Format.JSON
    for row, document in rows(path, fields, advance):
        empty = False
        if isinstance(document, str):
            left_out(row, document)
        elif document.text:
            yield document
    if empty:
        raise InputError(
            f"{path} holds no documents ({path.stat().st_size:,} bytes); download it again or "
            "remove it from the input"
        )


def holds_nothing(path: Path) -> bool:
    """Whether a file of JSON Lines, as stored or unpacked, holds blanks alone. False where it
    cannot be read."""
    try:
        return not any(block.strip() for block in itertools.islice(read_blocks(path), 2))
    except InputError:
        return False


Rows = Iterator[tuple[int, Document | str]]
"""Rows from 1, each with its document, or why it is to be left out."""
INCOMPLETE = "no text or domain"
"""Why records are left out that are no conversations."""


def warn_of_folders_with_one_name(files: Sequence[Path], fields: Fields) -> None:
    """Says which folders, where files are named by theirs, make one domain because they are called
    the same, as `data` in many data sets."""
    if fields.domain not in (AUTO, FOLDER):
        return
    every = fields.conversations or fields.domain == FOLDER
    named = (path for path in files if every or format_of(path) is Format.TEXT)
    written = sorted({path.absolute().parent for path in named})
    folders: dict[str, list[Path]] = {}
    for folder in {folder.resolve(): folder for folder in written}.values():
        folders.setdefault(folder.name, []).append(folder)
    shared = [same for same in folders.values() if len(same) > 1]
    if shared:
        one, other, *rest = max(shared, key=len)
        more = f" (and {len(shared) - 1} more such names)" if len(shared) > 1 else ""
        logger.warning(
            f"{len(rest) + 2} folders called {one.name!r} make one domain: {one}, {other}"
            f"{', ...' if rest else ''}{more}; for a domain each, give --input a folder of links "
            f"to them with other names, such as by ln -s {shlex.quote(str(one))} PARTS/NAME"
        )


def _json_documents(path: Path, fields: Fields, advance: Callable[[int], None]) -> Rows:
    for number, found in enumerate(read_lines(path, fields.max_bytes, advance), start=1):
        line = found.strip(SEPARATOR)
        if not line.strip():
            continue
        place = f"{path}:{number}"
        fix = "repair or remove the line, or download the file again"
        if number == 1:
            several = (
                f"one record a line is wanted: {SEPARATED}" if SEPARATOR in found else ONE_A_LINE
            )
            fix += f"; {several}; what holds no documents, leave out of --input {_BY_A_GLOB}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            _refuse_foreign(path, number)
            raise InputError(
                f"{place}: not UTF-8 text (byte {error.start:,}); {fix}; a file in another "
                f"encoding can be converted, such as with {_TO_UTF_8}"
            ) from None
        try:
            record = parse_json(text, place, fix, kind=(object, bool), record=True)
        except InputError:
            _refuse_foreign(path, number)
            refuse_several(text, place)
            raise
        yield number, _document(record, fields, path, number)


def _parquet_documents(path: Path, fields: Fields, advance: Callable[[int], None]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    reported, row = 0, 0
    head = head_of(path)
    with reading(path):
        size = path.stat().st_size
    refuse_pointer(path, head)
    if not head.startswith(b"PAR1"):
        _refuse_foreign(path, 1, head)
    try:
        with reading(path), path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            total = file.metadata.num_rows
            wanted = {
                prefix
                for dotted in (*_text_fields(fields), _domain_field(fields))
                for prefix in itertools.accumulate(dotted.split("."), "{}.{}".format)
            }
            columns = [name for name in file.schema_arrow.names if name in wanted]
            others = [name for name in file.schema_arrow.names if name not in wanted]
            _refuse_twins(path, columns)
            for batch in file.iter_batches(batch_size=_rows_at_once(file), columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield row, _document(record, fields, path, row, others)
                done = size * row // total
                advance(done - reported)
                reported = done
    except NotImplementedError as error:
        raise InputError(
            f"{path}: pyarrow cannot read this kind of parquet file ({error}); upgrade pyarrow, or "
            "write the file again with other settings"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: a text behind row {row:,} is not UTF-8 ({error.reason}); convert it"
        ) from None
    # ValueError is what a value without a counterpart in Python raises.
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(damaged(path, str(error))) from None
    advance(size - reported)


def _refuse_twins(path: Path, columns: Sequence[str]) -> None:
    """Raises InputError if two columns have one name: a record would keep the last alone."""
    for name in columns:
        if columns.count(name) > 1:
            raise InputError(
                f"{path}: {columns.count(name)} columns are named {name!r}; rename or drop all but "
                "one, for a record can hold one alone"
            )


def _rows_at_once(file: Any) -> int:
    """Rows to hold at once: fewer than usual where those of some group are large."""
    groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
    largest = max((g.total_byte_size // max(g.num_rows, 1) for g in groups), default=0)
    return max(1, min(ROWS, BYTES_OF_ROWS // max(largest, 1)))


def _text_document(
    path: Path, fields: Fields, advance: Callable[[int], None]
) -> Iterator[Document]:
    with reading(path):
        size = path.stat().st_size
    content = read_whole(path, fields.max_bytes, advance) if size else b""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse_foreign(path, 1, content)
        others = f"; grep -rlaxv '.*' {shlex.quote(str(path.parent))} lists all such files there"
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start:,}: {error.reason}); convert it, such as "
            f"with {_TO_UTF_8}, or leave it out of --input{'' if compression_of(path) else others}"
        ) from None
    if is_wide(content):
        _refuse_foreign(path, 1, content)
    _refuse_records(path, text, fields)
    if fields.conversations:
        raise InputError(
            f"{path}: plain text holds no conversations; keep it out of --input, or tokenize it "
            "without --conversations into a folder of its own"
        )
    if fields.domain not in (AUTO, FOLDER):
        raise InputError(
            f"{path}: a plain text file has no field {fields.domain!r}; use --domain-field folder"
        )
    if text:
        name, domain = folder_domain(path)
        yield Document(text=text, domain=domain, path=path, row=1, name=name)


def _refuse_foreign(path: Path, number: int, content: bytes | None = None) -> None:
    """Raises InputError if a file, at fault in line `number`, holds something else altogether.

    `content` is how it starts; None reads that.
    """
    if number != 1:
        return
    found = true_content(next(read_blocks(path), b"") if content is None else content)
    if found:
        raise InputError(f"{path} holds {found[0]}, not {format_of(path)}; {found[1]}")


def _refuse_records(path: Path, text: str, fields: Fields) -> None:
    """Raises InputError if a plain text file is JSON Lines under another suffix."""
    line = text[: fields.max_bytes].lstrip().partition("\n")[0]
    if not line.startswith("{"):
        return
    try:
        record = parse_json(line, str(path), "", record=True)
    except InputError:
        return
    if isinstance(lookup(record, fields.text), str):
        raise InputError(
            f"{path} holds JSON records, which its suffix does not say; rename it, or link to it, "
            f"as {path.name.partition('.')[0]}.jsonl"
        )


def _document(
    record: Any, fields: Fields, path: Path, row: int, other_keys: Sequence[str] = ()
) -> Document | str:
    """The document of a record; of one to be left out why."""
    where = f"{path}:{row}"
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: expected a record {{...}}, found {word_for(record)}; {ONE_A_LINE}"
        )
    turns: tuple[Turn, ...] = ()
    if fields.conversations:
        try:
            turns = _turns(record, fields, where, other_keys)
        except Unfit as error:
            if fields.skip_incomplete:
                return error.kind
            raise InputError(unfit(where, error)) from None
    text = as_text(turns) if turns else lookup(record, fields.text)
    by_folder = fields.domain == FOLDER or (fields.conversations and fields.domain == AUTO)
    name = "" if by_folder else lookup(record, _domain_field(fields))
    if text is TWICE or name is TWICE:
        dotted = fields.text if text is TWICE else _domain_field(fields)
        raise InputError(
            f"{where}: {dotted!r} is given twice, with different values, and JSON keeps the last "
            "alone; rename or remove one"
        )
    if _is_nothing(text) or _is_nothing(name):
        if fields.skip_incomplete:
            return INCOMPLETE
        what, dotted = "text", fields.text
        if not _is_nothing(text):
            what, dotted = "domain", _domain_field(fields)
        raise InputError(
            f"{where}: no {what} under {_why_nothing(record, dotted, what, other_keys)}"
        )
    text = _text(text, fields, where)
    if by_folder:
        name, domain = folder_domain(path)
    else:
        name, domain = _named_domain(name, _domain_field(fields), where)
    return Document(
        text=_valid_unicode(text), domain=domain, path=path, row=row, name=name, turns=turns
    )


def _turns(
    record: dict[str, Any], fields: Fields, where: str, other_keys: Sequence[str]
) -> tuple[Turn, ...]:
    """The turns of a conversation. Raises Unfit for a record that is none."""
    twice = [name for name in FIELDS if lookup(record, name) is TWICE]
    if twice:
        raise InputError(
            f"{where}: {twice[0]!r} is given twice, with different values, and JSON keeps the last "
            "alone; rename or remove one"
        )
    return tuple(
        Turn(turn.role, _valid_unicode(turn.text)) for turn in turns_of(record, other_keys)
    )


def unfit(where: str, error: Unfit) -> str:
    """What to say of a conversation that cannot be trained on."""
    return (
        f"{where}: {error.detail}; correct it, or leave such records out, and have them counted, "
        "with --skip-incomplete"
    )


def _text_fields(fields: Fields) -> tuple[str, ...]:
    return (*FIELDS, *TOOLS) if fields.conversations else (fields.text,)


def _is_nothing(value: Any) -> bool:
    return value is None or value is ABSENT


def _why_nothing(record: dict[str, Any], dotted: str, what: str, others: Sequence[str]) -> str:
    """Whether `dotted` is null or absent in a record, and what helps."""
    if lookup(record, dotted) is None:
        return (
            f"{dotted!r}, which is null; leave such records out with --skip-incomplete, or name "
            f"another field with --{what}-field"
        )
    outer, _, rest = dotted.partition(".")
    if rest and isinstance(record.get(outer), list):
        path = "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in rest.split("."))
        path = f".{outer}{path}" if path[0] == "[" else f'([.{outer}[]{path}] | join("\\n"))'
        how = "" if others else f", with jq -c '.{what} = {path}' OLD > NEW.jsonl"
        return (
            f"{dotted!r}, for {outer!r} is a list, which no name leads into; make it a field of "
            f"its own{how}, and name that with --{what}-field"
        )
    if what == "text" and (is_conversation(record) or set(FIELDS[:2]) & {*others}):
        return f"{dotted!r}: it is a conversation; --conversations takes such records"
    other = ", or use --domain-field folder to take the name of each file's folder"
    if what == "text":
        how = "" if others else f" with jq -c '.{dotted} = .KEY' OLD > NEW.jsonl"
        other = f", or rename it{how} where other files do have {dotted!r}"
    return (
        f"{dotted!r}{_beside(record, dotted)}; keys present: {_keys(record, others)}; name the "
        f"right one with --{what}-field{other}, or leave such records out with --skip-incomplete"
    )


def _text(value: Any, fields: Fields, where: str) -> str:
    text = _decoded(value, fields.text, where)
    if not isinstance(text, str):
        raise InputError(
            f"{where}: no text under {fields.text!r}, which is {word_for(value)}; name another "
            "field with --text-field, or make it text"
        )
    if len(text) > fields.max_bytes:
        raise too_large(where, fields.max_bytes)
    return text


def _named_domain(value: Any, dotted: str, where: str) -> tuple[str, str]:
    """What a record calls its domain, as text, and the domain."""
    value = _decoded(value, dotted, where)
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, int) or (isinstance(value, float) and isfinite(value)):
        value = str(value)
    if not isinstance(value, str):
        raise InputError(
            f"{where}: no domain under {dotted!r}, which is {word_for(value)}; name another field "
            "with --domain-field, or use --domain-field folder"
        )
    domain = domain_name(value)
    if not domain:
        raise InputError(
            f"{where}: no domain under {dotted!r}: {value!r} holds no letter or digit to name it "
            "by; correct it, or use --domain-field folder"
        )
    if len(domain.encode()) > LONGEST:
        raise InputError(
            f"{where}: the domain under {dotted!r} has {len(domain):,} letters, more than a folder "
            f"can be named by ({domain[:40]}...); name another field with --domain-field"
        )
    return value, domain


def _decoded(value: Any, dotted: str, where: str) -> Any:
    """`value`, as text where it is bytes, as some writers of parquet store text."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: {dotted!r} is bytes that are not UTF-8 text (byte {error.start:,}); convert "
            "it, or name another field"
        ) from None


def _domain_field(fields: Fields) -> str:
    return REDPAJAMA_FIELD if fields.domain == AUTO else fields.domain


def _beside(record: dict[str, Any], dotted: str) -> str:
    """Says what stands where an object would hold the rest of a dotted name."""
    outer = dotted.partition(".")[0]
    if outer == dotted or isinstance(record.get(outer, {}), dict):
        return ""
    return f", for {outer!r} is {word_for(record[outer])}, not an object"


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
