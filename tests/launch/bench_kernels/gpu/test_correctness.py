"""The checks of operators pass on right results and notice wrong ones."""

from dataclasses import asdict
from typing import Any

import pytest
import torch

from launch.bench_kernels.gpu import cases as gpu_cases
from launch.bench_kernels.gpu.cases import MASKS, ROWS, Case, arguments, cases, draw_mask
from launch.bench_kernels.gpu.correctness import WrongResultError, check, poisoned, require_close
from launch.bench_kernels.gpu.run import backends
from trainer.kernels import registry
from trainer.kernels.linear_cross_entropy import default_chunk

CPU = torch.device("cpu")
SMALL = 4096


def unit(name: str, case: Case, backend: str, choice: str) -> dict[str, Any]:
    return {"operator": name, "case": asdict(case), "backend": backend, "choice": choice}


@pytest.mark.parametrize("name", ROWS)
def test_every_implementation_on_this_machine_is_right(name: str) -> None:
    for backend, choice in backends(name, "cpu").items():
        for case in cases(name, SMALL):
            assert 0 <= check(unit(name, case, backend, choice), CPU)["worst"] <= 1


@pytest.mark.parametrize("name", ROWS)
def test_cases_cover_dtypes_masks_and_large_shapes(name: str) -> None:
    """Large ones have what 7B models have, and the small ones fit the interpreter."""
    every, small = cases(name), cases(name, SMALL)
    assert {case.mask for case in every} == set(MASKS)
    assert {case.dtype for case in every} == set(gpu_cases.DTYPES)
    assert 3 <= len(small) < len(every) == 3 * len(ROWS[name].sizes)


def test_losses_of_several_chunks_are_checked_in_16_bits() -> None:
    """With weights that count: only then is the head's gradient a sum of several products."""
    dtypes = set()
    for case in cases("cross_entropy"):
        tokens, _, vocabulary = case.sizes
        if tokens > default_chunk(tokens, 2 * vocabulary, "cuda") and case.mask != "zeros":
            dtypes.add(case.dtype)
    assert dtypes >= {"bf16", "fp16"}


def test_every_operator_is_checked() -> None:
    assert {operator.name for operator in registry.operators()} <= ROWS.keys()


def test_masks_are_of_their_kind() -> None:
    torch.manual_seed(0)
    assert draw_mask(9, "none") is None
    values = {kind: draw_mask(900, kind) for kind in MASKS if kind != "none"}
    shares = {
        kind: [float((mask == x).float().mean()) for x in (0, 1)]
        for kind, mask in values.items()
        if mask is not None
    }
    assert shares["zeros"] == [1, 0] and shares["ones"] == [0, 1] and shares["between"] == [0, 0]
    assert shares["mixed"] == pytest.approx([1 / 3, 1 / 3], abs=0.1)


def test_arguments_are_the_same_every_time_and_keep_their_strides() -> None:
    case = Case((7, 33), "bf16", "mixed")
    (gate, up, mask), _ = arguments("swiglu", case, CPU)
    (again, _, _), _ = arguments("swiglu", case, CPU)
    assert gate is not None and up is not None and mask is not None and again is not None
    assert torch.equal(gate, again) and gate.stride() == (66, 1) and mask.dtype == torch.float32


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1.0, 2.0, 3.1], "1 of 3 values are wrong, by up to 0.1 where the largest is 3"),
        ([1.0, float("nan"), 3.0], "1 of 3 values are wrong"),
        ([1.0, 2.0], r"has shape \[2\], not \[3\]"),
    ],
)
def test_wrong_values_are_refused(found: list[float], message: str) -> None:
    expected = torch.tensor([1.0, 2.0, 3.0]).double()
    with pytest.raises(WrongResultError, match=f"gradient 1.*{message}"):
        require_close("gradient 1", torch.tensor(found), expected, 1e-5)


def test_one_rounding_is_allowed_and_two_are_not() -> None:
    expected = torch.linspace(1, 2, 1000).double()
    rounded = expected.to(torch.bfloat16)
    assert require_close("x", rounded, expected, 0.0) <= 1
    with pytest.raises(WrongResultError):
        require_close("x", (rounded.float() * 1.01).to(torch.bfloat16), expected, 0.0)


def test_memory_is_poisoned_within() -> None:
    with poisoned(CPU):
        assert torch.empty(10).isnan().all()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_implementation_is_not_taken_for_the_one_checked() -> None:
    case = Case((7, 33), "fp32", "mixed")
    with pytest.raises(WrongResultError, match="reference ran instead of cuda"):
        check(unit("swiglu", case, "cuda", "reference"), CPU)
