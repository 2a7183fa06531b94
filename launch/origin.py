"""What the stages in an output folder work on, told by content and not by path."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import InputError, failure
from data.files import write_json
from data.records import fits, read_json
from data.tokenizers import holds_tokenizer, load_tokenizer
from launch.stages import MARKERS
from trainer.models.sources import resolve_model, weights_fingerprint

FILE = "origin.json"


def first_names(
    output: Path, names: Mapping[str, Any], contents: Mapping[str, str]
) -> dict[str, Any]:
    """How the first start into `output` named what its stages work on, by option; as this start
    does where nothing is known of one.

    Args:
        output: the folder, held by the caller.
        names: how this start names it, by option.
        contents: fingerprints of what some of the options name. Names may change, these may not.

    Raises InputError where `output` holds results of something else, or cannot be written.
    """
    path = output / MARKERS / FILE
    if not path.exists():
        try:
            write_json(path, {"names": dict(names), "contents": dict(contents)})
        except OSError as error:
            raise InputError(f"{path}: {failure(error)}") from None
        return dict(names)
    fix = f"delete it, if {output} holds results of the same {' and '.join(contents)}"
    known = read_json(path, fix, keys={"names": dict, "contents": dict})
    form = {
        f"{option}?": [str] if isinstance(name, list) else str for option, name in names.items()
    }
    if not fits(known["names"], form):
        raise InputError(f"{path}: `names` is not what this version writes; {fix}")
    first = {option: known["names"].get(option, name) for option, name in names.items()}
    for option, content in contents.items():
        if known["contents"].get(option, content) != content:
            changed = first[option] == names[option]
            why = "has changed since" if changed else f"is not {first[option]}, of which"
            raise InputError(
                f"{option} {names[option]}: {why} the results in --output {output} were made; name "
                "another --output"
            )
    return first


def model_fingerprint(source: str | Path) -> str:
    """Hash of the weights and the tokenizer of a model, named as --source takes it."""
    folder = resolve_model(source, option="--source")
    parts = [weights_fingerprint(folder)]
    if holds_tokenizer(folder):
        parts.append(load_tokenizer(folder).fingerprint)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
