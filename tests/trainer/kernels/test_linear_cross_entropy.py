"""The loss of a linear head as one operator, whatever computes what is between its products.

Its values in every dtype and chunk are the subject of tests/trainer/kernels/test_linear_loss.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from tests.trainer.kernels.backends import DEVICE, Sizes, large
from tests.trainer.kernels.comparison import compiles
from trainer.kernels import linear_cross_entropy as operator
from trainer.kernels import registry
from trainer.kernels.linear_cross_entropy import (
    LOGITS_BYTES,
    TeacherOutput,
    adds_to,
    default_chunk,
    linear_cross_entropy,
    linear_distillation,
)

BACKENDS = ("reference", "operator")
SIZES = TOKENS, WIDTH, CLASSES = 11, 8, 70
CHUNK = 4
FP32_TOLERANCE = 5e-5 if DEVICE == "cuda" else 1e-5
# More tokens than the device takes at a time.
SEVERAL_CHUNKS = (2500, 64, 1003) if DEVICE == "cuda" else (300, WIDTH, CLASSES)


def draw(
    dtype: torch.dtype = torch.float32, sizes: Sizes = SIZES
) -> tuple[Tensor, Tensor, Tensor, Tensor, TeacherOutput]:
    torch.manual_seed(0)
    tokens, width, classes = sizes
    # Logits are about as large for all widths.
    hidden, weight = (
        torch.randn(tokens, width),
        torch.randn(classes, width) * (WIDTH / width) ** 0.5,
    )
    states, head = torch.randn(tokens, 6).to(dtype), torch.randn(classes, 6).to(dtype)
    token_weights = torch.rand(tokens) * (torch.arange(tokens) % 3 > 0)
    targets = torch.randint(classes, (tokens,)).masked_fill(token_weights == 0, -100)
    teacher_output = TeacherOutput(states, head, alpha=0.4, temperature=1.5)
    return hidden.to(dtype), weight.to(dtype), targets, token_weights, teacher_output


def losses_of(
    dtype: torch.dtype = torch.float32, sizes: Sizes = SIZES, chunk: int | None = CHUNK
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The loss as a function of hidden states and weight: plain, and with each kind of teacher."""
    _, _, targets, token_weights, teacher_output = draw(dtype, sizes)
    rest = targets, token_weights
    few = teacher_output._replace(top_k=5)
    return {
        "plain": lambda hidden, weight: linear_cross_entropy(hidden, weight, *rest, chunk)[0],
        "teacher": lambda hidden, weight: linear_distillation(
            hidden, weight, *rest, teacher_output, chunk
        )[0],
        "top-k": lambda hidden, weight: linear_distillation(hidden, weight, *rest, few, chunk)[0],
    }


KINDS = ("plain", "teacher", "top-k")


