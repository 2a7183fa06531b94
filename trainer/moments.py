"""The optimizer's moments of a sheared model, with which its training goes on.

They lie in one file beside the model: tensors `exp_avg/NAME`, `exp_avg_sq/NAME` and, of matrices
that Muon moves, `momentum_buffer/NAME` in fp32, and what they belong to as metadata. Any number of
ranks can load them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from trainer.models.decoder import CausalLM
from trainer.models.sources import weights_fingerprint
from trainer.models.weights import open_tensors
from trainer.parallel import local_region

FILE = "moments.safetensors"
"""In the output folder of a shearing run."""
POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "momentum_buffer": 1}
"""What is kept of a parameter, and the power of the gradient that it is an average of."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments that training can go on with."""

    path: Path
    steps: int
    """Optimizer steps that they come from."""


def metadata(optimizer: str, steps: int, model: Path) -> dict[str, str]:
    """What the file says of itself: optimizer, its steps, and the model folder beside it."""
    return {"optimizer": optimizer, "steps": str(steps), "model": weights_fingerprint(model)}


def find_moments(run: Path, model: Path, optimizer: str) -> tuple[Moments | None, str | None]:
    """The moments in the folder `run` for the model folder `model`, and what to say where those
    that are there cannot be used.

    Raises InputError when the file cannot be read.
    """
    path = run / FILE
    if not path.is_file():
        return None, None
    with open_tensors(path) as stored:
        found = stored.metadata() or {}
    steps = found.get("steps", "")
    if not steps.isdecimal():
        raise InputError(f"{path}: was not written by shearing; {_WITHOUT}")
    if found.get("model") != weights_fingerprint(model):
        return None, f"{path} is of other weights than {model} holds now"
    if found.get("optimizer") != optimizer:
        return None, f"{path} is {found.get('optimizer')}'s, and --optimizer is {optimizer}"
    return Moments(path, int(steps)), None


_WITHOUT = "restore it from a copy, or start with empty moments: --no-moments"


def load_moments(moments: Moments, model: CausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer of `model` its moments; every rank reads only the rows it holds.

    Raises InputError when the file is not that of this model and this optimizer, or damaged.
    """
    path = moments.path
    with open_tensors(path) as stored:
        names = set(stored.keys())
        for name, parameter in model.named_parameters():
            kinds = [kind for kind in POWERS if f"{kind}/{name}" in names]
            if kinds not in (["exp_avg", "exp_avg_sq"], ["momentum_buffer"]):
                raise InputError(f"{path}: holds no moments of {name}; {_WITHOUT}")
            state: dict[str, Any] = optimizer.state[parameter]
            if "exp_avg" in kinds:
                state["step"] = torch.tensor(float(moments.steps), device=parameter.device)
            for kind in kinds:
                state[kind] = torch.zeros_like(parameter, requires_grad=False)
                local, region = local_region(state[kind])
                part = stored.get_slice(f"{kind}/{name}")
                if part.get_shape() != list(parameter.shape):
                    shapes = f"{part.get_shape()}, not {list(parameter.shape)}"
                    raise InputError(f"{path}: {kind}/{name} is {shapes}; {_WITHOUT}")
                if local.numel():
                    local.copy_(part[region])
