"""Softmax cross-entropy in Triton, with the gradient in place of the logits.

One program computes one token. A row that fits into a program's registers is read once
(`row_kernel`). Longer rows, and those with a teacher's beside them, are walked twice, for the sums
and for the gradient (`walk_kernel`). The second walk finds its row in the L2 cache as long as the
rows of all programs that run at a time fit there, of which large programs make few; it goes back
from the end, so that of longer rows a part is found. Each row is one program's, so results are
the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.compilation import ENABLE_FP_FUSION, TOKENS, VOCABULARY, Compilation
from trainer.kernels.linear_cross_entropy import default_chunk

_ROW = 32768
_WALK = 8192
_OPTIONS = {"num_stages": 1, "enable_fp_fusion": ENABLE_FP_FUSION}


@triton.jit
def row_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    token_weights: tl.tensor,
    losses: tl.tensor,
    classes: tl.int32,
    stride: tl.int32,
    share: tl.float32,
    COLUMNS: tl.constexpr,
) -> None:
    """One token whose logits fit into COLUMNS."""
    token = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < classes
    row = logits + token.to(tl.int64) * stride
    target = tl.load(targets + token).to(tl.int32)
    weight = tl.load(token_weights + token)
    chosen = tl.load(row + target).to(tl.float32)
    values = tl.load(row + column, mask=inside, other=-float("inf")).to(tl.float32)
    top = tl.max(values, 0)
    raised = tl.exp(values - top)
    total = tl.sum(raised, 0)
    loss = tl.log(total) + (top - chosen)
    tl.store(losses + token, tl.where(weight == 0, 0.0, loss))
    scale = weight * (1.0 - share)
    gradient = raised * (scale / total) - tl.where(column == target, scale, 0.0)
    tl.store(row + column, gradient.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def extend(
    total: tl.tensor, top: tl.tensor, values: tl.tensor, cooling: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A sum of exponentials of cooled distances from the greatest value `top`, and that value, with
    `values` added; these exponentials, and the factor that made the old ones smaller."""
    higher = tl.maximum(top, tl.max(values, 0))
    raised = tl.exp((values - higher) * cooling)
    faded = tl.exp((top - higher) * cooling)
    return total * faded + tl.sum(raised, 0), higher, raised, faded


@triton.jit
def walk_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    token_weights: tl.tensor,
    taught: tl.tensor,
    losses: tl.tensor,
    divergences: tl.tensor,
    classes: tl.int32,
    stride: tl.int32,
    taught_stride: tl.int32,
    share: tl.float32,
    temperature: tl.float32,
    HAS_TEACHER: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One token in steps of COLUMNS: sums and greatest logits first, then the gradient."""
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    teacher_row = taught + token.to(tl.int64) * taught_stride
    target = tl.load(targets + token).to(tl.int32)
    weight = tl.load(token_weights + token)
    chosen = tl.load(row + target).to(tl.float32)
    cooling = 1.0 / temperature
    lowest = -float("inf")
    top, teacher_top = lowest, lowest
    total, cool_total, teacher_total, distance = 0.0, 0.0, 0.0, 0.0
    for start in range(0, classes, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < classes
        values = tl.load(row + column, mask=inside, other=lowest).to(tl.float32)
        if HAS_TEACHER:
            cool_total, _, _, _ = extend(cool_total, top, values, cooling)
            taught_values = tl.load(teacher_row + column, mask=inside, other=lowest).to(tl.float32)
            teacher_total, teacher_top, raised, faded = extend(
                teacher_total, teacher_top, taught_values, cooling
            )
            apart = tl.where(inside, raised * (taught_values - values), 0.0)
            distance = distance * faded + tl.sum(apart, 0)
        total, top, _, _ = extend(total, top, values, 1.0)
    loss = tl.log(total) + (top - chosen)
    tl.store(losses + token, tl.where(weight == 0, 0.0, loss))
    scale = weight * (1.0 - share)
    if HAS_TEACHER:
        cool_factor, teacher_factor = 1.0 / cool_total, 1.0 / teacher_total
        shift = (distance * teacher_factor + (top - teacher_top)) * cooling
        divergence = shift + tl.log(cool_total) - tl.log(teacher_total)
        tl.store(divergences + token, tl.where(weight == 0, 0.0, divergence))
        teacher_scale = weight * share * temperature
    steps = tl.cdiv(classes, COLUMNS)
    for step in range(steps):
        column = (steps - 1 - step) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < classes
        values = tl.load(row + column, mask=inside, other=lowest).to(tl.float32)
        gradient = tl.exp(values - top) * (scale / total) - tl.where(column == target, scale, 0.0)
        if HAS_TEACHER:
            taught_values = tl.load(teacher_row + column, mask=inside, other=lowest).to(tl.float32)
            student = tl.exp((values - top) * cooling) * cool_factor
            teacher = tl.exp((taught_values - teacher_top) * cooling) * teacher_factor
            gradient += (student - teacher) * teacher_scale
        tl.store(row + column, gradient.to(logits.dtype.element_ty), mask=inside)


def supports(logits: Tensor) -> bool:
    """Whether the kernels take this tensor; the reference does the rest."""
    return logits.dtype != torch.float64 and logits.numel() > 0


def forward(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    taught: Tensor | None,
    share: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [t] and divergences [t] (empty without a teacher); `logits` becomes the
    gradient."""
    tokens, classes = logits.shape
    targets, token_weights = targets.contiguous(), token_weights.contiguous()
    losses = torch.empty_like(token_weights)
    divergences = token_weights.new_empty(0 if taught is None else tokens)
    with torch.cuda.device_of(logits):
        if taught is None and classes <= _ROW:
            row_kernel[(tokens,)](
                logits,
                targets,
                token_weights,
                losses,
                classes,
                logits.stride(0),
                float(share),
                **_row_tile(classes),
                **_OPTIONS,
            )
        else:
            walk_kernel[(tokens,)](
                logits,
                targets,
                token_weights,
                logits if taught is None else taught,
                losses,
                losses if taught is None else divergences,
                classes,
                logits.stride(0),
                logits.stride(0) if taught is None else taught.stride(0),
                float(share),
                float(temperature),
                HAS_TEACHER=taught is not None,
                **_walk_tile(classes),
                **_OPTIONS,
            )
    return losses, divergences


