"""Which implementation of each operator runs: PyTorch, Triton, or the compiled code of csrc/.

Every operator has a PyTorch reference and a Triton implementation, some have compiled ones, and
attention also those of others. What runs is chosen once, for all operators and by type of device.
Importable without Triton and GPU.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from data.errors import InputError
from trainer.config import Kernels
from trainer.kernels import library

Backend = Literal["reference", "triton", "c++", "cuda", "flash", "sdpa"]

FUSED: tuple[Backend, ...] = ("flash", "sdpa")
"""FlashAttention, and PyTorch's own fused attention."""
PREFERRED: tuple[Backend, ...] = ("c++", "cuda", *FUSED, "triton", "reference")
"""The order in which an operator takes what there is for it."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator, and what may run it."""

    name: str
    """Its module is trainer.kernels.<name>, and <name>_triton, imported when it first runs."""
    widest: int | None = None
    """Size of the last dimension that its Triton kernels take at most; None: any."""
    compiled: bool = False
    """Whether csrc/ implements it, for CPUs (C++) and GPUs (CUDA)."""
    fused: Callable[[torch.device | None], Backend] | None = None
    """Which of FUSED a GPU (None: any) runs unless Triton is asked for; None: neither."""


_SPACE = torch.library.Library("shorn", "FRAGMENT")
_operators: dict[str, Operator] = {}
_choice: Kernels = "auto"
_without: frozenset[Backend] = frozenset()
# Looked up at every call, also in traced code: hence a table and not a decision.
_running: dict[tuple[str, str], Backend] = {}
_with_triton: dict[str, bool] = {}


def register(operator: Operator) -> None:
    """Adds an operator; called by the module that defines it, after the libraries are loaded."""
    assert operator.name not in _operators, operator.name
    _operators[operator.name] = operator
    _decide()


