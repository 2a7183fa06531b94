"""rms_norm against its formula in fp64, for every implementation."""

import random

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.trainer.kernels.backends import large
from tests.trainer.kernels.comparison import DTYPES, close, compare, compiles, draw_rows
from trainer.kernels import registry
from trainer.kernels.rms_norm import rms_norm
from trainer.models.layers import RMSNorm
from trainer.models.masks import Masks

Results = tuple[Tensor, ...]

EPS = 1e-5
SHAPES = ((1, 1), (7, 2), (3, 11, 15), (2, 3, 16), (130, 33), (70, 130), (5, 257), (2, 37, 200))
WIDE = ((3, 2300), (2, 4097), *large((257, 5120), (1031, 4096)))


def formula(
    x: Tensor,
    gain: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    # The norm is that of the rounded sum; its gradient is that of the exact one.
    total = total + (total.float().to(dtype).double() - total).detach()
    mean = (total * total).sum(-1, keepdim=True) / total.shape[-1]
    return total / (mean * (1.0 if scale is None else scale) + EPS).sqrt() * gain, total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
def test_equals_formula(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = random.Random(f"{shape} {dtype}")
    torch.manual_seed(generator.randrange(2**31))
    width = shape[-1]
    # Half of the cases are so small that eps matters. Without it one value alone has no gradient.
    size = 3e-3 if width == 1 else generator.choice([1.0, 3e-3])
    x = draw_rows(shape, dtype, generator) * size
    residual = draw_rows(shape, dtype, generator) * size if generator.random() < 0.7 else None
    gain = torch.randn(width).to(generator.choice([dtype, torch.float32]))
    scale = torch.tensor(1.7) if generator.random() < 0.7 else None

    # Without a residual the second result is the argument.
    results = 1 if residual is None else 2

    def run(x: Tensor, gain: Tensor, before: Tensor | None) -> Results:
        return rms_norm(x, gain, EPS, residual=before, scale=scale)[:results]

    def exact(x: Tensor, gain: Tensor, before: Tensor | None) -> Results:
        return formula(x, gain, before, scale, dtype)[:results]

    # Autograd rounds in between where the reference is PyTorch operations.
    roundings = 1 if registry.runs_kernels("rms_norm", x) else 5
    compare(run, exact, (x, gain, residual), tolerance=1e-5, roundings=roundings)


def test_only_one_of_both_results_is_used(backend: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(9, 20) for _ in range(2)]
    gain = torch.randn(20)
    for chosen in (0, 1):
        compare(
            lambda x, r, chosen=chosen: rms_norm(x, gain, EPS, residual=r)[chosen],
            lambda x, r, chosen=chosen: formula(x, gain.double(), r, None, torch.float32)[chosen],
            inputs,
            tolerance=1e-5,
        )


def test_without_rows(backend: str) -> None:
    x = torch.zeros(0, 8, requires_grad=True)
    gain = torch.ones(8, requires_grad=True)
    normed, _ = rms_norm(x, gain, EPS)
    assert normed.shape == (0, 8)
    gradients = torch.autograd.grad(normed.sum(), (x, gain))
    assert gradients[0].shape == (0, 8)
    assert gradients[1].tolist() == [0.0] * 8


def test_computes_the_norm_of_the_model(backend: str) -> None:
    """The same as trainer.models.layers.RMSNorm under a hidden mask, with a residual before it."""
    torch.manual_seed(1)
    norm = RMSNorm(48, EPS)
    norm.weight.data.normal_()
    mask = (torch.rand(48) * 3 - 1).clamp(0, 1)
    stream = Masks(hidden=mask, hold_scale=True).stream()
    x, residual = (torch.randn(2, 9, 48) * (mask > 0) for _ in range(2))
    expected = norm(x + residual, stream)
    gain = stream.norm_scale()
    assert gain is not None
    gain = norm.weight * gain
    normed, total = rms_norm(x, gain, EPS, residual=residual, scale=stream.scale)
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(total, x + residual)


def test_same_bits_every_time(backend: str) -> None:
    torch.manual_seed(2)
    inputs = torch.randn(150, 40), torch.randn(40)
    results = []
    for _ in range(3):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        normed, _ = rms_norm(leaves[0], leaves[1], EPS)
        results.append([normed, *torch.autograd.grad(normed.square().sum(), leaves)])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_activation_checkpointing_changes_nothing(backend: str) -> None:
    torch.manual_seed(5)
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((6, 10), (10,))]

    def loss(x: Tensor, gain: Tensor) -> Tensor:
        normed, total = rms_norm(x * 2, gain, EPS, residual=x)
        return (normed * total).square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("complete", [True, False])
def test_operator_is_registered_correctly(backend: str, complete: bool) -> None:
    x, gain = torch.randn(6, 10, requires_grad=True), torch.randn(10, requires_grad=True)
    if not registry.runs_kernels("rms_norm", x):
        pytest.skip("the operator runs kernels only")
    residual = torch.randn(6, 10, requires_grad=True) if complete else None
    scale = torch.tensor(1.5) if complete else None
    operators = torch.ops.shorn
    arguments = (x, gain, residual, scale, EPS)
    torch.library.opcheck(operators.rms_norm.default, arguments)
    gradient, inverse = torch.randn(6, 10), torch.rand(6)
    total_gradient = gradient * 2 if complete else None
    backward = (gradient, total_gradient, x.detach(), inverse, gain.detach(), scale)
    torch.library.opcheck(operators.rms_norm_backward.default, backward)


def test_compiles_without_graph_break(backend: str) -> None:
    torch.manual_seed(3)
    inputs = [torch.randn(6, 10), torch.randn(10), torch.randn(6, 10)]

    def loss(x: Tensor, gain: Tensor, residual: Tensor) -> Tensor:
        normed, total = rms_norm(x, gain, EPS, residual=residual)
        return (normed * total).square().sum()

    compiles(loss, inputs)


def test_fp64_keeps_its_precision(backend: str) -> None:
    torch.manual_seed(4)
    x, gain = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 12), (12,)))
    normed, _ = rms_norm(x, gain, EPS)
    close(normed, formula(x, gain, None, None, torch.float64)[0], 1e-6)
    inputs = [tensor[..., :4].requires_grad_() for tensor in (x, gain)]
    assert torch.autograd.gradcheck(lambda x, gain: rms_norm(x, gain, EPS, residual=x)[0], inputs)


