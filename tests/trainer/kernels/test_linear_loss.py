"""The head's loss, plain and with a teacher, equals that of full logits and never holds them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.errors import InputError
from trainer.kernels import linear_cross_entropy as operator
from trainer.kernels.linear_cross_entropy import (
    LOGITS_BYTES,
    TeacherOutput,
    linear_cross_entropy,
    linear_distillation,
)

BACKENDS = ("reference",)
pytestmark = pytest.mark.usefixtures("backend")


def _inputs(
    tokens: int, size: int, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, size, dtype=torch.float64).to(dtype)
    weight = torch.randn(classes, size, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, classes, (tokens,))
    weights = torch.rand(tokens) * (torch.rand(tokens) > 0.3)
    targets[weights == 0] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets, weights


def _reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, token losses and gradients from the whole logits in fp64."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    losses = F.cross_entropy(h @ w.t(), targets, ignore_index=-100, reduction="none")
    loss = (losses * weights.double()).sum()
    loss.backward()
    assert h.grad is not None and w.grad is not None
    return loss.detach(), losses.detach(), h.grad, w.grad


@pytest.mark.parametrize("chunk", [1, 7, 16, 37, 100, None])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)]
)
def test_loss_and_gradients_equal_full_logits(
    chunk: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    hidden, weight, targets, weights = _inputs(37, 24, 101, dtype)
    expected = _reference(hidden, weight, targets, weights)
    loss, losses = linear_cross_entropy(hidden, weight, targets, weights, chunk)
    assert loss.dtype == losses.dtype == (torch.float64 if dtype.itemsize == 8 else torch.float32)
    assert not losses.requires_grad
    assert torch.equal(losses[weights == 0], torch.zeros_like(losses[weights == 0]))
    loss.backward()
    for ours, theirs in zip(
        (loss.detach(), losses, hidden.grad, weight.grad), expected, strict=True
    ):
        assert ours is not None
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    assert torch.equal(hidden.grad[weights == 0], torch.zeros_like(hidden.grad[weights == 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_free_path_gives_the_same_loss(dtype: torch.dtype) -> None:
    hidden, weight, targets, weights = _inputs(37, 24, 101, dtype)
    loss, losses = linear_cross_entropy(hidden, weight, targets, weights, 8)
    with torch.no_grad():
        again, again_losses = linear_cross_entropy(hidden, weight, targets, weights, 8)
    assert not again.requires_grad
    torch.testing.assert_close(again, loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again_losses, losses, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_asked_for_are_made_and_scaled() -> None:
    hidden, weight, targets, weights = _inputs(20, 8, 30, torch.float64)
    _, _, d_hidden, d_weight = _reference(hidden, weight, targets, weights)
    loss, _ = linear_cross_entropy(hidden.detach(), weight, targets, weights, 6)
    (3 * loss).backward()
    torch.testing.assert_close(weight.grad, 3 * d_weight)
    loss, _ = linear_cross_entropy(hidden, weight.detach(), targets, weights, 6)
    loss.backward()
    torch.testing.assert_close(hidden.grad, d_hidden)


def test_confident_mistakes_keep_their_exact_loss() -> None:
    hidden = torch.tensor([[300.0, 0.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([1]), torch.ones(1))
    assert loss.item() == 300.0


def test_all_tokens_ignored_gives_zero() -> None:
    hidden, weight, targets, _ = _inputs(5, 4, 9, torch.float32)
    loss, losses = linear_cross_entropy(hidden, weight, targets, torch.zeros(5))
    loss.backward()
    assert loss.item() == 0 and losses.abs().sum() == 0
    assert weight.grad is not None and weight.grad.abs().sum() == 0


@pytest.mark.cpu
@pytest.mark.parametrize("target", [-1, 9])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    hidden, weight, targets, _ = _inputs(5, 4, 9, torch.float32)
    targets = targets.clamp(min=0)
    targets[2] = target
    with pytest.raises(InputError, match=f"target id {target} is outside .* 9"):
        linear_cross_entropy(hidden, weight, targets, torch.ones(5))


class _LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operator returned, views left out, and
    those inside of the loss's own operator."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.shorn.linear_cross_entropy.default:
            # What runs inside an operator is hidden from modes.
            with self:
                return operator._run(*args)
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("gradients", [True, False])
def test_logits_of_all_tokens_are_never_held(gradients: bool) -> None:
    tokens, size, classes, chunk = 512, 16, 2048, 32
    hidden, weight, targets, weights = _inputs(tokens, size, classes, torch.float32)
    with _LargestTensor() as largest, torch.set_grad_enabled(gradients):
        loss, _ = linear_cross_entropy(hidden, weight, targets, weights, chunk)
        if gradients:
            loss.backward()
    assert largest.elements <= max(chunk * classes, classes * size, tokens * size)
    assert largest.elements < tokens * classes / 10


@pytest.mark.cpu
def test_the_default_chunk_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, size, classes = 4096, 2, 4096
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 4 * classes * 320)
    hidden, weight, targets, weights = _inputs(tokens, size, classes, torch.float32)
    with _LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, targets, weights)
    assert largest.elements == 320 * classes


def _teacher_output(tokens: int, classes: int, dtype: torch.dtype, **options: Any) -> TeacherOutput:
    torch.manual_seed(1)
    states = torch.randn(tokens, 16, dtype=torch.float64).to(dtype)
    head = torch.randn(classes, 16, dtype=torch.float64).to(dtype)
    return TeacherOutput(states, head, **({"alpha": 0.5} | options))


def _distillation_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, teacher_output: TeacherOutput
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, token losses, divergences and gradients from the whole logits in fp64."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = h @ w.t()
    teacher_logits = teacher_output.states.double() @ teacher_output.head_weight.double().t()
    losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    student = (logits / teacher_output.temperature).log_softmax(1)
    teacher = (teacher_logits / teacher_output.temperature).softmax(1)
    if teacher_output.top_k:
        student, teacher = _with_others_joined(student, teacher, teacher_output.top_k)
    divergences = F.kl_div(student, teacher, reduction="none").sum(1) * (weights != 0)
    factor = teacher_output.alpha * teacher_output.temperature**2
    loss = (((1 - teacher_output.alpha) * losses + factor * divergences) * weights.double()).sum()
    loss.backward()
    assert h.grad is not None and w.grad is not None
    return loss.detach(), losses.detach(), divergences.detach(), h.grad, w.grad


def _with_others_joined(student: Tensor, teacher: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Log probabilities and probabilities of the teacher's likeliest ids and of all others."""
    likeliest, ids = teacher.topk(top_k, dim=1)
    if top_k == teacher.shape[1]:
        return student.gather(1, ids), likeliest
    own = student.gather(1, ids)
    others = torch.ones_like(student).scatter(1, ids, 0.0).bool()
    rest = student.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    tail = (teacher * others).sum(1, keepdim=True)
    return torch.cat([own, rest], dim=1), torch.cat([likeliest, tail], dim=1)


