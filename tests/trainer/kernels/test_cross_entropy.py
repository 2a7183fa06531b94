"""cross_entropy_ against its formula in fp64, for every implementation."""

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.trainer.kernels.backends import Sizes, large
from tests.trainer.kernels.comparison import DTYPES, close, draw_rows
from trainer.kernels import cross_entropy, registry
from trainer.kernels.cross_entropy import cross_entropy_

WIDE_AND_NARROW = (torch.float64, *DTYPES)
# Rows of up to 32,768 logits have a kernel of their own.
LARGE = large((257, 1003), (70, 32000), (16, 49152))
SHAPES = ((1, 1), (1, 2), (5, 17), (3, 64), (7, 65), (2, 127), (9, 300), (4, 1100), *LARGE)


class Case(NamedTuple):
    logits: Tensor
    targets: Tensor
    token_weights: Tensor
    teacher_logits: Tensor | None
    alpha: float
    temperature: float


def draw(
    shape: Sizes,
    dtype: torch.dtype,
    *,
    teacher: bool = False,
    alpha: float = 0.0,
    temperature: float = 1.0,
    size: float = 3.0,
) -> Case:
    """Random logits of about `size`, some of wider tensors; a third of the tokens weigh 0."""
    generator = random.Random(f"{shape} {dtype} {teacher} {alpha} {temperature} {size}")
    torch.manual_seed(generator.randrange(2**31))
    logits, others = ((draw_rows(shape, torch.float32, generator) * size) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    token_weights = torch.rand(shape[0], dtype=wide) * (torch.rand(shape[0]) > 0.3)
    targets = torch.randint(shape[1], (shape[0],))
    pair = (with_gaps(logits.to(dtype)), others.to(dtype) if teacher else None)
    return Case(pair[0], targets, token_weights, pair[1], alpha, temperature)


def with_gaps(values: Tensor) -> Tensor:
    """The same rows, with NaN between them."""
    wider = values.new_full((values.shape[0], values.shape[1] + 3), torch.nan)
    wider[:, : values.shape[1]] = values
    return wider[:, : values.shape[1]]


def formula(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies, divergences (zeros without a teacher) and the gradient of the logits, by
    autograd in fp64."""
    logits = case.logits.double().requires_grad_()
    losses = -logits.log_softmax(1).gather(1, case.targets[:, None]).squeeze(1)
    divergences = torch.zeros_like(losses)
    if case.teacher_logits is not None:
        teacher = (case.teacher_logits.double() / case.temperature).log_softmax(1)
        student = (logits / case.temperature).log_softmax(1)
        divergences = (teacher.exp() * (teacher - student)).sum(1)
    mixed = (1 - case.alpha) * losses + case.alpha * case.temperature**2 * divergences
    (gradient,) = torch.autograd.grad((mixed * case.token_weights.double()).sum(), logits)
    counts = case.token_weights != 0
    return losses.detach() * counts, divergences.detach() * counts, gradient


def compare(case: Case, tolerance: float = 3e-6) -> None:
    """Results and the gradient, which is rounded once, equal the formula's; gaps are untouched."""
    expected_losses, expected_divergences, expected_gradient = formula(case)
    logits = with_gaps(case.logits)
    losses, divergences = cross_entropy_(logits, *case[1:])
    assert losses.dtype == divergences.dtype == case.token_weights.dtype
    if case.logits.dtype == torch.float64:
        tolerance = 1e-13
    close(losses, expected_losses, tolerance)
    if case.teacher_logits is None:
        assert divergences.shape == (0,)
    else:
        close(divergences, expected_divergences, tolerance)
    close(logits, expected_gradient, tolerance)
    ignored = case.token_weights == 0
    assert not losses[ignored].any() and not logits[ignored].any()
    whole = logits.as_strided((len(logits), logits.stride(0)), (logits.stride(0), 1))
    assert bool(whole[:, logits.shape[1] :].isnan().all())


@pytest.mark.parametrize("dtype", WIDE_AND_NARROW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_formula(backend: str, shape: Sizes, dtype: torch.dtype) -> None:
    compare(draw(shape, dtype))


@pytest.mark.parametrize("dtype", WIDE_AND_NARROW, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_teacher_equals_formula(
    backend: str, temperature: float, alpha: float, dtype: torch.dtype
) -> None:
    for shape in ((1, 1), (5, 17), (6, 130), *LARGE):
        compare(draw(shape, dtype, teacher=True, alpha=alpha, temperature=temperature), 1e-5)


@pytest.mark.parametrize("dtype", WIDE_AND_NARROW, ids=str)
@pytest.mark.parametrize("teacher", [False, True])
def test_blocks_of_rows_equal_formula(
    teacher: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: blocks of one row, and of two with one left over."""
    options: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0} if teacher else {}
    for rows in (1, 2):
        row = 17 * (8 if dtype == torch.float64 else 4)
        monkeypatch.setattr(cross_entropy, "_BLOCK_BYTES", rows * row)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        case = draw((5, 17), dtype, teacher=teacher, **options)
        assert len(cross_entropy._blocks(case.logits)) == -(-5 // rows)
        compare(case, 1e-5)


def test_is_compiled_once_for_all_numbers_of_rows() -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy_, backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 9, 14):
        case = draw((rows, 300), torch.float32)
        logits = case.logits.clone()
        losses, _ = compiled(logits, *case[1:3])
        expected_losses, _, gradient = formula(case)
        close(losses, expected_losses, 3e-6)
        close(logits, gradient, 3e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("teacher", [False, True])
def test_extreme_logits(backend: str, teacher: bool, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0} if teacher else {}
    for shape in ((6, 50), (6, 130)):
        compare(draw(shape, dtype, teacher=teacher, size=1e4, **options))


def test_confident_mistakes_keep_their_exact_loss(backend: str) -> None:
    """Far from 0 in fp32 the sum's logarithm would be lost beside the greatest logit."""
    logits = torch.tensor([[1e4, 1e4, 0.0]])
    losses, _ = cross_entropy_(logits, torch.tensor([0]), torch.ones(1))
    torch.testing.assert_close(losses, torch.tensor([2.0]).log(), rtol=1e-6, atol=0)
    assert logits.tolist() == [[-0.5, 0.5, 0.0]]
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    assert cross_entropy_(logits, torch.tensor([2]), torch.ones(1))[0].tolist() == [2e4]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_student_equal_to_its_teacher_is_left_alone(
    backend: str, dtype: torch.dtype, temperature: float
) -> None:
    logits = draw((5, 130), dtype).logits
    teacher_logits, weights = logits.clone(), torch.ones(5)
    targets = torch.zeros(5, dtype=torch.int64)
    losses, divergences = cross_entropy_(logits, targets, weights, teacher_logits, 1.0, temperature)
    assert bool((losses > 0).all())
    assert not divergences.any() and not logits.any()


def test_without_tokens(backend: str) -> None:
    logits, nothing = torch.zeros(0, 8), torch.zeros(0)
    losses, divergences = cross_entropy_(logits, nothing.long(), nothing, torch.zeros(0, 8), 0.5)
    assert losses.shape == divergences.shape == (0,)


def test_same_bits_every_time(backend: str) -> None:
    case = draw((7, 300), torch.bfloat16, teacher=True, alpha=0.5, temperature=2.0)
    results = []
    for _ in range(3):
        logits = case.logits.clone()
        results.append((logits, *cross_entropy_(logits, *case[1:])))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("teacher", [False, True])
def test_operator_is_registered_correctly(backend: str, teacher: bool) -> None:
    case = draw((6, 10), torch.float32, teacher=teacher, alpha=0.5, temperature=2.0)
    if not registry.runs_kernels("cross_entropy", case.logits):
        pytest.skip("the operator runs kernels only")
    torch.library.opcheck(torch.ops.shorn.cross_entropy_.default, tuple(case))


def test_compiles_without_graph_break(backend: str) -> None:
    """What it mutates may come from another operation and go into the next."""

    def gradient(logits: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        chunk = logits * 2
        losses, divergences = cross_entropy_(chunk, *case[1:])
        return chunk + 1, losses, divergences

    case = draw((6, 10), torch.float32, teacher=True, alpha=0.5, temperature=2.0)
    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        compiled(case.logits, case), gradient(case.logits, case), strict=True
    ):
        torch.testing.assert_close(found, expected)


WRONG = [
    ({"logits": torch.zeros(2, 4, dtype=torch.int64)}, "logits must be fp64, fp32, bf16 or fp16"),
    ({"logits": torch.zeros(2, 2, 4)}, "logits must be a tensor of 2 dimensions, got [2, 2, 4]"),
    ({"logits": torch.zeros(4, 2).t()}, "logits must be contiguous in its last dimension, got str"),
    ({"logits": torch.zeros(2, 0)}, "logits must be at least 1 wide, got [2, 0]"),
    ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets must be [2] torch.int64 on cpu, got"),
    ({"targets": torch.zeros(2)}, "targets must be [2] torch.int64 on cpu, got [2] torch.float32"),
    ({"token_weights": torch.ones(2).bfloat16()}, "got [2] torch.bfloat16 on cpu"),
    ({"token_weights": torch.ones(2, device="meta")}, "on cpu, got [2] torch.float32 on meta"),
    (
        {"teacher_logits": torch.zeros(2, 5)},
        "teacher_logits must be [2, 4] torch.float32 on cpu, got [2, 5]",
    ),
    (
        {"teacher_logits": torch.zeros(4, 2).t()},
        "teacher_logits must be contiguous in its last dimension, got str",
    ),
    ({"alpha": 1.5}, "alpha must be 0 to 1, got 1.5"),
    ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_bad_input_is_refused(backend: str, changed: dict[str, Any], message: str) -> None:
    given = {
        "logits": torch.zeros(2, 4),
        "targets": torch.zeros(2, dtype=torch.int64),
        "token_weights": torch.ones(2),
        "teacher_logits": torch.zeros(2, 4),
        "alpha": 0.5,
        "temperature": 1.0,
        **changed,
    }
    with pytest.raises(ValueError) as caught:
        cross_entropy_(**given)
    assert str(caught.value).startswith("cross_entropy: ")
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="cross_entropy: "):
        torch.ops.shorn.cross_entropy_(*given.values())
