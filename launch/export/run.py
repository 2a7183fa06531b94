"""What `python -m launch.export` does: checks, files, comparison, JSON."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from data.files import partial_path, replace_file, require_writable, sync_file, write_copy
from data.locks import folder_lock
from data.log import logger
from launch.export.architecture import architecture_of, notes_of
from launch.export.checks import (
    Reference,
    compare_llama_cpp,
    compare_tensors,
    compare_transformers,
    reference_of,
)
from launch.export.config import ExportConfig
from launch.export.gguf_file import Plan, bytes_of, made_of, plan_of, write
from launch.export.vocabulary import Vocabulary, read_vocabulary
from launch.origin import files_fingerprint
from trainer.disk import free_bytes, size_text, why_unwritten
from trainer.finished import REPORTS
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import check_weights, load_config, load_model
from trainer.models.sources import resolve_model, weights_fingerprint
from trainer.models.weights import stored_dtype
from trainer.output import run_of

_METADATA_BYTES = 64 << 20
"""More than tokens and settings of a file take."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The model, described and checked; no weights yet."""

    folder: Path
    shape: ModelConfig
    vocabulary: Vocabulary
    plans: list[Plan]


def run(config: ExportConfig) -> dict[str, Any]:
    """Writes the files, compares them and returns what --json writes.

    Raises InputError before anything is written for a model that a format cannot hold.
    """
    require_writable(config.json, "--json")
    if find_spec("gguf") is None:
        raise InputError("--to gguf needs the package gguf: pip install 'shorn[export]'")
    opened = _open(config)
    threads = config.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    for note in notes_of(opened.shape):
        logger.warning(note)
    output = Path(config.output)
    with folder_lock(output, "exporting"):
        waiting = [plan for plan in opened.plans if not _is_there(plan)]
        model, reference = _loaded(config, opened)
        _require_room(output, waiting, model)
        checks = Checks(model, opened.shape, reference, threads)
        files = []
        for plan in opened.plans:
            new = plan in waiting
            entry = _write(plan, checks, opened.vocabulary) if new else checks.of(plan, plan.path)
            files.append(entry | {"bytes": plan.path.stat().st_size})
            _tell(files[-1])
        if reference is not None and find_spec("xllamacpp") is None:
            logger.info("llama.cpp was not asked: pip install xllamacpp, and run this again")
    whole = {
        "model": str(opened.folder),
        "weights": weights_fingerprint(opened.folder),
        "parameters": opened.shape.num_parameters(),
        "files": files,
    }
    write_copy(config.json, whole)
    return whole


def _open(config: ExportConfig) -> Opened:
    folder = resolve_model(config.model, option="MODEL")
    shape = load_config(folder)
    output = Path(config.output)
    # Tokenizer and settings go into the files as well.
    model = f"{weights_fingerprint(folder)}-{files_fingerprint(folder)}"
    if output.resolve() == folder.resolve():
        raise InputError(f"--output {output}: is the model's own folder; name another")
    architecture_of(shape)
    vocabulary = read_vocabulary(folder, shape.vocab_size)
    check_weights(folder, shape)
    name = config.name or _name_of(folder)
    plans = []
    for word in config.to:
        kind = word.removeprefix("gguf-")
        plans.append(plan_of(output / f"{name}-{kind}.gguf", kind, shape, model, name))
    return Opened(folder, shape, vocabulary, plans)


def _name_of(folder: Path) -> str:
    """A run's name for its model, else the folder's; of the hub's cache that of the model."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    run = run_of(folder)
    named = run if any((run / name).exists() for name in (*REPORTS, "run.json")) else folder
    return named.name if named.name not in ("", "..") else named.resolve().name


def _is_there(plan: Plan) -> bool:
    """Whether the file is there already. Raises InputError for another file of that name."""
    if not os.path.lexists(plan.path):
        return False
    found = made_of(plan.path) if plan.path.is_file() else None
    if found == {"model": plan.model, "type": plan.type}:
        logger.info(f"{plan.path}: is there already, of this model")
        return True
    what = (
        "was made of another model, or before this one changed"
        if found
        else "is no file that this command has written"
    )
    raise InputError(f"{plan.path}: {what}; name another --output or --name, or move it away")


def _require_room(output: Path, plans: list[Plan], model: CausalLM) -> None:
    needed = sum(bytes_of(model, plan.type) + _METADATA_BYTES for plan in plans)
    free = free_bytes(output)
    if free < needed:
        raise InputError(
            f"{output}: no room for {len(plans)} files of {size_text(needed)} together, "
            f"{size_text(free)} are free; free some space, or name another --output"
        )


def _loaded(config: ExportConfig, opened: Opened) -> tuple[CausalLM, Reference | None]:
    """The model, as it is stored; in fp32, with what it says of a text, where others are to be
    compared with it."""
    if config.check == "logits":
        model = load_model(opened.folder)
        return model, reference_of(model, opened.folder)
    stored = stored_dtype(opened.folder) or "float32"
    return load_model(opened.folder, dtype=getattr(torch, stored)), None


@dataclass(frozen=True, slots=True)
class Checks:
    """What a file is compared with."""

    model: CausalLM
    shape: ModelConfig
    reference: Reference | None
    """None where tensors alone are compared."""
    threads: int

    def of(self, plan: Plan, path: Path) -> dict[str, Any]:
        """What the file at `path` is, and how far from the model. Raises InputError where it is not
        what `plan` says, or others compute something else from it."""
        entry: dict[str, Any] = {"format": f"gguf-{plan.type}", "path": str(plan.path)}
        entry["architecture"] = plan.architecture
        entry["tensors"] = compare_tensors(plan, path, self.model)
        if self.reference is not None:
            asked = (plan, path, self.reference)
            entry["transformers"] = compare_transformers(*asked, self.shape)
            entry["llama_cpp"] = compare_llama_cpp(*asked, self.model, self.threads)
        return entry


def _write(plan: Plan, checks: Checks, vocabulary: Vocabulary) -> dict[str, Any]:
    """Writes a file, which appears once it was compared; returns what was."""
    partial = partial_path(plan.path)
    try:
        write(plan, partial, checks.model, vocabulary)
        sync_file(partial)
        # What NumPy writes may end where the disk is full, and not say so.
        compared = checks.of(plan, partial)
        replace_file(partial, plan.path)
        return compared
    except OSError as error:
        why = why_unwritten(error, plan.path.parent)
        raise InputError(f"{plan.path}: cannot be written: {why}") from None
    finally:
        partial.unlink(missing_ok=True)


def _tell(entry: dict[str, Any]) -> None:
    rounding = entry["tensors"]["largest_rounding"]
    parts = [
        f"{entry['path']}: {size_text(entry['bytes'])}, {entry['tensors']['tensors']} tensors",
        f"largest rounding {rounding:.2g} of a tensor's largest weight",
    ]
    seen = entry.get("transformers")
    if seen:
        parts.append(
            f"transformers: logits within {seen['largest_difference']:.2g} of the largest, "
            f"{seen['same_top']:.0%} same first choices"
        )
    seen = entry.get("llama_cpp")
    if seen:
        parts.append(
            f"llama.cpp: same tokens of a text, log-probabilities within "
            f"{seen['largest_difference_nats']:.2g} nats, {seen['same_greedy']} of "
            f"{seen['of']} greedy tokens the same"
        )
    logger.info("; ".join(parts))
