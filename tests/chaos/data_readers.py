"""The readers of files between text and tokens, each with what may come out of it."""

import contextlib
import dataclasses
import json
import subprocess
import tempfile
import types
import typing
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from data.job import Job
from data.manifest import HELD_OUT, Manifest
from data.reader import TokenReader
from data.sources import Fields, iterate_documents
from data.tasks import Report, Settings
from data.tokenizers import load_tokenizer
from tests.chaos.mutations import Reader
from tests.chaos.workspace import Workspace

FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.gz", "parquet")


def conforms(value: Any, kind: Any) -> str | None:
    """Where `value` is not of the type `kind` says, dataclasses field by field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return None
    if origin in (types.UnionType, typing.Union):
        wrong = [conforms(value, one) for one in arguments]
        return None if None in wrong else wrong[0]
    if origin in (dict, list, tuple):
        if not isinstance(value, origin):
            return f"no {origin.__name__}"
        inner = value.values() if isinstance(value, dict) else value
        kind_of_entries = arguments[-2] if arguments[-1] is Ellipsis else arguments[-1]
        return next(filter(None, (conforms(one, kind_of_entries) for one in inner)), None)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, typing.cast(type, kind)):
            return f"no {kind}"
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            wrong_field = conforms(getattr(value, field.name), hints[field.name])
            if wrong_field:
                return f"{field.name}: {wrong_field}"
        return None
    if isinstance(value, bool) and kind is not bool:
        return f"no {kind.__name__}"
    kinds = (int, float) if kind is float else (kind,)
    return None if isinstance(value, kinds) else f"no {kind.__name__}"


def finite(value: Any) -> str | None:
    """Where a number in nested dictionaries and lists is not finite."""
    if isinstance(value, dict | list | tuple):
        inner = value.values() if isinstance(value, dict) else value
        return next(filter(None, map(finite, inner)), None)
    wrong = isinstance(value, float) and not isfinite(value)
    return f"{value} is not finite" if wrong else None


def token_readers(chaos: Workspace) -> list[Reader]:
    """Readers of a token folder."""

    def manifest() -> Manifest:
        return Manifest.load(chaos.tokens)

    def content() -> list[Any]:
        found: list[Any] = []
        for split in ("train", HELD_OUT):
            reader = TokenReader(chaos.tokens, 32, split)
            for domain in reader.domains:
                tokens = reader.read(domain, np.arange(reader.sizes[domain]))
                bounds = [shard.documents().tolist() for shard in reader._shards[domain]]
                found.append([split, domain, tokens.tolist(), bounds])
        return found

    shard = next((chaos.tokens / "train" / "alpha").glob("*.bin"))
    shard_readers = [
        Reader(name=f"shard {suffix}", file=shard.with_suffix(suffix), read=content, checked=True)
        for suffix in (".bin", ".idx", ".crc")
    ]
    return [
        Reader(
            name="manifest.json",
            file=chaos.tokens / "manifest.json",
            read=manifest,
            form="json",
            flaw=manifest_flaw,
        ),
        Reader(
            name="manifest.json and tokens",
            file=chaos.tokens / "manifest.json",
            read=content,
            form="json",
            flaw=lambda value: _other_tokens(value, sound),
        )
        if (sound := content())
        else shard_readers[0],
        *shard_readers,
    ]


def manifest_flaw(manifest: Manifest) -> str | None:
    """What cannot be right about a manifest."""
    wrong = conforms(manifest, Manifest)
    if wrong is None and not 0 <= manifest.tokenizer.eos_id < manifest.tokenizer.vocab_size:
        wrong = "EOS is no id of the tokenizer"
    return wrong


def _other_tokens(value: list[Any], sound: list[Any]) -> str | None:
    """A manifest may name a domain otherwise; the tokens and bounds of documents stay."""
    parts = [part[2:] for part in sound]
    return None if all(part[2:] in parts for part in value) else "other tokens than were written"


def job_readers(chaos: Workspace, root: Path) -> list[Reader]:
    """Readers of an unfinished tokenizing job, by way of the job that goes on with it."""
    files = sorted(chaos.text.glob("*.jsonl"))
    tokenizer = load_tokenizer(str(chaos.tokenizer))
    settings = Settings(
        fields=Fields(),
        domains=(),
        held_out=0.1,
        max_bytes_per_domain=None,
        bytes_per_task=30_000,
    )

    def tree(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in ("lock", ".lock")
        }

    unfinished = root / "unfinished"
    job = Job(files, settings, tokenizer, unfinished)

    class _Stop(Exception):
        pass

    def stop(*_: Any) -> Any:
        raise _Stop

    job._manifest = stop  # type: ignore[assignment, method-assign]
    with contextlib.suppress(_Stop):
        job.run(1)
    place = unfinished / ".partial"

    def resumed() -> dict[str, bytes]:
        """What the job makes of a copy of the unfinished one."""
        with tempfile.TemporaryDirectory(dir=root) as folder:
            copy = Path(folder) / "copy"
            subprocess.run(["cp", "-a", unfinished, copy], check=True)
            Job(files, settings, tokenizer, copy).run(1)
            return tree(copy)

    sound = resumed()
    return [
        Reader(
            name=f"tokenizing's {file}",
            file=place / file,
            read=resumed,
            flaw=lambda value: _other_shards(value, sound),
            form="json",
            share=0.3,
        )
        for file in ("settings.json", "tasks/00000.json")
    ] + [
        Reader(
            name="a task's report",
            file=place / "tasks/00000.json",
            read=lambda: Report.load(place / "tasks/00000.json"),
            form="json",
            flaw=lambda value: None if value is None else conforms(value, Report),
        )
    ]


def _other_shards(value: dict[str, bytes], sound: dict[str, bytes]) -> str | None:
    """Counts that nothing covers may differ in the manifest; shards and their hashes do not."""
    differ = [name for name in sound.keys() | value.keys() if value.get(name) != sound.get(name)]
    differ = [name for name in differ if name != "manifest.json"]
    return f"{sorted(differ)[:3]} differ" if differ else None


def text_readers(root: Path) -> list[Reader]:
    """Readers of text files in every format."""
    return [_text_reader(root, suffix) for suffix in FORMATS]


def _text_reader(root: Path, suffix: str) -> Reader:
    import pyarrow
    import pyarrow.parquet

    file = root / "texts" / f"text.{suffix}"
    file.parent.mkdir(exist_ok=True, parents=True)
    records = [
        {"text": f"{number} naïve 文字 😀 text", "meta": {"redpajama_set_name": "alpha"}}
        for number in range(12)
    ]
    if suffix == "parquet":
        table = pyarrow.Table.from_pylist(records)
        pyarrow.parquet.write_table(table, file, compression="zstd", write_page_checksum=True)
    else:
        lines = [
            json.dumps(record, ensure_ascii=False) if "json" in suffix else record["text"]
            for record in records
        ]
        _compress(file, "".join(f"{line}\n" for line in lines).encode())

    def read() -> list[tuple[str, str, int]]:
        found = list(iterate_documents(file, Fields()))
        return [(document.text, document.domain, document.row) for document in found]

    def flaw(value: list[tuple[str, str, int]]) -> str | None:
        return conforms(value, list[Any]) or next(
            (f"domain {domain!r}" for _, domain, _ in value if "/" in domain or not domain), None
        )

    return Reader(
        name=f"text.{suffix}",
        file=file,
        read=read,
        flaw=flaw,
        form="lines" if suffix == "jsonl" else "bytes",
        pipes=False,
    )


def _compress(file: Path, content: bytes) -> None:
    import gzip

    if file.suffix == ".gz":
        content = gzip.compress(content)
    elif file.suffix == ".zst":
        import zstandard

        content = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    file.write_bytes(content)
