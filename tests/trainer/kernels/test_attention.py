"""attention against its formula in fp64, for every implementation."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.kernels.backends import large
from tests.trainer.kernels.comparison import (
    DTYPES,
    close,
    compare,
    compiles,
    draw_mask,
    draw_rows,
)
from trainer.kernels import registry
from trainer.kernels.attention import attention

# Batch, positions, heads, key heads, width of a head.
SHAPES = (
    (1, 2, 1, 1, 1),
    (2, 5, 3, 3, 4),
    (1, 33, 2, 1, 16),
    (2, 37, 4, 2, 24),
    (1, 64, 2, 2, 32),
    (1, 70, 3, 1, 7),
    (1, 20, 6, 2, 33),
    (1, 97, 2, 2, 16),
    *large((2, 515, 8, 2, 80), (1, 1024, 32, 8, 128)),
)
OPTIONS = ("head_mask", "documents", "window", "scale")
# Weights, and the output from which the mask's gradient comes, are rounded to the inputs' dtype.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def run(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """`attention`; rest: head_mask, documents, window and scale as far as they are given."""
    return attention(query, key, value, **dict(zip(OPTIONS, rest, strict=False)))


def formula(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """The same in fp64."""
    head_mask, documents, window, scale = fill(rest)
    length, heads, head_dim = query.shape[1:]
    reads = torch.arange(heads) // (heads // key.shape[2])
    scores = torch.einsum("bihd,bjhd->bhij", query, key[:, :, reads])
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    output = torch.einsum("bhij,bjhd->bihd", weights, value[:, :, reads])
    # By definition a mask has no gradient where it is 0.
    return output if head_mask is None else output * (head_mask * (head_mask != 0))[:, None]


def fill(rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """As many as there are options, None those that are not given."""
    return (*rest, *(None,) * (len(OPTIONS) - len(rest)))


def draw_documents(batch: int, length: int, generator: random.Random) -> Tensor | None:
    """None, or ids of documents of random lengths that differ between rows."""
    if generator.random() < 0.4:
        return None
    starts = torch.rand(batch, length) < generator.choice([0.02, 0.1, 0.5])
    return starts.cumsum(1).to(generator.choice([torch.int32, torch.int64]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_formula(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = random.Random(f"{shape} {dtype}")
    torch.manual_seed(generator.randrange(2**31))
    batch, length, heads, key_heads, head_dim = shape
    query = draw_rows((batch, length, heads, head_dim), dtype, generator)
    key, value = (
        draw_rows((batch, length, key_heads, head_dim), dtype, generator) for _ in range(2)
    )
    documents = draw_documents(batch, length, generator)
    window = generator.choice([None, 2, 3, 18, length, 1000])
    scale = generator.choice([None, 0.3])

    def with_rest(function: Any) -> Any:
        return lambda *tensors: function(*tensors, documents, window, scale)

    inputs = (query, key, value, draw_mask(heads, generator))
    compare(with_rest(run), with_rest(formula), inputs, tolerance=TOLERANCE[dtype], roundings=3)


@pytest.mark.parametrize(("length", "window"), [(1, None), (40, 1)])
def test_only_itself_is_seen(backend: str, length: int, window: int | None) -> None:
    """The output is the value, and scores do not matter."""
    torch.manual_seed(11)
    leaves = [torch.randn(2, length, 2, 8, requires_grad=True) for _ in range(3)]
    output = run(*leaves, None, None, window)
    close(output, leaves[2].detach().double(), 1e-6)
    outer = torch.randn_like(output)
    d_query, d_key, d_value = torch.autograd.grad(output, leaves, outer)
    close(d_value, outer.double(), 1e-6)
    assert max(d_query.abs().max(), d_key.abs().max()) < 1e-5


@pytest.mark.parametrize("window", [None, 5])
def test_parts_of_one_projection(backend: str, window: int | None) -> None:
    """Queries, keys and values that are slices of one tensor, heads before positions."""
    torch.manual_seed(0)

    def of_all(function: Any) -> Any:
        def split(all_heads: Tensor, mask: Tensor) -> Tensor:
            query, key, value = all_heads.transpose(1, 2).split([4, 2, 2], 2)
            return function(query, key, value, mask, None, window)

        return split

    compare(of_all(run), of_all(formula), (torch.randn(2, 8, 40, 12), torch.rand(4)))


def test_documents_are_computed_apart(backend: str) -> None:
    torch.manual_seed(1)
    lengths = (17, 1, 20, 16, 6)
    documents = torch.repeat_interleave(torch.tensor([3, 4, 7, 8, 90]), torch.tensor(lengths))
    leaves = [torch.randn(1, sum(lengths), 2, 8, requires_grad=True) for _ in range(3)]
    found = run(*leaves, None, documents.unsqueeze(0))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    parts = zip(*(leaf.split(lengths, 1) for leaf in exact), strict=True)
    expected = torch.cat([formula(*part) for part in parts], 1)
    close(found, expected, 3e-6)
    gradients = torch.autograd.grad(found.square().sum(), leaves)
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    for gradient, other in zip(gradients, wanted, strict=True):
        close(gradient, other, 3e-6)


def test_heads_with_mask_zero_have_no_part(backend: str) -> None:
    """Output and gradients of the head are 0, also that of its mask, which is exact elsewhere."""
    torch.manual_seed(3)
    query, key, value = (torch.randn(1, 40, 3, 8) for _ in range(3))
    expected = formula(query.double(), key.double(), value.double()).sum((0, 1, 3))
    if backend == "triton":
        # The kernels do not compute with them.
        key[:, :, 1] = value[:, :, 1] = torch.nan
    mask = torch.tensor([0.5, 0.0, 1.0])
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, mask)]
    output = run(*leaves)
    *gradients, d_mask = torch.autograd.grad(output.sum(), leaves)
    for tensor in (output, *gradients):
        assert tensor[:, :, 1].abs().max() == 0
        assert tensor[:, :, 0].abs().max() > 0
    assert d_mask[1] == 0
    close(d_mask[::2], expected[::2], 1e-5)


def test_large_scores_do_not_overflow(backend: str) -> None:
    """Scores that differ by thousands, of integers: their sums are exact in any order. The backward
    pass finds exponents of base 2 again, up to 2^16 and rounded to 2^-9 in both passes, so that
    weights may be off by ln(2) * 2 * 2^-9 = 2.7e-3."""
    torch.manual_seed(5)
    query, key = (torch.randn(1, 40, 1, 16).mul(100).round() for _ in range(2))
    # Two keys that differ where queries are 0 share what weight they get: no gradient vanishes.
    query[..., 0] = 0
    key[:, 1, :, 1:] = key[:, 0, :, 1:]
    compare(run, formula, (query, key, torch.randn(1, 40, 1, 16)), tolerance=2.7e-3)


@pytest.mark.parametrize("mask", [(-0.7, 2.5), (0.0, 0.0), (1.0, 1.0)], ids=str)
def test_masks_of_one_kind(backend: str, mask: tuple[float, float]) -> None:
    torch.manual_seed(6)
    inputs = [torch.randn(1, 20, 2, 8) for _ in range(3)]
    compare(run, formula, (*inputs, torch.tensor(mask)))


@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 0, 2, 3)], ids=str)
def test_without_rows(backend: str, shape: tuple[int, ...]) -> None:
    leaves = [torch.zeros(shape, requires_grad=True) for _ in range(3)]
    mask = torch.ones(2, requires_grad=True)
    documents = torch.zeros(shape[:2], dtype=torch.int64)
    output = run(*leaves, mask, documents, 1)
    assert output.shape == shape
    *gradients, d_mask = torch.autograd.grad(output.sum(), (*leaves, mask))
    assert all(gradient.shape == shape for gradient in gradients)
    assert d_mask.tolist() == [0.0] * 2


def test_same_bits_every_time(backend: str) -> None:
    torch.manual_seed(7)
    inputs = (torch.randn(1, 40, 4, 8), *(torch.randn(1, 40, 2, 8) for _ in range(2)))
    results = []
    for _ in range(2):
        leaves = [tensor.clone().requires_grad_() for tensor in (*inputs, torch.ones(4))]
        result = run(*leaves)
        results.append([result, *torch.autograd.grad(result.square().sum(), leaves)])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("complete", [True, False])
def test_operator_is_registered_correctly(backend: str, complete: bool) -> None:
    query = torch.randn(2, 6, 4, 8, requires_grad=True)
    key, value = (torch.randn(2, 6, 2, 8, requires_grad=True) for _ in range(2))
    if not registry.runs_kernels("attention", query):
        pytest.skip("the operator runs kernels only")
    mask = torch.rand(4, requires_grad=True) if complete else None
    documents = torch.tensor([[0, 0, 1, 1, 1, 2]]).expand(2, 6) if complete else None
    rest = (4, 0.3) if complete else (None, None)
    arguments = (query, key, value, mask, documents, *rest)
    torch.library.opcheck(torch.ops.shorn.attention.default, arguments)
    tensors = [None if t is None else t.detach() for t in arguments[:5]]
    saved = torch.ops.shorn.attention(*tensors, *rest)
    backward = (torch.randn(2, 6, 4, 8), *saved, *tensors, *rest)
    torch.library.opcheck(torch.ops.shorn.attention_backward.default, backward)


def test_compiles_without_graph_break(backend: str) -> None:
    torch.manual_seed(8)
    inputs = [*(torch.randn(1, 20, 2, 8) for _ in range(3)), torch.rand(2)]
    documents = torch.arange(20).div(6, rounding_mode="floor").unsqueeze(0)

    def loss(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        plain = attention(query, key, value)
        return (plain * run(query, key, value, mask, documents, 9)).sum()

    compiles(loss, inputs)


def test_fp64_keeps_its_precision(backend: str) -> None:
    torch.manual_seed(9)
    inputs = [torch.randn(1, 5, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    mask = torch.rand(4, dtype=torch.float64, requires_grad=True)
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    assert torch.autograd.gradcheck(lambda *x: run(*x, documents, 2), (*inputs, mask))


def test_wide_heads(backend: str) -> None:
    """The kernels take 256 channels in tiles of their own, and leave more to the reference."""
    torch.manual_seed(10)
    documents = torch.arange(20).div(7, rounding_mode="floor").unsqueeze(0)

    def of_documents(function: Any) -> Any:
        return lambda *tensors: function(*tensors, documents)

    for width in (200, 256, 260):
        inputs = [torch.randn(1, 20, heads, width) for heads in (2, 1, 1)]
        compare(run, formula, inputs)
        compare(of_documents(run), of_documents(formula), (*inputs, torch.rand(2)))


WRONG = [
    ({"query": torch.zeros(1, 4, 2)}, "query must be a tensor of 4 dimensions, got [1, 4, 2]"),
    ({"query": torch.zeros(1, 4, 2, 8, dtype=torch.int32)}, "query must be fp64, fp32, bf16 or fp"),
    ({"query": torch.zeros(1, 4, 8, 2).mT}, "query must be contiguous in its last dimension, got"),
    ({"query": torch.zeros(1, 4, 2, 0)}, "query must be at least 1 wide, got [1, 4, 2, 0]"),
    ({"query": torch.zeros(1, 4, 3, 8)}, "of a number of heads that divides query's 3, got [1, 4"),
    ({"key": torch.zeros(1, 5, 2, 8)}, "key must be [1, 4, 2, 8] torch.float32 on cpu, got [1, 5"),
    ({"key": torch.zeros(1, 4, 2, 8).half()}, "torch.float32 on cpu, got [1, 4, 2, 8] torch.float"),
    ({"key": torch.zeros(1, 4, 8, 2).mT}, "key must be contiguous in its last dimension, got stri"),
    ({"value": torch.zeros(1, 4, 1, 8)}, "value must be [1, 4, 2, 8] torch.float32 on cpu, got ["),
    (
        {"value": torch.zeros(1, 4, 2, 8, device="meta")},
        "on cpu, got [1, 4, 2, 8] torch.float32 on",
    ),
    ({"head_mask": torch.ones(4)}, "head_mask must be [2] torch.float32 on cpu, got [4] torch.flo"),
    ({"head_mask": torch.ones(2).half()}, "head_mask must be [2] torch.float32 on cpu, got [2] to"),
    (
        {"documents": torch.zeros(1, 5, dtype=torch.int32)},
        "documents must be [1, 4] torch.int32 or",
    ),
    ({"documents": torch.zeros(1, 4)}, "torch.int32 or torch.int64 on cpu, got [1, 4] torch.float"),
    ({"window": 0}, "window must be at least 1, got 0"),
    ({"scale": 0.0}, "scale must be above 0 and finite, got 0.0"),
    ({"scale": float("nan")}, "scale must be above 0 and finite, got nan"),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_bad_input_is_refused(backend: str, changed: dict[str, Any], message: str) -> None:
    good = {name: torch.zeros(1, 4, 2, 8) for name in ("query", "key", "value")}
    rest = dict.fromkeys(("head_mask", "documents", "window", "scale"))
    given = {**good, **rest, **changed}
    with pytest.raises(ValueError) as caught:
        attention(**given)
    assert str(caught.value).startswith("attention: ")
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="attention: "):
        torch.ops.shorn.attention(*given.values())


def test_wrong_gradient_is_refused(backend: str) -> None:
    x, statistic = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 4)
    for gradient in (torch.zeros(1, 4, 8, 2), torch.zeros(1, 4, 8, 2).mT):
        with pytest.raises(ValueError, match="attention: gradient must be "):
            torch.ops.shorn.attention_backward(
                gradient, x, statistic, x, x, x, None, None, None, None
            )