def _row_tile(classes: int) -> dict[str, int]:
    columns = triton.next_power_of_2(classes)
    return {"COLUMNS": columns, "num_warps": min(32, max(4, columns // 1024))}


def _walk_tile(classes: int) -> dict[str, int]:
    return {"COLUMNS": min(_WALK, triton.next_power_of_2(classes)), "num_warps": 32}


_CHUNK, _TAUGHT_CHUNK = (default_chunk(TOKENS, count * VOCABULARY, "cuda") for count in (1, 2))
# Logits read and their gradient written, 2 bytes each, with a target, a weight and a loss.
_BYTES = _CHUNK * (2 * 2 * VOCABULARY + 8 + 4 + 4)
# A teacher's logits and a divergence besides.
_TAUGHT_BYTES = _TAUGHT_CHUNK * (3 * 2 * VOCABULARY + 8 + 4 + 4 + 4)
_SIGNATURE = {
    "logits": "*bf16",
    "targets": "*i64",
    **dict.fromkeys(("token_weights", "losses"), "*fp32"),
    **dict.fromkeys(("classes", "stride"), "i32"),
    "share": "fp32",
}

COMPILATIONS = (
    Compilation(
        name="cross_entropy.forward",
        module=__name__,
        function="row_kernel",
        signature=_SIGNATURE,
        aligned=("classes", "stride"),
        constants={"COLUMNS": _row_tile(VOCABULARY)["COLUMNS"]},
        num_warps=_row_tile(VOCABULARY)["num_warps"],
        num_stages=_OPTIONS["num_stages"],
        bytes_moved=_BYTES,
        minimum_bytes=_BYTES,
        shape=f"logits [{_CHUNK}, {VOCABULARY}] bf16",
    ),
    Compilation(
        name="distillation.forward",
        module=__name__,
        function="walk_kernel",
        signature={
            **_SIGNATURE,
            "taught": "*bf16",
            "divergences": "*fp32",
            "taught_stride": "i32",
            "temperature": "fp32",
        },
        aligned=("classes", "stride", "taught_stride"),
        constants={"HAS_TEACHER": True, "COLUMNS": _walk_tile(VOCABULARY)["COLUMNS"]},
        num_warps=_walk_tile(VOCABULARY)["num_warps"],
        num_stages=_OPTIONS["num_stages"],
        # The second walk, of 2/3 as much again, counts as served by the L2 cache.
        bytes_moved=_TAUGHT_BYTES,
        minimum_bytes=_TAUGHT_BYTES,
        shape=f"student's and teacher's logits [{_TAUGHT_CHUNK}, {VOCABULARY}] bf16, of which the "
        "second reading counts as the L2 cache's",
    ),
)
