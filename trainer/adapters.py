"""Adapters as peft stores them, and the plain model that they make when they are merged."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data.errors import InputError, failure
from data.files import replace_folder, write_json
from data.hub import pinned, split_revision
from data.records import read_json
from trainer.finetune_config import LoraOptions
from trainer.models.decoder import CausalLM
from trainer.models.hf import save_tensors
from trainer.models.lora import LoraLinear, adapters_of
from trainer.parallel import DistributedContext, full_tensor

FOLDER = "adapter"
"""Where in its output folder a run leaves its adapter."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""What peft puts in front of the names of the model that it wraps."""


def require_peft() -> None:
    """Raises InputError where the package is missing or broken that writes an adapter's config."""
    try:
        import peft  # noqa: F401
    except Exception as error:  # what it imports can fail in any way
        raise InputError(
            "--method lora writes its adapter in the form of the package peft, which is not there "
            f"or does not work ({type(error).__name__}: {error}): pip install -e '.[lora]', or use "
            "--method last-blocks"
        ) from None


def write_adapter(
    model: CausalLM,
    context: DistributedContext,
    path: Path,
    *,
    base: Path,
    named: str,
    options: LoraOptions,
    targets: Sequence[str],
) -> None:
    """Writes the adapters of `model` to the folder `path`, which peft loads; all ranks take part.

    Args:
        model: its base is the model in the folder `base`.
        context: the ranks.
        path: the folder, replaced if it exists; it appears whole or not at all.
        base: the base's folder.
        named: how the user named it: a hub id is kept, with its commit.
        options: of the adapters.
        targets: modules that have one.

    Raises InputError on every rank when it cannot be written.
    """
    tensors = {}
    for name, layer in adapters_of(model):
        for letter, factor in (("A", layer.lora_a), ("B", layer.lora_b)):
            whole = full_tensor(factor.detach())
            if context.is_main:
                tensors[f"{_PREFIX}{name}.lora_{letter}.weight"] = whole.float().cpu()
    problem = None
    if context.is_main:
        try:
            _write(path, tensors, _config(base, named, options, targets))
        except (OSError, SafetensorError) as error:
            reason = failure(error) if isinstance(error, OSError) else error
            problem = f"cannot write {path}: {reason}"
    context.raise_first(problem)


def _config(base: Path, named: str, options: LoraOptions, targets: Sequence[str]) -> Any:
    from peft import LoraConfig

    hub, alpha = pinned(named, base), options.alpha
    name, revision = (str(base.absolute()), None) if hub is None else split_revision(hub)
    settings: dict[str, Any] = {
        "r": options.r,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": options.dropout,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
    }
    return LoraConfig(**settings)


def _write(path: Path, tensors: dict[str, torch.Tensor], config: Any) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_tensors(tensors, temporary / WEIGHTS, {"format": "pt"})
        config.save_pretrained(str(temporary))
        # peft keeps them as a set, in another order every time.
        settings = read_json(temporary / CONFIG, "")
        settings["target_modules"] = sorted(settings["target_modules"])
        write_json(temporary / CONFIG, settings)
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def merged_tensors(model: CausalLM, *, needed: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole fp32 tensor on the CPU) of the plain model that computes what `model` does, by
    Hugging Face name; gathered one at a time, and every rank must exhaust it.

    A rank on which they are not `needed` leaves them where they are gathered.
    """
    layers = dict(adapters_of(model))
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        if own in ("lora_a", "lora_b"):
            continue
        whole = full_tensor(parameter.detach())
        if own == "weight" and path in layers:
            whole = whole + _update(layers[path])
        yield name, whole.cpu() if needed else whole


def _update(layer: LoraLinear) -> torch.Tensor:
    """What the adapter adds to its matrix [out, in]; collective."""
    factors = full_tensor(layer.lora_b.detach()), full_tensor(layer.lora_a.detach())
    return layer.scale * (factors[0] @ factors[1])
