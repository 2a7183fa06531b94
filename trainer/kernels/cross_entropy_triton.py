"""Softmax cross-entropy in Triton, with the gradient in place of the logits.

One program computes one token. A row that fits into a program's registers is read once
(`row_kernel`). Longer rows, and those with a teacher's beside them, are walked twice, for the sums
and for the gradient (`walk_kernel`). The second walk finds its row in the L2 cache as long as the
rows of all programs that run at a time fit there, of which large programs make few; it goes back
from the end, so that of longer rows a part is found. Each row is one program's, so results are
the same bits every time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.cross_entropy import Inputs
from trainer.kernels.launching import ENABLE_FP_FUSION

_ROW = 32768
_WALK = 8192
_OPTIONS = {"num_stages": 1, "enable_fp_fusion": ENABLE_FP_FUSION}


@triton.jit
def row_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    token_weights: tl.tensor,
    losses: tl.tensor,
    V: tl.int32,
    stride: tl.int32,
    alpha: tl.float32,
    BLOCK_V: tl.constexpr,
) -> None:
    """One token whose V logits fit into BLOCK_V."""
    pid = tl.program_id(0)
    offs_v = tl.arange(0, BLOCK_V)
    inside = offs_v < V
    row = logits + pid.to(tl.int64) * stride
    target = tl.load(targets + pid).to(tl.int32)
    weight = tl.load(token_weights + pid)
    # Read before the gradient takes the row's place.
    x_target = tl.load(row + target).to(tl.float32)
    x = tl.load(row + offs_v, mask=inside, other=-float("inf")).to(tl.float32)
    m_i = tl.max(x, 0)
    p = tl.exp(x - m_i)
    l_i = tl.sum(p, 0)
    # In this order: of a target with the greatest logit, m_i - x_target is exactly 0.
    loss = tl.log(l_i) + (m_i - x_target)
    tl.store(losses + pid, tl.where(weight == 0, 0.0, loss))
    scale = weight * (1.0 - alpha)
    dx = p * (scale / l_i) - tl.where(offs_v == target, scale, 0.0)
    tl.store(row + offs_v, dx.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def online_softmax(
    l_i: tl.tensor, m_i: tl.tensor, x: tl.tensor, inv_t: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """One step of a softmax over a row that comes in parts: sum l_i and maximum m_i with the part x
    added, exp((x - m_i) / T) of the part, and the factor that rescales older sums to that m_i."""
    m_new = tl.maximum(m_i, tl.max(x, 0))
    p = tl.exp((x - m_new) * inv_t)
    rescale = tl.exp((m_i - m_new) * inv_t)
    return l_i * rescale + tl.sum(p, 0), m_new, p, rescale


@triton.jit
def walk_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    token_weights: tl.tensor,
    teacher_logits: tl.tensor,
    losses: tl.tensor,
    divergences: tl.tensor,
    V: tl.int32,
    stride: tl.int32,
    stride_teacher: tl.int32,
    alpha: tl.float32,
    temperature: tl.float32,
    HAS_TEACHER: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """One token in steps of BLOCK_V; _s: of the student, _t: of the teacher, at temperature T."""
    pid = tl.program_id(0)
    row = logits + pid.to(tl.int64) * stride
    teacher_row = teacher_logits + pid.to(tl.int64) * stride_teacher
    target = tl.load(targets + pid).to(tl.int32)
    weight = tl.load(token_weights + pid)
    x_target = tl.load(row + target).to(tl.float32)
    inv_t = 1.0 / temperature
    lowest = -float("inf")
    m_i, m_t, l_i, l_s, l_t, dot = lowest, lowest, 0.0, 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        inside = offs_v < V
        x = tl.load(row + offs_v, mask=inside, other=lowest).to(tl.float32)
        if HAS_TEACHER:
            # m_i is the maximum at every temperature, and is replaced last.
            l_s, _, _, _ = online_softmax(l_s, m_i, x, inv_t)
            x_t = tl.load(teacher_row + offs_v, mask=inside, other=lowest).to(tl.float32)
            l_t, m_t, p_t, rescale = online_softmax(l_t, m_t, x_t, inv_t)
            # sum(p_t * (x_t - x)), the divergence but for normalisation; inf - inf past V.
            terms = tl.where(inside, p_t * (x_t - x), 0.0)
            dot = dot * rescale + tl.sum(terms, 0)
        l_i, m_i, _, _ = online_softmax(l_i, m_i, x, 1.0)
    loss = tl.log(l_i) + (m_i - x_target)
    tl.store(losses + pid, tl.where(weight == 0, 0.0, loss))
    scale = weight * (1.0 - alpha)
    if HAS_TEACHER:
        inv_l_s, inv_l_t = 1.0 / l_s, 1.0 / l_t
        # KL = sum(p_t * ((x_t - m_t - x + m_i) / T)) / l_t + log(l_s) - log(l_t).
        shift = (dot * inv_l_t + (m_i - m_t)) * inv_t
        divergence = shift + tl.log(l_s) - tl.log(l_t)
        tl.store(divergences + pid, tl.where(weight == 0, 0.0, divergence))
        scale_t = weight * alpha * temperature  # T^2 of the loss times 1 / T of its logits
    steps = tl.cdiv(V, BLOCK_V)
    for step in range(steps):
        offs_v = (steps - 1 - step) * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = offs_v < V
        x = tl.load(row + offs_v, mask=inside, other=lowest).to(tl.float32)
        dx = tl.exp(x - m_i) * (scale / l_i) - tl.where(offs_v == target, scale, 0.0)
        if HAS_TEACHER:
            x_t = tl.load(teacher_row + offs_v, mask=inside, other=lowest).to(tl.float32)
            p_s = tl.exp((x - m_i) * inv_t) * inv_l_s
            p_t = tl.exp((x_t - m_t) * inv_t) * inv_l_t
            dx += (p_s - p_t) * scale_t
        tl.store(row + offs_v, dx.to(logits.dtype.element_ty), mask=inside)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Cross-entropies [t] and divergences [t] (empty without a teacher) of `Inputs`, whose logits
    become the gradient."""
    logits, targets, token_weights, teacher_logits, alpha, temperature = Inputs(*arguments)
    tokens, classes = logits.shape
    targets, token_weights = targets.contiguous(), token_weights.contiguous()
    losses = torch.empty_like(token_weights)
    divergences = token_weights.new_empty(0 if teacher_logits is None else tokens)
    with torch.cuda.device_of(logits):
        if teacher_logits is None and classes <= _ROW:
            row_kernel[(tokens,)](
                logits,
                targets,
                token_weights,
                losses,
                classes,
                logits.stride(0),
                float(alpha),
                **_row_tile(classes),
                **_OPTIONS,
            )
        else:
            teacher = logits if teacher_logits is None else teacher_logits
            walk_kernel[(tokens,)](
                logits,
                targets,
                token_weights,
                teacher,
                losses,
                losses if teacher_logits is None else divergences,
                classes,
                logits.stride(0),
                teacher.stride(0),
                float(alpha),
                float(temperature),
                HAS_TEACHER=teacher_logits is not None,
                **_walk_tile(classes),
                **_OPTIONS,
            )
    return losses, divergences


def _row_tile(classes: int) -> dict[str, int]:
    columns = triton.next_power_of_2(classes)
    return {"BLOCK_V": columns, "num_warps": min(32, max(4, columns // 1024))}


def _walk_tile(classes: int) -> dict[str, int]:
    return {"BLOCK_V": min(_WALK, triton.next_power_of_2(classes)), "num_warps": 32}
