"""The models that are measured: folders and saved steps of a run, opened and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError, MissingInput
from data.reader import TokenReader
from data.tokenizers import holds_tokenizer, load_tokenizer
from launch.evaluate.config import EvaluateConfig
from launch.evaluate.texts import Document, Text, tokenized
from trainer.checkpoint_files import committed
from trainer.checkpoint_model import SavedStep, load_step, read_step
from trainer.finished import REPORTS
from trainer.inputs import check_tokenizer
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_config, load_model
from trainer.models.sources import resolve_model, weights_fingerprint
from trainer.parallel import DistributedContext


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model, opened and checked; no weights yet."""

    name: str
    """As the user wrote it; "step 100" of a checkpoint."""
    path: Path
    """Its Hugging Face folder, or the checkpoint."""
    folder: Path
    """Where its tokenizer is."""
    weights: str
    """Tells its weights from any other."""
    shape: ModelConfig
    documents: list[Document]
    """The texts of --text in its tokens."""
    saved: SavedStep | None
    """None for a model's folder."""

    def load(self, device: torch.device, dtype: torch.dtype) -> CausalLM:
        """The model. Raises InputError for damaged weights."""
        if self.saved is None:
            return load_model(self.path, device, dtype)
        return load_step(self.saved, device, dtype)


def open_candidates(
    config: EvaluateConfig,
    reader: TokenReader | None,
    texts: Sequence[Text],
    context: DistributedContext,
) -> list[Candidate]:
    """The models of --model and then the steps of --checkpoints. Raises InputError for what could
    not be measured."""
    with context.rank_zero_first():
        paths = [resolve_model(model) for model in config.models]
    # Configs first: transformers, which reads tokenizers, then knows models of uneven blocks.
    shapes = [load_config(path) for path in paths]
    opened: list[tuple[str, Path, Path, ModelConfig, SavedStep | None]] = [
        (name, path, path, shape, None)
        for name, path, shape in zip(config.models, paths, shapes, strict=True)
    ]
    if config.checkpoints is not None:
        run = Path(config.checkpoints)
        # A run that is training may save another one while the ranks look.
        seen = context.raise_on_any_rank(lambda: _steps(run) if context.is_main else [])
        steps: list[SavedStep] = context.broadcast(seen)
        folder = _tokenizer_of(run, paths, needed=bool(texts or config.tasks))
        opened += [(f"step {step.step}", step.path, folder, step.shape, step) for step in steps]
    if reader is not None:
        _require_one_tokenizer(config, [(name, folder) for name, _, folder, *_ in opened])
    found = []
    for name, path, folder, shape, saved in opened:
        _check_shape(config, shape, reader)
        if reader is not None:
            check_tokenizer(reader, shape, folder, str(config.data))
        options: dict[str, Any] = {"window": config.window, "stride": config.stride}
        documents = [tokenized(text, folder, shape, rule=config.bos, **options) for text in texts]
        weights = weights_fingerprint(path) if saved is None else saved.weights
        found.append(Candidate(name, path, folder, weights, shape, documents, saved))
    return found


def _steps(run: Path) -> list[SavedStep]:
    """The saved steps of a run, oldest first. Raises InputError where there are none."""
    folder = run / "checkpoints"
    found = committed(folder)
    if not found:
        why = "such folder" if not run.is_dir() else f"committed checkpoint in {folder}"
        finished = any((run / name).is_file() for name in REPORTS)
        raise MissingInput(
            f"--checkpoints {run}: no {why}"
            + ("; the run is finished, and removed its own" if finished else "")
            + ". Name the output folder of a run of `shorn cpt` or `shorn finetune --method full`; "
            "--keep-all-checkpoints keeps all of them, also of a finished run"
        )
    return [read_step(path) for path in found]


def _tokenizer_of(run: Path, models: Sequence[Path], *, needed: bool) -> Path:
    """Where the tokenizer of a run's model is: beside its result, or else with the first of
    `models`. Raises InputError where it is `needed` and there is none."""
    for folder in (run / "model", *models[:1]):
        if holds_tokenizer(folder):
            return folder
    if needed:
        raise InputError(
            f"--checkpoints {run}: checkpoints hold no tokenizer, which --text and --tasks need; "
            "name the model that the run started from with --model"
        )
    return run


def _require_one_tokenizer(config: EvaluateConfig, models: Sequence[tuple[str, Path]]) -> None:
    """Raises InputError for models whose tokenizers differ: no tokens are those of both."""
    first: tuple[str, Any] | None = None
    for name, folder in models:
        if holds_tokenizer(folder):
            probe = load_tokenizer(folder).probe()
            if first is not None and probe != first[1]:
                raise InputError(
                    f"--data {config.data}: {first[0]} and {name} have different tokenizers, so "
                    "their losses per token cannot be compared; measure each in a call of its own, "
                    "or both on --text FILE, by bits per byte"
                )
            first = first or (name, probe)


def _check_shape(config: EvaluateConfig, shape: ModelConfig, reader: TokenReader | None) -> None:
    limit = shape.max_position_embeddings
    lengths = {"--seq-len": config.seq_len if reader else 0, "--window": config.window}
    if not config.text:
        del lengths["--window"]
    for flag, length in lengths.items():
        if length > limit:
            raise InputError(
                f"{flag} {length}: the model was made for at most {limit} positions; "
                f"use {flag} {limit} or less"
            )
