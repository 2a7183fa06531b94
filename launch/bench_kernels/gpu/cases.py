"""Random arguments and exact formulas for every operator that `make gpu-check` tests.

An operator of the registry gets a row in ROWS. A formula is written apart from the operator's own
reference and computes in fp64; both return the same tensors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.kernels.attention import attention
from trainer.kernels.gather_scale import gather_scale
from trainer.kernels.linear_cross_entropy import (
    TeacherOutput,
    linear_cross_entropy,
    linear_distillation,
)
from trainer.kernels.rms_norm import rms_norm
from trainer.kernels.rope import rope
from trainer.kernels.swiglu import swiglu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASKS = ("mixed", "none", "zeros", "ones", "between")
EPS = 1e-5
SCALE = 1.7
"""Factor of rms_norm's mean square."""
SHARE, TEMPERATURE = 0.4, 1.5
"""Of cross_entropy's teacher."""

Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """What the arguments of one call are drawn from."""

    sizes: tuple[int, ...]
    """As the operator's row says."""
    dtype: str
    """Of DTYPES."""
    mask: str
    """Of MASKS."""

    def describe(self) -> str:
        return f"{list(self.sizes)} {self.dtype} mask {self.mask}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """How one operator is called and what it must give."""

    sizes: tuple[tuple[int, ...], ...]
    """Aligned and ragged ones, without rows, and as wide as a 7B model's."""
    draw: Callable[[Case], tuple[Tensors, Tensors]]
    """Arguments that get gradients, and constants, on the CPU."""
    run: Callable[..., Sequence[Tensor]]
    """The operator, called with the case and both kinds of arguments."""
    formula: Callable[..., Sequence[Tensor]]
    """The same in fp64: floating-point arguments and constants come as fp64."""
    tolerance: dict[str, float]
    """By dtype: allowed error over the largest value, besides the rounding of results."""


def cases(name: str, largest: float = math.inf) -> list[Case]:
    """The cases of an operator of which no size list multiplies to more than `largest`.

    Every size in every dtype; kinds of masks take turns, so that each meets each dtype.
    """
    found: list[Case] = []
    for sizes in ROWS[name].sizes:
        for dtype in DTYPES:
            if math.prod(sizes) <= largest:
                found.append(Case(sizes, dtype, MASKS[len(found) % len(MASKS)]))
    return found


def draw_mask(size: int, kind: str) -> Tensor | None:
    """fp32 values [size] of a kind of MASKS; mixed: a third each 0, 1 and between."""
    if kind == "none":
        return None
    if kind in ("zeros", "ones"):
        return torch.full((size,), float(kind == "ones"))
    return torch.rand(size) if kind == "between" else (torch.rand(size) * 3 - 1).clamp(0, 1)


def _normal(case: Case, *shape: int) -> Tensor:
    return torch.randn(*shape).to(DTYPES[case.dtype])


def _draw_rms_norm(case: Case) -> tuple[Tensors, Tensors]:
    """Without a mask there is no residual and no scale either."""
    rows, width = case.sizes
    mask = draw_mask(width, case.mask)
    residual = None if mask is None else _normal(case, rows, width)
    return (_normal(case, rows, width), _normal(case, width), mask, residual), ()


def _run_rms_norm(
    case: Case, x: Tensor, gain: Tensor, mask: Tensor | None, residual: Tensor | None
) -> Sequence[Tensor]:
    scale = None if mask is None else torch.tensor(SCALE, device=x.device)
    results = rms_norm(x, gain, EPS, mask=mask, residual=residual, scale=scale)
    # Without a residual the second result is the argument.
    return results[: 1 if residual is None else 2]


def _exact_rms_norm(
    case: Case, x: Tensor, gain: Tensor, mask: Tensor | None, residual: Tensor | None
) -> Sequence[Tensor]:
    if mask is None or residual is None:
        return (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain,)
    total = x + residual
    # The norm is that of the rounded sum; its gradient is that of the exact one.
    total = total + (total.to(DTYPES[case.dtype]).double() - total).detach()
    # The scale is an fp32 number.
    scale = float(torch.tensor(SCALE))
    root = (total.square().mean(-1, keepdim=True) * scale + EPS).sqrt()
    return total / root * (gain * mask), total


def _draw_swiglu(case: Case) -> tuple[Tensors, Tensors]:
    rows, width = case.sizes
    # Rows of wider tensors, as a fused projection's halves are.
    gate, up = _normal(case, rows, 2 * width).split(width, dim=1)
    return (gate, up, draw_mask(width, case.mask)), ()


