"""rope against a rotation by complex numbers in fp64, for every implementation."""

import random

import pytest
import torch
from torch import Tensor

from tests.trainer.kernels.backends import large
from tests.trainer.kernels.comparison import DTYPES, compare, compiles, draw_rows
from trainer.kernels import registry
from trainer.kernels.rope import rope

# Batch, length, heads, key heads, head dim, rotary dim.
SHAPES = (
    (1, 1, 1, 1, 2, 2),
    (2, 5, 3, 1, 16, 16),
    (1, 37, 4, 4, 64, 64),
    (3, 9, 5, 2, 24, 10),
    (2, 4, 7, 7, 20, 4),
    (1, 6, 40, 8, 16, 12),
    (2, 3, 2, 3, 130, 130),
    *large((2, 257, 12, 4, 80, 20), (2, 1025, 32, 8, 128, 128)),
)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
    pairs = pairs * torch.complex(cos, sin).unsqueeze(-2)
    return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :]), dim=-1)


def rounded_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(x.double(), cos.double(), sin.double()).to(x.dtype)


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = random.Random(f"{shape} {dtype}")
    torch.manual_seed(generator.randrange(2**31))
    batch, length, heads, key_heads, head_dim, rotary_dim = shape
    query = draw_rows((batch, length, heads, head_dim), dtype, generator)
    key = draw_rows((batch, length, key_heads, head_dim), dtype, generator)
    angles = torch.rand(length, rotary_dim // 2) * 6.3
    table = generator.choice([dtype, torch.float32])
    return query, key, angles.cos().to(table), angles.sin().to(table)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_complex_rotation(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key, cos, sin = draw(shape, dtype)
    angles = (cos.double(), sin.double())
    compare(
        lambda query, key: rope(query, key, cos, sin),
        lambda query, key: (rotate(query, *angles), rotate(key, *angles)),
        (query, key),
        roundings=1 if registry.runs_kernels("rope", query) else 3,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_may_have_positions_of_their_own(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    query, key, cos, _ = draw(shape, dtype)
    # Every other position of a wider table: rows need not be contiguous.
    angles = torch.rand(shape[0], 2 * shape[1], shape[5] // 2)[:, ::2] * 6.3
    cos, sin = angles.cos().to(cos.dtype), angles.sin().to(cos.dtype)
    compare(
        lambda query, key: rope(query, key, cos, sin),
        lambda query, key: (
            rotate(query, cos.double(), sin.double()),
            rotate(key, cos.double(), sin.double()),
        ),
        (query, key),
        roundings=1 if registry.runs_kernels("rope", query) else 3,
    )
    same = cos[:1].expand_as(cos), sin[:1].expand_as(sin)
    for one, other in zip(rope(query, key, cos[0], sin[0]), rope(query, key, *same), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overwrites_what_is_not_needed_any_more(backend: str, dtype: torch.dtype) -> None:
    query, key, cos, sin = draw((2, 9, 4, 2, 24, 10), dtype)
    query, key = query.contiguous(), key.contiguous()
    expected = rope(query, key, cos, sin)
    found = rope(query, key, cos, sin, in_place=True)
    for given, result, wanted in zip((query, key), found, expected, strict=True):
        assert (result is given) == registry.runs_kernels("rope", query)
        assert torch.equal(result, wanted)


def test_keeps_what_a_backward_pass_or_the_memory_layout_needs(backend: str) -> None:
    query, key, cos, sin = draw((2, 9, 4, 2, 16, 8), torch.float32)
    query, key = query.contiguous(), key.contiguous()
    wide = torch.randn(2, 9, 4, 32)[..., :16]
    for given in (query.clone().requires_grad_() * 1, wide):
        before = given.detach().clone()
        found = rope(given, key.clone(), cos, sin, in_place=True)
        assert torch.equal(given, before) and found[0] is not given
    with pytest.raises(ValueError, match="rope: query must be contiguous to be overwritten"):
        torch.ops.shorn.rope_(wide, key, cos, sin)


def test_heads_before_positions(backend: str) -> None:
    """Views of [B, heads, S, head_dim] as attention returns them, also as gradients."""
    torch.manual_seed(0)
    query, key = (torch.randn(2, heads, 9, 16).transpose(1, 2) for heads in (4, 2))
    angles = torch.rand(9, 8)
    leaves = (query.detach().requires_grad_(), key.detach().requires_grad_())
    found = rope(leaves[0], leaves[1], angles.cos(), angles.sin())
    gradients = [torch.randn_like(tensor) for tensor in (query, key)]
    assert gradients[0].stride() == query.stride()
    received = torch.autograd.grad(found, leaves, gradients)
    for x, result, gradient, back in zip((query, key), found, gradients, received, strict=True):
        torch.testing.assert_close(result, rounded_rotation(x, angles.cos(), angles.sin()))
        torch.testing.assert_close(back, rounded_rotation(gradient, angles.cos(), -angles.sin()))


def test_only_one_of_both_results_is_used(backend: str) -> None:
    query, key, cos, sin = draw((1, 5, 2, 2, 8, 8), torch.float32)
    key.requires_grad_()
    (found,) = torch.autograd.grad(rope(query, key, cos, sin)[1].sum(), key)
    torch.testing.assert_close(found, rounded_rotation(torch.ones_like(key), cos, -sin))


def test_without_positions(backend: str) -> None:
    query, key, cos, sin = draw((2, 0, 2, 2, 8, 8), torch.float32)
    found = rope(query, key, cos, sin)
    assert found[0].shape == query.shape and found[1].shape == key.shape


def test_operator_is_registered_correctly(backend: str) -> None:
    query, key, cos, sin = draw((2, 5, 3, 1, 16, 8), torch.float32)
    query, key = (x.detach().contiguous().requires_grad_() for x in (query, key))
    if not registry.runs_kernels("rope", query):
        pytest.skip("the operator runs kernels only")
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.shorn.rope.default, (query, key, cos, sin, inverse))
    detached = (query.detach(), key.detach(), cos, sin)
    torch.library.opcheck(torch.ops.shorn.rope_.default, detached)


def test_compiles_without_graph_break(backend: str) -> None:
    query, key, cos, sin = draw((2, 5, 3, 1, 16, 8), torch.float32)

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = rope(query, key, cos, sin)
        return (query * key).square().sum()

    compiles(loss, [query, key])


def test_fp64_keeps_its_precision(backend: str) -> None:
    query, key, cos, sin = (x.double() for x in draw((1, 3, 2, 1, 6, 4), torch.float32))
    query, key = query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (query, key))


WRONG = [
    ({"query": torch.zeros(2, 3, 8)}, "query must be a tensor of 4 dimensions, got [2, 3, 8]"),
    ({"query": torch.zeros(2, 3, 4, 8).long()}, "query must be fp64, fp32, bf16 or fp16, got"),
    ({"query": torch.zeros(2, 3, 8, 4).mT}, "query must be contiguous in its last dimension, got"),
    ({"key": torch.zeros(2, 4, 2, 8)}, "key must be [2, 3, 2, 8] torch.float32 on cpu, got [2, 4,"),
    ({"key": torch.zeros(2, 3, 8)}, "key must be [2, 3, 0, 8] torch.float32 on cpu, got [2, 3, 8]"),
    ({"key": torch.zeros(2, 3, 2, 8).half()}, "on cpu, got [2, 3, 2, 8] torch.float16 on cpu"),
    ({"key": torch.zeros(2, 3, 8, 2).mT}, "key must be contiguous in its last dimension, got"),
    ({"cos": torch.zeros(3, 5)}, "cos must be [3, at most 4], got [3, 5] torch.float32 on cpu"),
    ({"cos": torch.zeros(3, 0)}, "cos must be [3, at most 4], got [3, 0] torch.float32 on cpu"),
    ({"cos": torch.zeros(2, 4)}, "cos must be [3, 4] torch.float32 on cpu, got [2, 4]"),
    (
        {"cos": torch.zeros(3, 4).half()},
        "cos must be [3, 4] torch.float32 on cpu, got [3, 4] torch.",
    ),
    ({"cos": torch.zeros(1, 3, 4)}, "cos must be [2, 3, 4] torch.float32 on cpu, got [1, 3, 4]"),
    ({"cos": torch.zeros(2, 3, 4)}, "sin must be [2, 3, 4] torch.float32 on cpu, got [3, 4]"),
    ({"sin": torch.zeros(3, 3)}, "sin must be [3, 4] torch.float32 on cpu, got [3, 3]"),
    ({"sin": torch.zeros(4, 3).t()}, "sin must be contiguous in its last dimension, got strides"),
    ({"sin": torch.zeros(3, 4, device="meta")}, "on cpu, got [3, 4] torch.float32 on meta"),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_bad_input_is_refused(backend: str, changed: dict[str, Tensor], message: str) -> None:
    good = {"query": torch.zeros(2, 3, 4, 8), "key": torch.zeros(2, 3, 2, 8)}
    given = {**good, "cos": torch.ones(3, 4), "sin": torch.zeros(3, 4), **changed}
    with pytest.raises(ValueError) as caught:
        rope(given["query"], given["key"], given["cos"], given["sin"])
    assert str(caught.value).startswith("rope: ")
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="rope: "):
        torch.ops.shorn.rope(*given.values(), False)
