"""What is timed on a GPU: every operator, and the same computation by others.

An operator of the registry gets a row in BENCHMARKS. All sides of a row take the same arguments and
return the same values; masks are ones, because others have none to apply.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from launch.bench_kernels import traffic as kernel_traffic
from trainer.kernels import attention_flash
from trainer.kernels.attention import attention
from trainer.kernels.gather_scale import gather_scale
from trainer.kernels.linear_cross_entropy import linear_cross_entropy
from trainer.kernels.rms_norm import rms_norm
from trainer.kernels.rope import rope
from trainer.kernels.swiglu import swiglu

EPS = 1e-5
FORWARD, BOTH = "forward", "forward + backward"
COMPILE = "torch.compile"
BF16_BYTES = 2

Tensors = tuple[Tensor, ...]
Function = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Shapes of one layer and of a micro-batch."""

    name: str
    width: int
    heads: int
    channels: int
    head_dim: int = 128
    vocabulary: int = 32000
    batch: int = 2
    length: int = 4096

    @property
    def tokens(self) -> int:
        return self.batch * self.length


MODELS = (
    Model(name="LLaMA 2 7B", width=4096, heads=32, channels=11008),
    Model(name="Sheared LLaMA 1.3B", width=2048, heads=16, channels=5504),
)
"""arXiv 2307.09288 and 2310.06694."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One computation, who does it, and the least there is to do."""

    inputs: Callable[[Model, torch.device], Tensors]
    """Arguments; those that get gradients require them."""
    eager: Function
    """PyTorch operations, as a model would write them; also what torch.compile is given."""
    ours: Function | None = None
    """The operator; None where only a ceiling is measured."""
    others: dict[str, Function] = field(default_factory=dict)
    """By package. Each imports what it needs: where that fails, there is nothing to compare."""
    work: Callable[[Model], dict[str, int]]
    """By pass: bytes of inputs and outputs once each, or operations of the matrix products."""
    unit: Literal["bytes", "operations"] = "bytes"


def function_of(name: str, side: str) -> Function:
    """What a side of a row calls: eager, torch.compile, a package, or else the operator."""
    row = BENCHMARKS[name]
    if side == "eager":
        return row.eager
    if side == COMPILE:
        compiled: Function = torch.compile(row.eager, dynamic=False)
        return compiled
    if side in row.others:
        return row.others[side]
    assert row.ours is not None, (name, side)
    return row.ours


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device).requires_grad_()


def _ones(device: torch.device, size: int) -> Tensor:
    return torch.ones(size, device=device).requires_grad_()


def _stream(model: Model) -> int:
    """Bytes of the residual stream [T, d]."""
    return BF16_BYTES * model.tokens * model.width


def _wide(model: Model) -> int:
    """Bytes of feed-forward activations [T, F]."""
    return BF16_BYTES * model.tokens * model.channels


def _moved(unit: Callable[[Model], int], forward: int, backward: int) -> Callable[..., Any]:
    def work(model: Model) -> dict[str, int]:
        return {FORWARD: forward * unit(model), BOTH: (forward + backward) * unit(model)}

    return work


def _rms_norm_inputs(model: Model, device: torch.device) -> Tensors:
    """x, residual, gain."""
    rows = (model.tokens, model.width)
    return _normal(device, *rows), _normal(device, *rows), _normal(device, model.width)


def _rms_norm(x: Tensor, residual: Tensor, gain: Tensor) -> Tensors:
    return rms_norm(x, gain, EPS, residual=residual)


def _liger_rms_norm(x: Tensor, residual: Tensor, gain: Tensor) -> Any:
    """Not in place: gradients are used again by the next call."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, gain, EPS, 0.0, "llama", False)


def _pytorch_rms_norm(x: Tensor, residual: Tensor, gain: Tensor) -> Tensors:
    """PyTorch's own kernel behind an addition."""
    total = x + residual
    return functional.rms_norm(total, gain.shape, gain, EPS), total


def _swiglu_inputs(model: Model, device: torch.device) -> Tensors:
    """gate, up."""
    rows = (model.tokens, model.channels)
    return _normal(device, *rows), _normal(device, *rows)


def _liger_swiglu(gate: Tensor, up: Tensor) -> Any:
    """Leaves the gradients in place of its arguments, which the next call takes."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _rope_inputs(model: Model, device: torch.device) -> Tensors:
    """Queries and keys [B, S, heads, head_dim] as projections leave them, and tables [S, head_dim]
    whose halves are equal, as Hugging Face has them."""
    shape = (model.batch, model.length, model.heads, model.head_dim)
    angles = torch.rand(model.length, model.head_dim // 2, device=device) * 6.3
    angles = torch.cat((angles, angles), dim=1)
    tables = angles.cos().bfloat16(), angles.sin().bfloat16()
    return _normal(device, *shape), _normal(device, *shape), *tables


def _eager_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    heads_first = query.transpose(1, 2), key.transpose(1, 2)
    rotated = kernel_traffic.rope(*heads_first, cos, sin)
    return tuple(x.transpose(1, 2) for x in rotated)


def _rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    half = cos.shape[1] // 2
    return rope(query, key, cos[:, :half], sin[:, :half])


def _liger_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Rotates its arguments in place, so that each call rotates them further."""
    from liger_kernel.ops.rope import LigerRopeFunction

    heads_first = query.transpose(1, 2), key.transpose(1, 2)
    rotated = LigerRopeFunction.apply(*heads_first, cos.unsqueeze(0), sin.unsqueeze(0))
    return tuple(x.transpose(1, 2) for x in rotated)


