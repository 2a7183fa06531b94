"""Training text from the running Python installation, in four domains.

* `stdlib`: source of the standard library
* `headers`: C and C++ headers that installed packages ship
* `reference`: docstrings of torch and numpy, one document per module
* `docs`: Python's help topics, package descriptions, .md, .rst and .txt files

Nothing is fetched: every file belongs to the interpreter that runs this, or to a package it has.
"""

import ast
import hashlib
import importlib.metadata
import io
import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from data.errors import InputError
from data.files import partial_path, replace_file
from data.progress import Progress

DOCUMENT_CHARACTERS = 12_000
"""Longer files are cut at a line end, so that no single one dominates a domain."""
SHORTEST_DOCUMENT = 400
SMALLEST_DOMAIN_BYTES = 200_000

Texts = Iterator[tuple[str, str]]


def collect(output: Path, bytes_per_domain: int) -> dict[str, int]:
    """Write OUTPUT/<domain>.jsonl.zst, about `bytes_per_domain` UTF-8 bytes each.

    Records are {"text", "meta": {"domain", "path"}}. Files come in an order fixed by the hash of
    their path, so the selection is spread over the whole installation and always the same there.
    Returns bytes of text per domain. Raises InputError when the installation holds too little text.
    """
    output.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    sizes: dict[str, int] = {}
    total = bytes_per_domain * len(DOMAINS)
    with Progress("collect text", total=total, unit="B") as bar:
        for domain, texts in DOMAINS.items():
            sizes[domain] = _write_domain(
                output / f"{domain}.jsonl.zst", domain, texts(), bytes_per_domain, seen, bar
            )
    for domain, size in sizes.items():
        if size < min(SMALLEST_DOMAIN_BYTES, bytes_per_domain // 2):
            raise InputError(
                f"this Python installation holds only {size:,} bytes of {domain!r} text, fewer "
                f"than {SMALLEST_DOMAIN_BYTES:,}; run from an environment made by `make install`"
            )
    return sizes


def _write_domain(
    path: Path, domain: str, texts: Texts, budget: int, seen: set[bytes], bar: Progress
) -> int:
    """Write one domain's documents until `budget` bytes; returns the bytes written."""
    written = 0
    buffer = io.StringIO()
    for name, raw in texts:
        text = _trimmed(raw)
        size = len(text.encode("utf-8"))
        digest = hashlib.sha256(" ".join(text.split()).encode("utf-8")).digest()
        if len(text) < SHORTEST_DOCUMENT or digest in seen:
            continue
        seen.add(digest)
        record = {"text": text, "meta": {"domain": domain, "path": name}}
        buffer.write(json.dumps(record, ensure_ascii=False) + "\n")
        written += size
        bar.update(size, domain=domain)
        if written >= budget:
            break
    partial = partial_path(path)
    with pa.output_stream(str(partial), compression="zstd") as stream:
        stream.write(buffer.getvalue().encode("utf-8"))
    replace_file(partial, path)
    return written


def _trimmed(text: str) -> str:
    if len(text) <= DOCUMENT_CHARACTERS:
        return text.strip()
    return text[:DOCUMENT_CHARACTERS].rpartition("\n")[0].strip()


def _read(path: Path) -> str:
    """Text of a UTF-8 file; empty for anything else, which the length check then leaves out."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _hashed_order(
    root: Path, pattern: str, skip: tuple[str, ...] = ()
) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of matching files in hash order; `skip` are folder names left out."""
    names = []
    for path in root.rglob(pattern):
        relative = path.relative_to(root)
        if path.is_file() and not any(part in skip for part in relative.parts):
            names.append(relative.as_posix())
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield name, root / name


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _package(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    return Path(str(importlib.metadata.distribution(name).locate_file(name)))


def _stdlib_source() -> Texts:
    skip = (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "pydoc_data",
        "encodings",
    )
    for name, path in _hashed_order(_stdlib(), "*.py", skip):
        yield name, _read(path)


def _headers() -> Texts:
    roots = [_package("torch"), _package("numpy"), Path(sysconfig.get_path("include"))]
    for root in roots:
        for pattern in ("*.h", "*.hpp"):
            # ATen/ops holds thousands of generated, almost identical headers.
            for name, path in _hashed_order(root, pattern, ("ops",)):
                yield f"{root.name}/{name}", _read(path)


def _reference() -> Texts:
    for package in ("torch", "numpy"):
        for name, path in _hashed_order(_package(package), "*.py", ("test", "tests", "testing")):
            yield f"{package}/{name}", "\n\n".join(_docstrings(_read(path)))


def _docstrings(source: str) -> Iterator[str]:
    """Every docstring of a module under the name it documents."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 80:
                yield text if isinstance(node, ast.Module) else f"{node.name}\n\n{text}"


def _docs() -> Texts:
    topics = _stdlib() / "pydoc_data" / "topics.py"
    for name, text in _topics(_read(topics)):
        yield f"pydoc_data/{name}", text
    for distribution in sorted(
        importlib.metadata.distributions(), key=lambda item: str(item.metadata["Name"])
    ):
        _, _, description = (distribution.read_text("METADATA") or "").partition("\n\n")
        yield f"{distribution.metadata['Name']}/description", description
    for root in (_stdlib(), _site_packages()):
        for pattern in ("*.rst", "*.md", "*.txt"):
            skip = ("site-packages", "test", "tests", "data", "licenses", "templates")
            for name, path in _hashed_order(root, pattern, skip):
                if "license" not in name.lower() and "notice" not in name.lower():
                    yield name, _read(path)


def _topics(source: str) -> Iterator[tuple[str, str]]:
    """The `topics` dictionary of pydoc_data, read from its source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict) and len(node.keys) > 10:
            topics: dict[str, str] = ast.literal_eval(node)
            yield from sorted(topics.items())
            return


DOMAINS: dict[str, Callable[[], Texts]] = {
    "stdlib": _stdlib_source,
    "headers": _headers,
    "reference": _reference,
    "docs": _docs,
}
