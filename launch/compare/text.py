"""Text of a comparison: documents of each domain, some to measure on and others to train on."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from data.errors import InputError
from data.find import find_files
from data.sources import Document, Fields, iterate_documents


def split_documents(
    patterns: Iterable[str], domains: list[str], held_out: int, train: int, folder: Path
) -> None:
    """Writes train.jsonl.zst and held_out.jsonl.zst: the first `held_out` documents of each domain,
    and the `train` that follow them. A text that came before, in any domain, is passed over, so
    that none is both trained on and measured.

    What lies beside `folder` is passed over where `patterns` meet it: the comparison made it.
    Reads no further than the last document it needs. Raises InputError when a domain has too few
    documents to measure and train on.
    """
    wanted = held_out + train
    found: dict[str, list[Document]] = {domain: [] for domain in domains}
    others: set[str] = set()
    seen: set[str] = set()
    for document in _documents(patterns, folder.parent):
        kept = found.get(document.domain)
        if kept is None:
            others.add(document.domain)
        elif len(kept) < wanted:
            if document.text in seen:
                continue
            seen.add(document.text)
            kept.append(document)
            if all(len(part) == wanted for part in found.values()):
                break
    for domain in domains:
        if len(found[domain]) <= held_out:
            known = sorted(others | {name for name, part in found.items() if part})
            lower = ", or lower --held-out-documents" if len(found[domain]) > 1 else ""
            raise InputError(
                f"domain {domain!r} has {len(found[domain])} different documents and "
                f"--held-out-documents is {held_out}, which leaves none to train on; name other "
                f"domains with --domain-weights (the input has {known}){lower}"
            )
    for name, part in {"held_out": slice(held_out), "train": slice(held_out, None)}.items():
        chosen = itertools.chain.from_iterable(found[domain][part] for domain in domains)
        with pa.output_stream(str(folder / f"{name}.jsonl.zst"), compression="zstd") as stream:
            for document in chosen:
                record = {"text": document.text, "meta": {"domain": document.domain}}
                stream.write(json.dumps(record).encode() + b"\n")


def _documents(patterns: Iterable[str], output: Path) -> Iterator[Document]:
    for path in find_files(list(patterns), output):
        yield from iterate_documents(path, Fields())


def content_of(path: Path) -> str:
    """Tells the content of a file, or of all files of a folder with their names, from any other."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            own = hashlib.file_digest(opened, "sha256").hexdigest()
        name = "" if file == path else str(file.relative_to(path))
        digest.update(json.dumps([name, own]).encode())
    return digest.hexdigest()[:16]
