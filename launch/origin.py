"""What the stages in an output folder work on, told by content and not by path."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import InputError, failure
from data.files import write_json
from data.hub import was_revision
from data.records import fits, read_json
from data.tokenizers import holds_tokenizer, load_tokenizer
from launch.stages import MARKERS
from trainer.models.hf import load_config
from trainer.models.sources import resolve_model, weights_fingerprint

FILE = "origin.json"
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*.jinja")
"""Config, tokenizer and templates, which decide with the weights what a model does."""


def first_names(
    output: Path,
    names: Mapping[str, Any],
    contents: Mapping[str, str],
    revisions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """How the first start into `output` named what its stages work on, by option; as this start
    does where nothing is known of one.

    Args:
        output: the folder, held by the caller.
        names: how this start names it, by option.
        contents: fingerprints of what some of the options name. Names may change, these may not.
        revisions: what hub ids among the names stand for (`data.hub.pinned`).

    Raises InputError where `output` holds results of something else, or cannot be written.
    """
    path = output / MARKERS / FILE
    if not path.exists():
        try:
            first = {"names": dict(names), "contents": dict(contents)}
            write_json(path, first | ({"revisions": dict(revisions)} if revisions else {}))
        except OSError as error:
            raise InputError(f"{path}: {failure(error)}") from None
        return dict(names)
    fix = f"delete it, if {output} holds results of the same {' and '.join(contents)}"
    known = read_json(path, fix, keys={"names": dict, "contents": dict})
    form = {
        f"{option}?": [str] if isinstance(name, list) else str for option, name in names.items()
    }
    for name, wanted in (("names", form), ("revisions", {"*": str})):
        if not fits(known.get(name, {}), wanted):
            raise InputError(f"{path}: `{name}` is not what this version writes; {fix}")
    first = {option: known["names"].get(option, name) for option, name in names.items()}
    for option, content in contents.items():
        former = known["contents"].get(option, content)
        # Former versions wrote nothing of a tokenizer's settings, or of the model's.
        if former != content and not content.startswith(f"{former}:"):
            changed = first[option] == names[option]
            why = "has changed since" if changed else f"is not {first[option]}, of which"
            then = known.get("revisions", {}).get(option)
            moved = then is not None and then != (revisions or {}).get(option)
            fix = f"{was_revision(then, option)}, or name" if moved else "name"
            raise InputError(
                f"{option} {names[option]}: {why} the results in --output {output} were made; "
                f"{fix} another --output"
            )
    return first


def model_fingerprint(source: str | Path, option: str = "--source") -> str:
    """Hash of the weights and the tokenizer of a model, named as `option` takes it; behind colons
    that of the ids which the tokenizer's settings decide, and that of the model's settings."""
    folder = resolve_model(source, option=option)
    parts, ids = [weights_fingerprint(folder)], ":"
    if holds_tokenizer(folder):
        tokenizer = load_tokenizer(folder)
        parts.append(tokenizer.fingerprint)
        ids = f":{_hash(json.dumps(tokenizer.record().ids, sort_keys=True))}"
    return f"{_hash(' '.join(parts))}{ids}:{load_config(folder).key}"


def files_fingerprint(folder: Path) -> str:
    """Hash of the small files of a model's folder. Raises InputError for one that cannot be
    read."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SMALL_FILES for path in folder.glob(pattern)):
        try:
            digest.update(path.name.encode() + path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: {failure(error)}") from None
    return digest.hexdigest()[:16]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