def _exact_swiglu(case: Case, gate: Tensor, up: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
    product = gate / (1 + (-gate).exp()) * up
    return (product if mask is None else product * mask,)


def _draw_rope(case: Case) -> tuple[Tensors, Tensors]:
    batch, length, heads, key_heads, head_dim, rotary_dim = case.sizes
    angles = torch.rand(length, rotary_dim // 2) * 6.3
    # Tables come in the dtype of the rows or in fp32.
    dtype = torch.float32 if case.mask == "mixed" else DTYPES[case.dtype]
    query = _normal(case, batch, length, heads, head_dim)
    key = _normal(case, batch, length, key_heads, head_dim)
    return (query, key), (angles.cos().to(dtype), angles.sin().to(dtype))


def _run_rope(case: Case, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
    """Rotated, and rotated again in place."""
    with torch.no_grad():
        copies = (query.detach().clone(), key.detach().clone())
        overwritten = rope(*copies, cos, sin, in_place=True)
    return *rope(query, key, cos, sin), *overwritten


def _exact_rope(
    case: Case, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> Sequence[Tensor]:
    turn, half = torch.complex(cos, sin).unsqueeze(1), cos.shape[1]

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
        return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :]), dim=-1)

    rotated = rotate(query), rotate(key)
    return *rotated, *(x.detach() for x in rotated)


def _draw_gather_scale(case: Case) -> tuple[Tensors, Tensors]:
    """Rows come shuffled and columns in order, about half of each; without masks all columns."""
    out, width = case.sizes
    rows = torch.randperm(out)[: (out + 1) // 2]
    columns = (
        None if case.mask in ("none", "ones") else torch.randperm(width)[: width // 2].sort()[0]
    )
    scales = draw_mask(out, case.mask), draw_mask(width, case.mask)
    return (_normal(case, out, width), *scales), (rows, columns)


def _run_gather_scale(
    case: Case,
    weight: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    rows: Tensor,
    columns: Tensor | None,
) -> Sequence[Tensor]:
    return (gather_scale(weight, rows, row_scale, columns, column_scale),)


def _exact_gather_scale(
    case: Case,
    weight: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    rows: Tensor,
    columns: Tensor | None,
) -> Sequence[Tensor]:
    if row_scale is not None and column_scale is not None:
        weight = weight * row_scale.unsqueeze(1) * column_scale
    return (weight[rows] if columns is None else weight[rows][:, columns],)


def _draw_linear_cross_entropy(case: Case) -> tuple[Tensors, Tensors]:
    """Hidden states and head; targets, the tokens' weights in place of a mask, and with some of
    these a teacher's states and head."""
    tokens, width, vocabulary = case.sizes
    weights = draw_mask(tokens, case.mask)
    weights = torch.ones(tokens) if weights is None else weights

    def model() -> tuple[Tensor, Tensor]:
        head = torch.randn(vocabulary, width) * width**-0.5
        return _normal(case, tokens, width), head.to(DTYPES[case.dtype])

    teacher = model() if case.mask in ("mixed", "between") else (None, None)
    return model(), (torch.randint(vocabulary, (tokens,)), weights, *teacher)


def _run_linear_cross_entropy(
    case: Case,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    states: Tensor | None,
    head: Tensor | None,
) -> Sequence[Tensor]:
    if states is None or head is None:
        return linear_cross_entropy(hidden, weight, targets, token_weights)
    teacher_output = TeacherOutput(states, head, SHARE, TEMPERATURE)
    return linear_distillation(hidden, weight, targets, token_weights, teacher_output)


def _exact_linear_cross_entropy(
    case: Case,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    states: Tensor | None,
    head: Tensor | None,
) -> Sequence[Tensor]:
    logits, counted = hidden @ weight.t(), token_weights != 0
    losses = logits.logsumexp(-1) - logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    if states is None or head is None:
        return (losses * token_weights).sum(), (losses * counted).detach()
    student = (logits / TEMPERATURE).log_softmax(-1)
    teacher = (states @ head.t() / TEMPERATURE).log_softmax(-1)
    divergences = (teacher.exp() * (teacher - student)).sum(-1)
    total = (1 - SHARE) * losses + SHARE * TEMPERATURE**2 * divergences
    found = ((total * token_weights).sum(), losses * counted, divergences * counted)
    return found[0], *(x.detach() for x in found[1:])


def _draw_attention(case: Case) -> tuple[Tensors, Tensors]:
    """Queries, keys, values and the heads' mask; documents of about ten positions with some
    masks."""
    batch, length, heads, key_heads, head_dim = case.sizes
    query = _normal(case, batch, length, heads, head_dim)
    key, value = (_normal(case, batch, length, key_heads, head_dim) for _ in range(2))
    documents = (torch.rand(batch, length) < 0.1).cumsum(1) if case.mask == "mixed" else None
    return (query, key, value, draw_mask(heads, case.mask)), (documents,)


def _window(case: Case) -> int | None:
    """Positions a query sees; all but with one kind of mask."""
    return 1 + case.sizes[1] // 3 if case.mask == "between" else None


def _run_attention(
    case: Case,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_mask: Tensor | None,
    documents: Tensor | None,
) -> Sequence[Tensor]:
    options: Any = {"documents": documents, "window": _window(case)}
    return (attention(query, key, value, head_mask=head_mask, **options),)


def _exact_attention(
    case: Case,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_mask: Tensor | None,
    documents: Tensor | None,
) -> Sequence[Tensor]:
    _, length, heads, key_heads, head_dim = case.sizes
    key, value = (x.repeat_interleave(heads // key_heads, 2) for x in (key, value))
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance < (_window(case) or length))
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * head_dim**-0.5
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    output = torch.einsum("bhij,bjhd->bihd", weights, value)
    # By definition a mask has no gradient where it is 0.
    return (output if head_mask is None else output * (head_mask * (head_mask != 0))[:, None],)


_ELEMENTWISE = dict.fromkeys(DTYPES, 2e-5)

ROWS: dict[str, Row] = {
    # Batch, length, heads, key heads, head dim. Weights are rounded to the operator's dtype, and so
    # is the output from which the mask's gradient comes.
    "attention": Row(
        sizes=(
            (1, 1, 2, 1, 2),
            (2, 9, 4, 2, 16),
            (1, 40, 3, 1, 24),
            (2, 515, 8, 2, 80),
            (1, 2048, 32, 8, 128),
        ),
        draw=_draw_attention,
        run=_run_attention,
        formula=_exact_attention,
        tolerance={"fp32": 2e-5, "bf16": 2e-2, "fp16": 4e-3},
    ),
    # Out, in.
    "gather_scale": Row(
        sizes=((1, 1), (17, 33), (70, 24), (1000, 1003), (2048, 5504)),
        draw=_draw_gather_scale,
        run=_run_gather_scale,
        formula=_exact_gather_scale,
        tolerance=_ELEMENTWISE,
    ),
    # Tokens, width, vocabulary. Logits of the operator are rounded to its dtype. Rows of up to
    # 32,768 ids without a teacher have a kernel of their own; a GPU takes 2,048 tokens at a time.
    "cross_entropy": Row(
        sizes=(
            (5, 8, 17),
            (257, 256, 1003),
            (1024, 512, 32000),
            (130, 256, 49152),
            (2500, 64, 1003),
        ),
        draw=_draw_linear_cross_entropy,
        run=_run_linear_cross_entropy,
        formula=_exact_linear_cross_entropy,
        tolerance={"fp32": 5e-5, "bf16": 4e-2, "fp16": 5e-3},
    ),
    # Rows, width.
    "rms_norm": Row(
        sizes=((0, 8), (1, 1), (7, 33), (35, 64), (257, 5120), (1031, 4096)),
        draw=_draw_rms_norm,
        run=_run_rms_norm,
        formula=_exact_rms_norm,
        tolerance=_ELEMENTWISE,
    ),
    # Batch, length, heads, key heads, head dim, rotary dim.
    "rope": Row(
        sizes=(
            (1, 1, 1, 1, 2, 2),
            (2, 5, 3, 1, 16, 16),
            (1, 9, 5, 2, 24, 10),
            (2, 257, 12, 4, 80, 20),
            (2, 1025, 32, 8, 128, 128),
        ),
        draw=_draw_rope,
        run=_run_rope,
        formula=_exact_rope,
        tolerance=_ELEMENTWISE,
    ),
    # Rows, width.
    "swiglu": Row(
        sizes=((0, 8), (1, 1), (7, 33), (35, 64), (257, 5504), (1031, 11008)),
        draw=_draw_swiglu,
        run=lambda case, *arguments: (swiglu(*arguments),),
        formula=_exact_swiglu,
        tolerance=_ELEMENTWISE,
    ),
}


def arguments(name: str, case: Case, device: torch.device) -> tuple[Tensors, Tensors]:
    """The case's arguments and constants on a device: the same for every implementation."""
    torch.manual_seed(0)
    given: Any = ROWS[name].draw(case)
    differentiable, constants = (tuple(_move(x, device) for x in tensors) for tensors in given)
    return differentiable, constants


def _move(x: Tensor | None, device: torch.device) -> Tensor | None:
    """A copy with the same strides, which `Tensor.to` does not promise."""
    if x is None:
        return None
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