def define(
    schema: str,
    run: Callable[..., Any] | None,
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> None:
    """Defines a PyTorch operator.

    Args:
        schema: its name in the namespace shorn, arguments and results.
        run: what it runs on every device; None: what compiled libraries register.
        fake: its checks and the shapes of its results.
        save: keeps what its backward pass needs.
        differentiate: its backward pass; None: it has no gradients.
    """
    name = schema.split("(")[0]
    _SPACE.define(schema)
    if run is not None:
        _SPACE.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shorn::{name}", fake, lib=_SPACE)
    if differentiate is not None:
        torch.library.register_autograd(
            f"shorn::{name}", differentiate, setup_context=save, lib=_SPACE
        )


def kernel(name: str, function: str, check: Callable[..., None]) -> Callable[..., Any]:
    """What runs one of an operator's passes: `check` of the arguments, then a function of its
    Triton module. It raises ValueError where there is no kernel for the first argument: the
    operator's public function then runs the reference instead."""

    def run(*arguments: Any) -> Any:
        check(*arguments)
        x = arguments[0]
        module = triton_module(name, x.device)
        if module is None or not runs_kernels(name, x):
            raise ValueError(
                f"{name}: no kernel computes {list(x.shape)} {x.dtype} on {x.device}; the function "
                f"in trainer.kernels.{name} runs PyTorch operations there"
            )
        return getattr(module, function)(*arguments)

    return run


def operators() -> tuple[Operator, ...]:
    """All operators, by name. Imports the modules that define them."""
    for name in ("attention", "cross_entropy", "gather_scale", "rms_norm", "rope", "swiglu"):
        importlib.import_module(f"trainer.kernels.{name}")
    return tuple(_operators[name] for name in sorted(_operators))


def choose(
    choice: Kernels, device: torch.device | str, without: Collection[Backend] = ()
) -> dict[str, Backend]:
    """Chooses the implementation of all operators for the rest of the process.

    Args:
        choice: "reference": PyTorch operations, which torch.compile can fuse. "triton": the Triton
            kernels. "cuda": the compiled code of csrc/, for attention FlashAttention or PyTorch's
            own, and Triton where there is none. "auto": on a GPU as "cuda", with what is installed
            and can be used there (for which FlashAttention is imported); on a CPU the C++ code
            where it was built and the reference elsewhere. CPU tensors never run Triton unless its
            interpreter is on (TRITON_INTERPRET=1) and `choice` asks for it.
        device: what the run computes on.
        without: what is passed over, as if it were not installed.

    Returns:
        What now runs on `device`, by operator.

    Raises:
        InputError: `choice` is unknown, or cannot run on `device`.
    """
    global _choice, _without
    names = [operator.name for operator in operators()]
    kind = torch.device(device).type
    _check(choice, kind)
    _choice, _without = choice, frozenset(without)
    _decide(torch.device(device) if kind == "cuda" and torch.cuda.is_available() else None)
    return {name: which(name, kind) for name in names}


@contextmanager
def chosen(choice: Kernels, device: torch.device | str) -> Iterator[dict[str, Backend]]:
    """`choose`, undone at the end."""
    global _choice, _without
    operators()
    before, running, with_triton = (_choice, _without), dict(_running), dict(_with_triton)
    try:
        yield choose(choice, device)
    finally:
        _choice, _without = before
        _running.update(running)
        _with_triton.update(with_triton)


def which(name: str, device: torch.device | str) -> Backend:
    """The implementation of one operator that runs on a device."""
    kind = device if isinstance(device, str) else device.type
    return _running.get((name, kind), "reference")


def runs_reference(name: str, device: torch.device) -> bool:
    """Whether an operator runs as the PyTorch operations of its reference, which autograd follows
    and torch.compile can fuse, and not as one opaque operator."""
    return which(name, device) == "reference"


def has_kernels(name: str, device: torch.device) -> bool:
    """Whether an operator's Triton implementation runs on a device, or computes there what a fused
    implementation leaves to it."""
    backend = which(name, device)
    return backend == "triton" or (backend in FUSED and _with_triton[device.type])


def runs_kernels(name: str, x: Tensor) -> bool:
    """Whether an operator on x runs its Triton kernels (`has_kernels`): they take neither fp64, nor
    tensors without elements, nor rows that are too wide. Follows from dtype and shape alone, so
    that torch.compile can ask too."""
    widest = _operators[name].widest
    return (
        has_kernels(name, x.device)
        and x.dtype != torch.float64
        and x.numel() > 0
        and (widest is None or x.dim() == 0 or x.shape[-1] <= widest)
    )


def triton_module(name: str, device: torch.device) -> ModuleType | None:
    """The module with an operator's Triton implementation; None without `has_kernels`."""
    return (
        importlib.import_module(f"{__package__}.{name}_triton")
        if has_kernels(name, device)
        else None
    )


def _decide(gpu: torch.device | None = None) -> None:
    """Fills the table; what depends on the GPU is asked of `gpu`, if there is one."""
    for kind in ("cpu", "cuda"):
        _with_triton[kind] = _has_triton(kind) and "triton" not in _without
        for operator in _operators.values():
            _running[operator.name, kind] = _backend(operator, kind, gpu)


def _backend(operator: Operator, kind: str, gpu: torch.device | None) -> Backend:
    found = _candidates(operator, kind, gpu) - _without
    return min(found, key=PREFERRED.index, default="reference")


def _candidates(operator: Operator, kind: str, gpu: torch.device | None) -> set[Backend]:
    """All that can run an operator and is not excluded by the choice."""
    if _choice == "reference":
        return set()
    if _choice == "triton" and _has_triton(kind):
        return {"triton"}
    found: set[Backend] = set()
    if operator.compiled and library.is_loaded(kind):
        found.add("c++" if kind == "cpu" else "cuda")
    if operator.fused is not None and kind == "cuda":
        found |= {"sdpa", operator.fused(gpu)}
    if kind == "cuda" and _has_triton(kind):
        found.add("triton")
    return found


def _has_triton(kind: str) -> bool:
    installed = importlib.util.find_spec("triton") is not None
    return installed and (kind == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def _check(choice: str, kind: str) -> None:
    if choice not in get_args(Kernels):
        raise InputError(f"--kernels must be one of {', '.join(get_args(Kernels))}, got {choice}")
    if choice == "triton" and not _has_triton(kind):
        if kind == "cuda":
            raise InputError(
                "--kernels triton needs the package triton, which is not installed: "
                "pip install triton, or use --kernels auto"
            )
        raise InputError(
            f"--kernels triton needs a GPU, and this run is on {kind}: use --kernels auto"
        )
    if choice == "cuda" and not (kind == "cuda" and library.is_loaded(kind)):
        problem = library.problem(kind) if kind == "cuda" else None
        raise InputError(
            f"--kernels cuda needs a GPU and the compiled operators, and this run is on {kind}"
            f"{'' if problem is None else f'. {problem}'}: {library.BUILD}, or use --kernels auto"
        )
