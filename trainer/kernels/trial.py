"""Operators tried once before a run: what fails is replaced, and that is said, or is refused.

What is installed need not work: a library made for a newer driver loads and fails at its first
launch, and Triton needs a C compiler to launch anything. A trial costs no more than the first step
would spend on compiling.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.errors import InputError
from data.log import logger
from trainer.config import Kernels
from trainer.kernels import attention_flash, library, registry
from trainer.kernels.attention import attention, sdpa_backend
from trainer.kernels.cross_entropy import cross_entropy_
from trainer.kernels.gather_scale import gather_scale, gather_scale_backward
from trainer.kernels.registry import Backend
from trainer.kernels.rms_norm import rms_norm
from trainer.kernels.rope import rope
from trainer.kernels.swiglu import swiglu

ROWS, WIDTH = 16, 64
LARGEST_DIFFERENCE = 0.05
"""From the reference, over its largest value: bf16 rounds at different places."""
MESSAGE_CHARACTERS = 300
CUDNN = 91501
"""The first version of cuDNN whose attention PyTorch prefers (docs/decisions/0011)."""

NAMES: dict[Backend, str] = {
    "c++": "the compiled C++ code",
    "cuda": "the compiled CUDA code",
    "flash": "FlashAttention",
    "sdpa": "PyTorch's own fused attention",
    "triton": "Triton",
    "reference": "PyTorch",
}


class WrongResultError(Exception):
    """An implementation computes something else than the reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one rank found; picklable."""

    running: dict[str, Backend] = field(default_factory=dict)
    """What was chosen, by operator."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why the chosen implementation of an operator cannot be used."""
    notes: tuple[str, ...] = ()
    """What is installed, and passed over because it cannot even be loaded."""
    refusal: str | None = None
    """Why the run cannot go on."""


def settle(
    choice: Kernels,
    device: torch.device,
    gather: Callable[[Outcome], list[Outcome]] = lambda outcome: [outcome],
) -> dict[str, Backend]:
    """`registry.choose`, and each operator that is not left to the reference tried forward and
    backward. With "auto" the next implementation replaces one that fails, with a warning.

    Args:
        choice: as `registry.choose` takes it.
        device: what this rank computes on.
        gather: every rank's outcome in rank order, on every rank, so that all end with the same.

    Returns:
        What now runs on every rank, by operator.

    Raises:
        InputError: on every rank. `registry.choose` refuses, an implementation fails that was asked
            for, or one Triton kernel fails and others do not: a fault that those may share.
    """
    without: set[Backend] = set()
    told: set[str] = set()
    while True:
        outcomes = gather(_outcome(choice, device, without))
        for refusal in (outcome.refusal for outcome in outcomes if outcome.refusal is not None):
            raise InputError(refusal)
        for note in (note for outcome in outcomes for note in outcome.notes):
            if note not in told:
                told.add(note)
                logger.warning(note)
        found = _differences(outcomes) or _failures(choice, device, outcomes)
        if not found:
            return outcomes[0].running
        for backend, message in found.items():
            logger.warning(f"{message}: {NAMES[backend]} is passed over")
        without |= found.keys()


def describe(running: dict[str, Backend], device: torch.device) -> str:
    """What runs, by operator, and which of PyTorch's own attentions where a GPU has several."""
    words = {name: str(backend) for name, backend in running.items()}
    if device.type == "cuda" and running["attention"] in ("sdpa", "reference"):
        words["attention"] += f" ({_own_attention(device)})"
    return ", ".join(f"{name} {by}" for name, by in words.items())


def _own_attention(device: torch.device) -> str:
    """What PyTorch takes, and on GPUs where it prefers cuDNN's why it takes another."""
    found, version = sdpa_backend(device), torch.backends.cudnn.version() or 0
    prefers = torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))
    if prefers and found != "cudnn" and version < CUDNN:
        return f"{found}; cuDNN's is preferred from cuDNN 9.15.1 on, as PyTorch for CUDA 13 has it"
    return found


