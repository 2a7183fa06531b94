"""What the suffixes of input files mean: one table for named files, folders and globs.

Suffixes count in any case: `A.JSONL.GZ` is JSON Lines in gzip.
"""

from enum import StrEnum
from pathlib import Path


class Format(StrEnum):
    """How a file holds documents."""

    JSON = "JSON Lines"
    """One record a line."""
    PARQUET = "parquet"
    TEXT = "plain text"
    """The whole file is one document."""


FORMATS = {
    ".jsonl": Format.JSON,
    ".ndjson": Format.JSON,
    ".jl": Format.JSON,
    ".jsonlines": Format.JSON,
    ".json": Format.JSON,
    ".parquet": Format.PARQUET,
    ".pq": Format.PARQUET,
    ".txt": Format.TEXT,
}
DESCRIBING = frozenset(
    ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "dataset-metadata.json")
)
"""Names under which hubs of data sets keep what describes one; neither a folder nor a glob is read
for these."""
COMPRESSIONS = {
    ".zst": "zstd",
    ".zstd": "zstd",
    ".gz": "gzip",
    ".gzip": "gzip",
    ".bz2": "bz2",
    ".lz4": "lz4",
    ".xz": "xz",
}

_TABLE = (
    "its rows are no records yet: turn them into JSON Lines, such as with pandas' "
    "read_{reader}(...).to_json('a.jsonl', orient='records', lines=True)"
)
_ARCHIVE = "unpack it, and give the folder to --input"
_PAGES = "extract its text into .txt files, such as with {tool}"
_ARROW = (
    "turn it into parquet, such as with datasets' load_from_disk(...) or Dataset.from_file(...) "
    "and to_parquet('a.parquet')"
)
_ARRAYS = "it holds numbers, not text; leave it out of --input"
_NUMBERS = (".npy", ".npz", ".pt", ".pth", ".pkl", ".safetensors", ".gguf", ".h5")
REFUSED = (
    dict.fromkeys((".csv", ".tsv"), _TABLE.format(reader="csv"))
    | dict.fromkeys((".xls", ".xlsx", ".ods"), _TABLE.format(reader="excel"))
    | dict.fromkeys((".arrow", ".feather"), _ARROW)
    | dict.fromkeys((".avro", ".orc"), "turn it into parquet")
    | dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"), _ARCHIVE)
    | dict.fromkeys((".pdf", ".ps", ".djvu"), _PAGES.format(tool="pdftotext"))
    | dict.fromkeys((".docx", ".doc", ".odt", ".rtf", ".epub"), _PAGES.format(tool="pandoc"))
    | dict.fromkeys(_NUMBERS, _ARRAYS)
)
"""Suffixes that are never read as text, each with what helps."""


def inner_suffix(path: Path) -> str:
    """The suffix that tells the format, in lower case, compression left out: ".jsonl"."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1].lower() in COMPRESSIONS:
        suffixes = suffixes[:-1]
    return suffixes[-1].lower() if suffixes else ""


def compression_of(path: Path) -> str | None:
    """The name of the compression that the last suffix tells, None where it tells none."""
    return COMPRESSIONS.get(path.suffix.lower())


def format_of(path: Path) -> Format:
    """The format; a suffix of no known one means plain text."""
    return FORMATS.get(inner_suffix(path), Format.TEXT)


def is_known(path: Path) -> bool:
    """Whether the name itself says how to read the file."""
    return inner_suffix(path) in FORMATS and refusal(path) is None


def refusal(path: Path) -> str | None:
    """Why a file is never read by this name, with what helps; None for one that is."""
    suffix = inner_suffix(path)
    compression = compression_of(path)
    if compression and not suffix:
        return (
            f"the name does not say what is in it; for JSON Lines rename it, or link to it, as "
            f"{path.stem}.jsonl{path.suffix}, for one text as {path.stem}.txt{path.suffix}"
        )
    if compression and FORMATS.get(suffix) is Format.PARQUET:
        return "parquet is compressed inside; decompress the file"
    if suffix in REFUSED:
        return f"{suffix} is not read: {REFUSED[suffix]}"
    return None