def _attention_inputs(model: Model, device: torch.device) -> Tensors:
    """Queries, keys and values [B, S, heads, head_dim], and the mask of the heads."""
    shape = (model.batch, model.length, model.heads, model.head_dim)
    return *(_normal(device, *shape) for _ in range(3)), _ones(device, model.heads)


def _eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return kernel_traffic.attention(query, key, value, mask).transpose(1, 2)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return attention(query, key, value, head_mask=mask)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Without a mask."""
    library = attention_flash.find(query, preferred=False)
    if library is None:
        raise ModuleNotFoundError("no FlashAttention for this GPU is installed")
    return attention_flash.attend(library, query, key, value, None, query.shape[-1] ** -0.5)


def _attention_work(model: Model) -> dict[str, int]:
    """Two products forward and five backward, over the half of the scores that is seen."""
    product = model.batch * model.heads * model.length**2 * model.head_dim
    return {FORWARD: 2 * product, BOTH: 7 * product}


def _gather_scale_inputs(model: Model, device: torch.device) -> Tensors:
    """weight, rows (all of them, by index), row scale, column scale."""
    rows = torch.randperm(model.width, device=device)
    scales = _ones(device, model.width), _ones(device, model.channels)
    return _normal(device, model.width, model.channels), rows, *scales


def _gather_scale(weight: Tensor, rows: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensor:
    return gather_scale(weight, rows, row_scale, None, column_scale)


def _weight(model: Model) -> int:
    """Bytes of a feed-forward weight."""
    return BF16_BYTES * model.width * model.channels


def _loss_inputs(model: Model, device: torch.device) -> Tensors:
    """Hidden states, head, targets, and the tokens' weights of a mean."""
    states = _normal(device, model.tokens, model.width)
    head = (
        torch.randn(model.vocabulary, model.width, device=device) * model.width**-0.5
    ).bfloat16()
    targets = torch.randint(model.vocabulary, (model.tokens,), device=device)
    weights = torch.full((model.tokens,), 1 / model.tokens, device=device)
    return states, head.requires_grad_(), targets, weights


def _eager_loss(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    return kernel_traffic.linear_cross_entropy(hidden, weight, targets).mean()


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, token_weights)[0]


def _liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Any:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)
    # Later versions return more than the loss.
    return found[0] if isinstance(found, tuple) else found


def _loss_work(model: Model) -> dict[str, int]:
    """Forward and backward only: gradients are computed in the forward pass."""
    return {BOTH: 6 * model.tokens * model.width * model.vocabulary}


BENCHMARKS: dict[str, Benchmark] = {
    # What this GPU's memory gives a kernel that only copies.
    "copy": Benchmark(
        inputs=lambda model, device: (_normal(device, model.tokens, model.channels).detach(),),
        eager=torch.clone,
        work=lambda model: {FORWARD: 2 * _wide(model)},
    ),
    "attention": Benchmark(
        inputs=_attention_inputs,
        eager=_eager_attention,
        ours=_attention,
        others={"flash-attn": _flash_attention},
        work=_attention_work,
        unit="operations",
    ),
    "gather_scale": Benchmark(
        inputs=_gather_scale_inputs,
        eager=kernel_traffic.gather_scale,
        ours=_gather_scale,
        work=_moved(_weight, 2, 3),
    ),
    "cross_entropy": Benchmark(
        inputs=_loss_inputs,
        eager=_eager_loss,
        ours=_loss,
        others={"liger": _liger_loss},
        work=_loss_work,
        unit="operations",
    ),
    "rms_norm": Benchmark(
        inputs=_rms_norm_inputs,
        eager=kernel_traffic.rms_norm,
        ours=_rms_norm,
        others={"liger": _liger_rms_norm, "F.rms_norm": _pytorch_rms_norm},
        work=_moved(_stream, 4, 4),
    ),
    "rope": Benchmark(
        inputs=_rope_inputs,
        eager=_eager_rope,
        ours=_rope,
        others={"liger": _liger_rope},
        work=_moved(_stream, 4, 4),
    ),
    "swiglu": Benchmark(
        inputs=_swiglu_inputs,
        eager=kernel_traffic.swiglu,
        ours=swiglu,
        others={"liger": _liger_swiglu},
        work=_moved(_wide, 3, 5),
    ),
}