def _outcome(choice: Kernels, device: torch.device, without: set[Backend]) -> Outcome:
    try:
        running = registry.choose(choice, device, without)
        failures = {}
        for name, backend in running.items():
            reason = None if backend == "reference" else _failure(name, device)
            if reason is not None:
                failures[name] = reason
    except InputError as error:
        return Outcome(refusal=str(error))
    notes = () if choice in ("reference", "triton") else tuple(_notes(device.type))
    return Outcome(running=running, failures=failures, notes=notes)


def _notes(kind: str) -> Iterator[str]:
    problem = library.problem(kind)
    if problem is not None:
        yield f"{problem}: the compiled operators are passed over. Build them: {library.BUILD}"
    if kind == "cuda":
        for module, reason in attention_flash.problems().items():
            yield f"{module} is passed over, its import fails: {_shorten(reason)}"


def _differences(outcomes: list[Outcome]) -> dict[Backend, str]:
    """What to pass over so that all ranks run the same: what some would run and others would not,
    the most preferred of each operator."""
    found: dict[Backend, str] = {}
    for name in outcomes[0].running:
        chosen = [outcome.running[name] for outcome in outcomes]
        first = min(chosen, key=registry.PREFERRED.index)
        others = [rank for rank, backend in enumerate(chosen) if backend != first]
        if others:
            would = f"rank {others[0]} would run {NAMES[chosen[others[0]]]}"
            found[first] = f"{name}: not every rank has {NAMES[first]}, {would}"
    return found


def _failures(choice: Kernels, device: torch.device, outcomes: list[Outcome]) -> dict[Backend, str]:
    """What to pass over because it fails on some rank, and what to say of it."""
    found: dict[Backend, str] = {}
    for rank, outcome in enumerate(outcomes):
        for name, reason in outcome.failures.items():
            backend = outcome.running[name]
            place = f" on rank {rank}" if len(outcomes) > 1 else ""
            message = f"{name} fails in {NAMES[backend]}{place}: {reason}"
            message += library.origin(device.type) if backend in ("c++", "cuda") else ""
            if choice != "auto":
                raise InputError(
                    f"--kernels {choice}: {message}. Use --kernels auto, which passes over what "
                    "does not work, or --kernels reference"
                )
            if backend == "triton" and not _fails_throughout(outcome):
                raise InputError(
                    f"{message}. Other Triton kernels work here: use --kernels reference"
                )
            found.setdefault(backend, message)
    return found


def _fails_throughout(outcome: Outcome) -> bool:
    """Whether nothing of Triton works: without a C compiler, say, or on a GPU it does not know."""
    using = {name for name, backend in outcome.running.items() if backend == "triton"}
    return using <= outcome.failures.keys()


def _failure(name: str, device: torch.device) -> str | None:
    """Why an operator as it is chosen cannot be used; None: it computes what the reference does.

    Raises InputError where nothing can be tried, also not another implementation.
    """
    try:
        with registry.chosen("reference", device):
            expected = _results(name, device)
    except Exception as error:
        raise InputError(
            f"PyTorch itself cannot compute {name} on {device} ({_shorten(error)}): see what else "
            "uses that device, and whether its driver fits this PyTorch"
        ) from error
    try:
        found = _results(name, device)
        _require_same(found, expected)
    # A compiler, a driver or a package fails in many ways.
    except Exception as error:
        _require_answer(name, device, error)
        return _shorten(error)
    return None


def _require_answer(name: str, device: torch.device, error: Exception) -> None:
    """After an illegal access nothing works any more in this process."""
    try:
        torch.zeros(1, device=device).add(1).cpu()
    except RuntimeError as lost:
        raise InputError(
            f"{device} answers no more after {name} was tried in "
            f"{NAMES[registry.which(name, device)]} ({_shorten(error)}): use --kernels reference"
        ) from lost