WRONG = [
    ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "x must be fp64, fp32, bf16 or fp16"),
    ({"x": torch.tensor(1.0)}, "x must be a tensor of at least 1 dimension, got [] torch.float32"),
    (
        {"x": torch.zeros(4, 2).t()},
        "x must be contiguous in its last dimension, got strides (1, 2)",
    ),
    ({"x": torch.zeros(2, 0)}, "x must be at least 1 wide, got [2, 0] torch.float32 on cpu"),
    ({"gain": torch.zeros(5)}, "gain must be [4] torch.float64 or torch.float32 or "),
    ({"gain": torch.zeros(4, device="meta")}, "on cpu, got [4] torch.float32 on meta"),
    ({"residual": torch.zeros(3, 4)}, "residual must be [2, 4] torch.float32 on cpu, got [3, 4]"),
    ({"residual": torch.zeros(2, 4).half()}, "residual must be [2, 4] torch.float32 on cpu, got"),
    ({"residual": torch.zeros(4, 2).t()}, "residual must be contiguous in its last dimension, got"),
    (
        {"scale": torch.ones(1)},
        "scale must be [] torch.float32 on cpu, got [1] torch.float32 on cpu",
    ),
    ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_bad_input_is_refused(backend: str, changed: dict[str, Tensor], message: str) -> None:
    good = {"x": torch.zeros(2, 4), "gain": torch.ones(4), "eps": EPS}
    given = {"residual": None, "scale": None, **good, **changed}
    with pytest.raises(ValueError) as caught:
        rms_norm(**given)  # type: ignore[arg-type]
    assert str(caught.value).startswith("rms_norm: ")
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="rms_norm: "):
        torch.ops.shorn.rms_norm(
            *(given[name] for name in ("x", "gain", "residual", "scale", "eps"))
        )


def test_wrong_gradient_is_refused(backend: str) -> None:
    x, gain, inverse = torch.zeros(2, 4), torch.ones(4), torch.ones(2)
    with pytest.raises(ValueError, match=r"rms_norm: gradient must be \[2, 4\] .* got \[4, 2\]"):
        torch.ops.shorn.rms_norm_backward(torch.zeros(4, 2), None, x, inverse, gain, None)