def _compare_distillation(
    dtype: torch.dtype, tolerance: float, chunk: int | None, **options: Any
) -> None:
    hidden, weight, targets, weights = _inputs(37, 24, 101, dtype)
    teacher_output = _teacher_output(37, 101, dtype, **options)
    expected = _distillation_reference(hidden, weight, targets, weights, teacher_output)
    loss, losses, divergences = linear_distillation(
        hidden, weight, targets, weights, teacher_output, chunk
    )
    assert not losses.requires_grad and not divergences.requires_grad
    loss.backward()
    found = (loss.detach(), losses, divergences, hidden.grad, weight.grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    ignored = weights == 0
    assert ignored.any() and not divergences[ignored].any() and not hidden.grad[ignored].any()


@pytest.mark.parametrize("chunk", [1, 7, 37, None])
@pytest.mark.parametrize("top_k", [0, 2, 9, 101])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_distillation_equals_full_logits(
    alpha: float, temperature: float, top_k: int, chunk: int | None
) -> None:
    options = {"alpha": alpha, "temperature": temperature, "top_k": top_k}
    _compare_distillation(torch.float64, 1e-13, chunk, **options)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "top_k"),
    [(torch.float32, 1e-5, 0), (torch.float32, 1e-5, 9), (torch.bfloat16, 4e-2, 0)],
)
def test_distillation_in_lower_precision(dtype: torch.dtype, tolerance: float, top_k: int) -> None:
    _compare_distillation(dtype, tolerance, 16, top_k=top_k, temperature=2.0)