def _require_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for result, wanted in zip(found, expected, strict=True):
        largest, off = float(wanted.abs().max()), float((result - wanted).abs().max())
        if not off <= LARGEST_DIFFERENCE * largest:
            raise WrongResultError(
                f"a result is off by {off:.3g} from PyTorch's, whose largest is {largest:.3g}"
            )


def _shorten(error: object) -> str:
    text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
    return " ".join(text.split())[:MESSAGE_CHARACTERS]


def _results(name: str, device: torch.device) -> list[Tensor]:
    """Everything that an operator computes of its case, gradients included, in fp32 on the CPU."""
    # Not the generator that seeds runs.
    generator = torch.Generator().manual_seed(0)
    # What a run computes in unless it is told otherwise.
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32

    def draw(*shape: int, dtype: torch.dtype = usual) -> Tensor:
        values = torch.randn(shape, generator=generator, device="cpu")
        return values.to(device, dtype).requires_grad_()

    with torch.enable_grad():
        results = CASES[name](draw)
    return [result.detach().float().cpu() for result in results]


Draw = Callable[..., Tensor]


def _with_gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and the inputs' gradients of the sum of their squares."""
    return [*outputs, *torch.autograd.grad(outputs, inputs, [x.detach() for x in outputs])]


def _attention(draw: Draw) -> list[Tensor]:
    query, key, value = (draw(1, ROWS, heads, WIDTH) for heads in (4, 2, 2))
    return _with_gradients((attention(query, key, value),), (query, key, value))


def _cross_entropy(draw: Draw) -> list[Tensor]:
    """Without and with a teacher; the logits become their gradient."""
    logits, teacher = draw(ROWS, WIDTH).detach(), draw(ROWS, WIDTH).detach()
    targets = torch.arange(ROWS, device=logits.device)
    weights = torch.ones(ROWS, device=logits.device)
    first, second = logits.clone(), logits.clone()
    losses, _ = cross_entropy_(first, targets, weights)
    return [losses, first, *cross_entropy_(second, targets, weights, teacher, 0.5, 2.0), second]


def _gather_scale(draw: Draw) -> list[Tensor]:
    """Also with the fp32 sum of several passes' gradients, which only a direct call has."""
    weight = draw(ROWS, WIDTH)
    row_scale, column_scale = (draw(size, dtype=torch.float32) for size in weight.shape)
    rows, columns = (torch.arange(0, size, 2, device=weight.device) for size in weight.shape)
    leaves = (weight, row_scale, column_scale)
    results = _with_gradients(
        (gather_scale(weight, rows, row_scale, columns, column_scale),), leaves
    )
    total = draw(len(rows), len(columns), dtype=torch.float32).detach()
    fixed, by_row, by_column = (x.detach() for x in leaves)
    needs = (True, True, True)
    summed = gather_scale_backward(total, fixed, rows, by_row, columns, by_column, needs)
    return [*results, *(x for x in summed if x is not None)]


def _rms_norm(draw: Draw) -> list[Tensor]:
    inputs = (draw(ROWS, WIDTH), draw(WIDTH), draw(ROWS, WIDTH))
    x, gain, residual = inputs
    return _with_gradients(rms_norm(x, gain, 1e-5, residual=residual), inputs)


def _rope(draw: Draw) -> list[Tensor]:
    query, key = (draw(1, ROWS, heads, WIDTH) for heads in (4, 2))
    angles = draw(ROWS, WIDTH // 2, dtype=torch.float32).detach()
    return _with_gradients(rope(query, key, angles.cos(), angles.sin()), (query, key))


def _swiglu(draw: Draw) -> list[Tensor]:
    inputs = (draw(ROWS, WIDTH), draw(ROWS, WIDTH))
    return _with_gradients((swiglu(*inputs),), inputs)


CASES: dict[str, Callable[[Draw], list[Tensor]]] = {
    "attention": _attention,
    "cross_entropy": _cross_entropy,
    "gather_scale": _gather_scale,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
}
