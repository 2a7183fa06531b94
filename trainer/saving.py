"""What a run leaves behind: the model's folder and the report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError, failure
from data.files import require_writable, write_json
from data.log import logger
from data.records import read_json
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import save_model
from trainer.parallel import DistributedContext, full_tensor


def full_tensors(model: CausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole fp32 tensor on the CPU), gathered one at a time; every rank must exhaust it."""
    for name, parameter in model.named_parameters():
        yield name, full_tensor(parameter.detach()).cpu()


def save_pretrained(
    model: CausalLM, context: DistributedContext, path: Path, *, tokenizer_from: Path
) -> None:
    """Writes `path` as a Hugging Face folder, in the source's dtype (bf16 when it states none).

    All ranks take part.
    """
    stated = model.config.hf.get("dtype") or model.config.hf.get("torch_dtype")
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(str(stated), torch.bfloat16)
    save_tensors_of(full_tensors(model), model.config, context, path, tokenizer_from, dtype)


def save_tensors_of(
    tensors: Iterator[tuple[str, torch.Tensor]],
    config: ModelConfig,
    context: DistributedContext,
    path: Path,
    tokenizer_from: Path,
    dtype: torch.dtype,
) -> None:
    """Writes `tensors`, whose gathering is collective, from rank 0.

    Raises InputError on every rank when they cannot be written.
    """
    problem = None
    if context.is_main:
        try:
            save_model(config, tensors, path, tokenizer_from, dtype)
        except InputError as error:
            problem = str(error)
    # Every rank goes through all tensors, also rank 0 after a failure.
    for _ in tensors:
        pass
    context.raise_first(problem)


def publish(context: DistributedContext, report: dict[str, Any], *paths: Path | str | None) -> None:
    """Writes a report to all `paths` (None: nowhere) from rank 0. Raises InputError on every
    rank."""
    problem = None
    if context.is_main:
        try:
            for path in paths:
                if path is not None:
                    write_json(Path(path), report)
        except OSError as error:
            problem = f"cannot write {path}: {failure(error)}, or choose another file"
    context.raise_first(problem)


def require_copy(context: DistributedContext, path: Path | str | None) -> None:
    """Raises InputError on every rank when rank 0 could not write the report's copy (--json)."""
    if path is not None:
        context.raise_on_any_rank(
            lambda: require_writable(Path(path), "--json") if context.is_main else None
        )


def log_finished(context: DistributedContext, report: Path, copy: str | None) -> None:
    """Says that the run of `report` is finished, and copies the report to `copy` (--json)."""
    logger.info(f"{report.parent}: this run is finished; its report is {report}")
    content = context.raise_on_any_rank(lambda: read_json(report, "restore it from a copy"))
    publish(context, content, copy)