def test_top_k_in_bf16_takes_the_teachers_own_order() -> None:
    """Rounded logits tie; whichever of them are taken, both distributions are over the same ids."""
    hidden, weight, targets, weights = _inputs(37, 24, 101, torch.bfloat16)
    teacher_output = TeacherOutput(hidden.detach(), weight.detach(), 1.0, 1.0, 9)
    loss, _, divergences = linear_distillation(hidden, weight, targets, weights, teacher_output, 16)
    loss.backward()
    assert loss.item() == 0 and not divergences.any()
    assert hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_teacher_of_alpha_zero_changes_nothing(dtype: torch.dtype) -> None:
    results = []
    for distil in (False, True):
        hidden, weight, targets, weights = _inputs(37, 24, 101, dtype)
        arguments = (hidden, weight, targets, weights)
        if distil:
            teacher_output = _teacher_output(37, 101, dtype, alpha=0.0, temperature=2.0)
            loss, losses, divergences = linear_distillation(*arguments, teacher_output, 8)
            assert divergences.sum() > 0
        else:
            loss, losses = linear_cross_entropy(*arguments, 8)
        loss.backward()
        results.append((loss.detach(), losses, hidden.grad, weight.grad))
    for plain, distilled in zip(*results, strict=True):
        assert plain is not None and distilled is not None and torch.equal(plain, distilled)


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_equal_to_its_teacher_is_left_alone(temperature: float, top_k: int) -> None:
    hidden, weight, targets, weights = _inputs(37, 24, 101, torch.float32)
    teacher_output = TeacherOutput(hidden, weight, 1.0, temperature, top_k)
    loss, losses, divergences = linear_distillation(
        hidden, weight, targets, weights, teacher_output, 8
    )
    loss.backward()
    assert loss.item() == 0 and not divergences.any() and losses.sum() > 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_the_teacher_gets_no_gradients() -> None:
    hidden, weight, targets, weights = _inputs(20, 8, 30, torch.float64)
    teacher_output = _teacher_output(20, 30, torch.float64)
    teacher_output.states.requires_grad_()
    teacher_output.head_weight.requires_grad_()
    loss, _, divergences = linear_distillation(hidden, weight, targets, weights, teacher_output, 6)
    loss.backward()
    assert teacher_output.states.grad is None and teacher_output.head_weight.grad is None
    with torch.no_grad():
        again, _, same = linear_distillation(hidden, weight, targets, weights, teacher_output, 6)
    assert not again.requires_grad and torch.equal(again, loss.detach())
    assert torch.equal(same, divergences)


@pytest.mark.parametrize("top_k", [0, 4])
def test_logits_of_student_and_teacher_are_never_held_whole(top_k: int) -> None:
    tokens, size, classes, chunk = 512, 16, 2048, 32
    hidden, weight, targets, weights = _inputs(tokens, size, classes, torch.float32)
    teacher_output = _teacher_output(tokens, classes, torch.float32, top_k=top_k)
    arguments = (hidden, weight, targets, weights, teacher_output)
    with _LargestTensor() as largest:
        linear_distillation(*arguments, chunk)[0].backward()
    assert largest.elements <= max(chunk * classes, classes * size, tokens * size)
    assert largest.elements < tokens * classes / 10


@pytest.mark.cpu
def test_the_default_chunk_counts_the_teachers_logits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, classes = 4096, 4096
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 4 * classes * 640)
    hidden, weight, targets, weights = _inputs(tokens, 2, classes, torch.float32)
    teacher_output = TeacherOutput(hidden.detach(), weight.detach(), 0.5)
    with _LargestTensor() as largest:
        linear_distillation(hidden, weight, targets, weights, teacher_output)
    assert largest.elements == 320 * classes