def gradients(loss: Callable[[Tensor, Tensor], Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    result = loss(*leaves)
    return result.detach(), *torch.autograd.grad(result, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_fp64(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Also through the Triton kernels; fp64 goes through the reference, which is tested."""
    compare(kind, dtype, SIZES, CHUNK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes", [SEVERAL_CHUNKS, *large((1024, 512, 32000), (130, 256, 49152))], ids=str
)
@pytest.mark.parametrize("kind", ["plain", "teacher"])
def test_the_devices_own_chunks_equal_fp64(
    backend: str, kind: str, sizes: Sizes, dtype: torch.dtype
) -> None:
    """Only with several chunks is the head's gradient a sum of several products."""
    assert SEVERAL_CHUNKS[0] > default_chunk(SEVERAL_CHUNKS[0], SEVERAL_CHUNKS[2], DEVICE)
    compare(kind, dtype, sizes, None)


def compare(kind: str, dtype: torch.dtype, sizes: Sizes, chunk: int | None) -> None:
    """Loss and gradients in `dtype` equal those in fp64."""
    wide = torch.float64
    expected = gradients(losses_of(wide, sizes, chunk)[kind], *draw(wide, sizes)[:2])
    losses = gradients(losses_of(dtype, sizes, chunk)[kind], *draw(dtype, sizes)[:2])
    tolerance = {torch.float32: FP32_TOLERANCE, torch.bfloat16: 4e-2, torch.float16: 6e-3}[dtype]
    for found, exact in zip(losses, expected, strict=True):
        assert found.dtype == (torch.float32 if found.dim() == 0 else dtype)
        assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_break(backend: str, kind: str) -> None:
    compiles(losses_of()[kind], draw()[:2])


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_operator_is_registered_correctly(
    backend: str, needs: tuple[bool, bool], teacher: bool
) -> None:
    hidden, weight, targets, token_weights, teacher_output = draw()
    rest = tuple(teacher_output) if teacher else (None, None, 0.0, 1.0, 0)
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    arguments = (hidden, weight, targets, token_weights, *rest, 4, *needs)
    torch.library.opcheck(torch.ops.shorn.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_by_checkpointing(backend: str, kind: str) -> None:
    loss = losses_of()[kind]

    def checkpointed(hidden: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = checkpoint(loss, hidden, weight, use_reentrant=False)
        return result

    inputs = draw()[:2]
    pairs = zip(gradients(checkpointed, *inputs), gradients(loss, *inputs), strict=True)
    assert all(torch.equal(found, expected) for found, expected in pairs)


def test_gradients_are_kept_once_and_given_away(backend: str) -> None:
    """The gradient that the forward pass computed becomes the leaf's, without a copy."""
    hidden, weight = (tensor.requires_grad_() for tensor in draw()[:2])
    loss = losses_of()["plain"](hidden, weight)
    kept = {tensor.data_ptr() for tensor in saved(loss)}
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert {hidden.grad.data_ptr(), weight.grad.data_ptr()} == kept


def saved(loss: Tensor) -> list[Tensor]:
    """What the backward pass of the loss keeps."""
    node: Any = loss.grad_fn
    return list(node.saved_tensors)


def test_a_second_backward_pass_is_refused(backend: str) -> None:
    """The first has scaled the gradients in place."""
    hidden, weight = (tensor.requires_grad_() for tensor in draw()[:2])
    loss = losses_of()["plain"](hidden, weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_tokens(backend: str) -> None:
    hidden, weight = torch.zeros(0, WIDTH, requires_grad=True), draw()[1].requires_grad_()
    nothing = torch.zeros(0)
    loss, losses = linear_cross_entropy(hidden, weight, nothing.long(), nothing)
    loss.backward()
    assert loss.item() == 0 and losses.shape == (0,)
    assert weight.grad is not None and not weight.grad.any()
    assert hidden.grad is not None and hidden.grad.shape == (0, WIDTH)


def test_the_chosen_implementation_computes_the_chunks(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = registry.triton_module("cross_entropy", torch.device(DEVICE))
    assert (module is not None) == (backend == "triton")
    if module is not None:
        forward, sizes = module.forward, []

        def recorded(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            sizes.append(len(logits))
            found: tuple[Tensor, Tensor] = forward(logits, *rest)
            return found

        monkeypatch.setattr(module, "forward", recorded)
        gradients(losses_of()["plain"], *draw()[:2])
        assert sizes == [4, 4, 3]


@pytest.mark.parametrize("classes", [1, 1000, 32000, 49152, 128256, 2 * 128256])
@pytest.mark.parametrize("tokens", [0, 100, 2048, 8192])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_chunk_is_bounded(classes: int, tokens: int, device: str) -> None:
    chunk = default_chunk(tokens, classes, device)
    assert chunk % 64 == 0
    small = 4 * chunk * classes <= LOGITS_BYTES[device]
    assert chunk == 256 or (chunk > 256 and small)
    assert chunk <= (2048 if device == "cuda" else max(256, tokens / 8))


def test_a_gpu_takes_larger_chunks() -> None:
    assert [default_chunk(4096, 32000, kind) for kind in ("cpu", "cuda")] == [512, 2048]
    assert default_chunk(4096, 128256, "cuda") == 2048
    assert default_chunk(4096, 2 * 128256, "cuda") == 1024


def test_a_cpu_takes_larger_chunks_of_more_tokens() -> None:
    assert [default_chunk(count, 32000) for count in (2048, 3072, 8192)] == [256, 384, 1024]
    assert default_chunk(8192, 128256) == 512


@pytest.mark.parametrize(("plain", "device"), [(True, "cpu"), (False, "meta")])
def test_chunks_are_those_of_the_device_and_of_what_runs_there(
    plain: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "runs_reference", lambda name, where: plain)
    monkeypatch.setattr(operator, "default_chunk", lambda *arguments: arguments)
    weight = torch.empty(CLASSES, WIDTH, device="meta")
    chosen: Any = operator._chunk_tokens
    assert chosen(TOKENS, weight, None) == (TOKENS, CLASSES, device)
    assert chosen(TOKENS, weight, weight) == (TOKENS, 2 * CLASSES, device)


def test_is_compiled_once_for_all_numbers_of_tokens() -> None:
    """Although the chunk follows from them."""
    counter = CompileCounter()
    torch._dynamo.reset()
    loss = torch.compile(linear_cross_entropy, backend=counter, fullgraph=True, dynamic=True)
    weight = torch.randn(7, 3)
    for tokens in (2048, 3072, 8192):
        hidden, targets = torch.randn(tokens, 3), torch.randint(7, (tokens,))
        arguments = hidden, weight, targets, torch.full((tokens,), 1 / tokens)
        torch.testing.assert_close(loss(*arguments), linear_cross_entropy(*arguments))
    assert counter.frame_count == 1


@pytest.fixture
def wide_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Products of 16-bit matrices add to fp32 ones, as CUDA's do; the factor `beta` of each."""
    original, betas = torch.addmm, []

    def add(total: Tensor, left: Tensor, right: Tensor, **options: Any) -> Tensor:
        assert left.dtype == right.dtype != total.dtype == options.pop("out_dtype")
        betas.append(options.get("beta", 1))
        return original(total, left.float(), right.float(), **options)

    adds_to.cache_clear()
    monkeypatch.setattr(torch, "addmm", add)
    yield betas
    adds_to.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_the_heads_gradient_are_added_where_a_device_can(
    wide_products: list[float], kind: str, dtype: torch.dtype
) -> None:
    found = gradients(losses_of(dtype)[kind], *draw(dtype)[:2])
    # The first call asks whether the device can; the first part replaces what is in memory.
    assert wide_products == [1, 0, 1, 1]
    expected = gradients(losses_of(torch.float64)[kind], *draw(torch.float64)[:2])
    tolerance = 4e-2 if dtype == torch.bfloat16 else 6e-3
    for value, exact in zip(found, expected, strict=True):
        assert (value.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_a_device_is_asked_whether_its_products_add_to_fp32(
    monkeypatch: pytest.MonkeyPatch, wide_products: list[float]
) -> None:
    question = torch.float32, torch.bfloat16, torch.device("cpu")
    assert adds_to(*question)

    def rounds(total: Tensor, left: Tensor, right: Tensor, **options: Any) -> Tensor:
        return options["out"].copy_(total.bfloat16() + left @ right)

    for wrong in (rounds, lambda total, *_, **__: total):
        adds_to.cache_clear()
        monkeypatch.setattr(torch, "addmm", wrong)
        assert not adds_to(*question)

    def lacks(*_: Tensor, **options: Any) -> Tensor:
        raise NotImplementedError("no such product")

    adds_to.cache_clear()
    monkeypatch.setattr(torch, "addmm", lacks)
    assert not adds_to(*question)


WRONG = [
    ({"hidden": torch.zeros(12, WIDTH)}, "targets must be [12] torch.int64 on cpu, got [11]"),
    (
        {"hidden": torch.zeros(TOKENS, 9)},
        "weight must be [70, 9] torch.float32 on cpu, got [70, 8]",
    ),
    ({"weight": torch.zeros(CLASSES, WIDTH).half()}, "weight must be [70, 8] torch.float32 on cpu"),
    (
        {"weight": torch.zeros(WIDTH, CLASSES).t()},
        "weight must be contiguous in its last dimension",
    ),
    (
        {"targets": torch.zeros(TOKENS)},
        "targets must be [11] torch.int64 on cpu, got [11] torch.fl",
    ),
    ({"token_weights": torch.ones(3)}, "token_weights must be [11] torch.float32 or torch.float64"),
    ({"states": torch.zeros(10, 6)}, "states must be [11, 6] torch.float32 on cpu, got [10, 6]"),
    ({"head_weight": torch.zeros(9, 6)}, "head_weight must be [70, 6] torch.float32 on cpu, got"),
    ({"alpha": 1.5}, "alpha must be in [0, 1], got 1.5"),
    ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
    ({"top_k": 71}, "top_k must be in [0, 70], got 71"),
    ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_bad_input_is_refused(changed: dict[str, Any], message: str) -> None:
    hidden, weight, targets, token_weights, teacher_output = draw()
    given: dict[str, Any] = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "token_weights": token_weights,
        "states": teacher_output.states,
        "head_weight": teacher_output.head_weight,
        "alpha": 0.4,
        "temperature": 1.5,
        "top_k": 0,
        "chunk_tokens": 4,
        "needs_hidden": True,
        "needs_weight": True,
        **changed,
    }
    with pytest.raises(ValueError) as caught:
        torch.ops.shorn.linear_cross_entropy(*given.values())
    assert str(caught.value).startswith("linear_cross_entropy: ")
    assert message in str(caught.value)
