"""The moments of what pruning keeps, written beside the pruned model.

A parameter of the pruned model is w' = c w, where c are the masks that are folded into it, so the
gradient by w' is that by w over c, its running mean m' = m / c and that of its square v' = v / c^2.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from pruner.extract import Extraction
from trainer.loop import Trainer
from trainer.models.hf import save_tensors
from trainer.moments import FILE, POWERS, metadata
from trainer.parallel import full_tensor


def save_moments(trainer: Trainer, extraction: Extraction, output: Path) -> None:
    """Writes OUTPUT/moments.safetensors for OUTPUT/model; collective.

    Rank 0 holds them whole, in 8 bytes per parameter. Raises InputError on every rank when they
    cannot be written.
    """
    context = trainer.context
    tensors: dict[str, Tensor] = {}
    for kind, power in POWERS.items():
        for name, whole in _gathered(trainer, kind):
            if context.is_main:
                tensors |= _kept(extraction, kind, name, whole, power)
    problem = None
    if context.is_main:
        about = metadata(trainer.config.optimizer, trainer.step, output / "model")
        try:
            save_tensors(tensors, output / FILE, about)
        except (OSError, SafetensorError) as error:
            problem = (
                f"--output {output} cannot be written ({error}); free space and run this again"
            )
    context.raise_first(problem)


def _gathered(trainer: Trainer, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(name, whole moment) of the parameters that have this kind, on the CPU where it is needed."""
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state.get(parameter, {})
        if kind in state:
            whole = full_tensor(state[kind])
            yield name, whole.cpu() if trainer.context.is_main else whole


def _kept(
    extraction: Extraction, kind: str, name: str, moment: Tensor, power: int
) -> dict[str, Tensor]:
    """The moment of the kept part of a parameter, if there is one, by its name in the file."""
    scales = [scale for _, scale in extraction.tensors([(name, torch.ones_like(moment))])]
    parts = extraction.tensors([(name, moment)])
    # A moment is folded like its parameter, that is multiplied by c, once too often.
    return {
        f"{kind}/{new}": part / scale ** (power + 1)
        for (new, part), scale in zip(parts, scales, strict=True)
    }
