"""How models on the Hugging Face hub are named, and what the environment says about the hub."""

import os
import re
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[A-Za-z0-9][\w./-]*)?")
_LOCAL_PREFIXES = (".", "~", "runs/", "models/")
# Of files, which no model is called after.
_FILE_SUFFIXES = (".json", ".jsonl", ".safetensors", ".gguf", ".model", ".bin", ".pt", ".txt")
_TRUE = ("1", "ON", "YES", "TRUE")
_PAGE = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://(?:models/)?)(?P<name>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve|commit)/(?P<revision>[\w.-]+))?(?:[/?#].*)?"
)


def is_offline() -> bool:
    """Whether the user forbids to ask the hub (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE), in the words
    that huggingface_hub takes for true."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def split_revision(name: str) -> tuple[str, str | None]:
    """`org/name@revision` as the name and the branch, tag or commit; None where none is given."""
    bare, _, revision = name.partition("@")
    return bare, revision or None


def may_be_hub_id(text: str) -> bool:
    """Whether `text` has the form of a name on the hub, and not that of a file."""
    return _HUB_ID.fullmatch(text) is not None and not text.lower().endswith(_FILE_SUFFIXES)


def is_hub_id(text: str) -> bool:
    """Whether `text` can name a model on the hub; what looks like a path here never does."""
    looks_local = text.startswith(_LOCAL_PREFIXES) or owner_of(text).exists()
    return may_be_hub_id(text) and not looks_local


def owner_of(name: str) -> Path:
    """The folder that a hub id would lie in if it were a path."""
    return Path(split_revision(name)[0]).parent


def pinned(name: str | Path, folder: Path) -> str | None:
    """`name` of a model on the hub with the commit whose state `folder` of the hub's cache holds,
    as ORG/NAME@COMMIT; None where `folder` is none such, or `name` no hub id."""
    text = str(name)
    cache = folder.parent.parent.name
    if not may_be_hub_id(text) or folder.parent.name != "snapshots" or cache[:8] != "models--":
        return None
    return f"{split_revision(text)[0]}@{folder.name}"


def was_revision(then: str, option: str) -> str:
    """What to say where a name of the hub stood for `then` (as `pinned` gives it) and now stands
    for something else."""
    bare, revision = split_revision(then)
    return f"{bare} was revision {revision}: give {option} {then}"


def id_of_page(text: str) -> str | None:
    """The hub id, with its revision, of the model whose page has the address `text`; None for what
    is no such address."""
    page = _PAGE.fullmatch(text)
    if page is None:
        return None
    revision = page["revision"]
    return page["name"] if revision in (None, "main") else f"{page['name']}@{revision}"


def cached_snapshot(folder: Path) -> Path | None:
    """The newest state of the model that `folder` of the hub's cache (models--ORG--NAME) keeps;
    None for another folder."""
    try:
        newest = (folder / "refs" / "main").read_text("utf-8").strip()
    except (OSError, ValueError):
        newest = ""
    states = sorted(file.parent for file in folder.glob("snapshots/*/config.json"))
    return next((state for state in states if state.name == newest), states[-1] if states else None)
