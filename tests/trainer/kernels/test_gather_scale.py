"""gather_scale against plain indexing in fp64, for the reference and the compiled operator."""

import pytest
import torch
from torch import Tensor

from tests.trainer.kernels.backends import DEVICE
from tests.trainer.kernels.cases import (
    DTYPES,
    SEEDS,
    Case,
    assert_close,
    draw_case,
    draw_cases,
    expected_backward,
    expected_forward,
    in_double,
    poison,
)
from trainer.kernels import library, registry
from trainer.kernels.gather_scale import gather_scale, gather_scale_backward

BACKENDS = ("reference", "compiled")


def absolute(case: Case) -> Case:
    """Its backward pass adds up the magnitudes of what that of `case` adds up."""
    return case._replace(
        weight=case.weight.abs(),
        row_scale=None if case.row_scale is None else case.row_scale.abs(),
        column_scale=None if case.column_scale is None else case.column_scale.abs(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_equals_indexing(backend: str, dtype: torch.dtype) -> None:
    for case, _ in draw_cases(dtype):
        poison()
        found = gather_scale(*case)
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert_close(found, expected_forward(case))
        if found.numel():
            assert found.data_ptr() != case.weight.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_equals_indexing(backend: str, dtype: torch.dtype) -> None:
    for case, generator in draw_cases(dtype):
        accumulated = dtype != torch.float64 and generator.random() < 0.5
        gradient = torch.randn(case.n, case.m).to(torch.float32 if accumulated else dtype)
        if generator.random() < 0.2:
            gradient = gradient.t().contiguous().t()
        first, second, third = (generator.random() < 0.75 for _ in range(3))
        needs = (first, second, third)
        poison()
        found = gather_scale_backward(gradient, *case, needs)
        expected = expected_backward(case, gradient)
        sizes = expected_backward(absolute(case), gradient.abs())
        present = (True, case.row_scale is not None, case.column_scale is not None)
        for index, tensor in enumerate(found):
            assert (tensor is not None) == (needs[index] and present[index])
            if tensor is not None:
                source = (case.weight, case.row_scale, case.column_scale)[index]
                assert source is not None
                assert tensor.dtype == source.dtype
                assert_close(tensor, expected[index], sizes[index])
        if found[0] is not None:
            outside = torch.ones_like(case.weight, dtype=torch.bool)
            _, rows, _, columns, _ = in_double(case)
            outside[rows.unsqueeze(1), columns] = False
            assert bool((found[0][outside] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_summed_in_fp32_are_not_rounded_first(backend: str, dtype: torch.dtype) -> None:
    """Passes that share a weight hand over the fp32 sum of their gradients."""
    for seed in range(6):
        case = draw_case(seed, dtype)
        gradient = torch.randn(case.n, case.m)
        poison()
        found = gather_scale_backward(gradient, *case, (True, True, True))
        sizes = expected_backward(absolute(case), gradient.abs())
        expected = expected_backward(case, gradient)
        for result, wanted, size in zip(found, expected, sizes, strict=True):
            if result is not None:
                assert_close(result, wanted, size)


def test_mask_gradients_are_exact_where_the_mask_is_zero(backend: str) -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    row_scale, column_scale = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.0])
    gradient = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    d_weight, d_rows, d_columns = gather_scale_backward(
        gradient, weight, None, row_scale, None, column_scale, (True, True, True)
    )
    assert d_weight is not None and d_rows is not None and d_columns is not None
    assert d_weight.tolist() == [[0.0, 0.0], [50.0, 0.0]]
    assert d_rows.tolist() == [0.5, 150.0]
    assert d_columns.tolist() == [300.0, 4000.0]


@pytest.mark.parametrize("kept", [torch.tensor([0, 2]), torch.tensor([2, 0]), torch.arange(16, 48)])
def test_what_is_left_out_is_never_read(backend: str, kept: Tensor) -> None:
    """A NaN in a unit that is not computed does not reach the others."""
    kept = kept.to(DEVICE)
    weight, scale = torch.full((48, 48), torch.nan), torch.full((48,), torch.nan)
    weight[kept.unsqueeze(1), kept] = 1.0
    scale[kept] = 1.0
    case = Case(weight, kept, scale, kept, scale)
    assert bool((gather_scale(*case) == 1.0).all())
    gradient = torch.ones(len(kept), len(kept))
    for found in gather_scale_backward(gradient, *case, (True, True, True)):
        assert found is not None
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_special_values_keep_their_meaning(backend: str, dtype: torch.dtype) -> None:
    """Rounding to nearest even, subnormal numbers, overflow, infinity and NaN, as PyTorch does."""
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 257), dtype=torch.int32)
    factors = bits.view(torch.float32)
    factors[0, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 65519.99, 65520.0])
    for columns in (None, torch.arange(0, 257, 2), torch.arange(257).flip(0)):
        for scale in factors:
            weight = torch.tensor([1.0, -1.0, 1.5], dtype=dtype).unsqueeze(1).expand(3, 257)
            found = gather_scale(weight, None, None, columns, scale)
            expected = (weight.float() * scale).to(dtype)
            expected = expected if columns is None else expected[:, columns]
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(256, 256)
    for columns in (None, torch.arange(256).flip(0), torch.arange(1, 256)):
        found = gather_scale(every, None, None, columns)
        expected = every if columns is None else every[:, columns]
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_numeric_gradients(backend: str) -> None:
    for seed in range(SEEDS // 5):
        case = draw_case(seed, torch.float64)
        scales = [None if s is None else s.requires_grad_() for s in (case[2], case[4])]
        weight = case.weight[:5, :7].clone().requires_grad_()
        rows, columns = torch.tensor([3, 1])[: weight.shape[0] // 4], torch.tensor([0])
        row_scale = None if scales[0] is None else scales[0][: weight.shape[0]]
        column_scale = None if scales[1] is None else scales[1][: weight.shape[1]]
        inputs = (weight, rows, row_scale, columns, column_scale)
        assert torch.autograd.gradcheck(gather_scale, inputs)  # type: ignore[arg-type]


def operators_arguments() -> list[tuple[Tensor | None, ...]]:
    rows, columns = torch.tensor([1, 4, 2]), torch.tensor([0, 5])
    weight = torch.randn(6, 8, requires_grad=True)
    row_scale = torch.rand(6, requires_grad=True)
    return [
        (weight, rows, row_scale, columns, torch.rand(8)),
        (weight, None, None, columns, torch.rand(8, requires_grad=True)),
        (weight.detach(), rows, row_scale, None, None),
        (weight.detach().bfloat16(), rows[:0], None, None, None),
    ]


@pytest.mark.parametrize("arguments", operators_arguments(), ids=["all", "columns", "rows", "none"])
def test_operator_is_registered_correctly(arguments: tuple[Tensor | None, ...]) -> None:
    torch.library.opcheck(torch.ops.shorn.gather_scale.default, arguments)
    detached = [None if t is None else t.detach() for t in arguments]
    gradient = torch.randn_like(gather_scale(*detached))  # type: ignore[arg-type]
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        wanted = (
            needs[0],
            needs[1] and detached[2] is not None,
            needs[2] and detached[4] is not None,
        )
        for summed in (gradient, gradient.float()):
            torch.library.opcheck(
                torch.ops.shorn.gather_scale_backward.default, (summed, *detached, *wanted)
            )


def test_compiles_without_graph_break(backend: str) -> None:
    case = draw_case(5, torch.float32)
    leaves = [
        t.detach().clone().requires_grad_() for t in (case.weight, torch.rand(len(case.weight)))
    ]

    def loss(weight: Tensor, row_scale: Tensor) -> Tensor:
        return gather_scale(weight, case.rows, row_scale, case.columns).square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.cpu
def test_results_do_not_depend_on_the_number_of_threads(backend: str) -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(700, 300), torch.randn(350, 150)
    rows, columns = torch.randperm(700)[:350], torch.randperm(300)[:150].sort().values
    case = Case(weight, rows, torch.rand(700), columns, torch.rand(300))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            gradients = gather_scale_backward(gradient, *case, (True, True, True))
            results.append([gather_scale(*case), *gradients])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for first, other in zip(results[0], others, strict=True):
            assert first is not None and other is not None
            if backend == "compiled":
                assert torch.equal(first, other)
            torch.testing.assert_close(first, other)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("width", [4128, 4132])
def test_gradients_that_go_past_the_cache(dtype: torch.dtype, width: int) -> None:
    """They are stored past it where their rows are aligned; 4132 wide, few are."""
    if not library.is_loaded("cpu"):
        pytest.skip("csrc/ is not built: pip install --no-build-isolation -e .")
    torch.manual_seed(0)
    out = 2**20 // (width * dtype.itemsize) + 1
    rows, columns = (torch.randperm(n)[: n // 2].sort().values for n in (out, width))
    scales = (torch.rand(out), torch.rand(width))
    case = Case(torch.randn(out, width).to(dtype), rows, scales[0], columns, scales[1])
    gradient = torch.randn(case.n, case.m).to(dtype)
    poison()
    found = gather_scale_backward(gradient, *case, (True, True, True))
    with registry.chosen("reference", "cpu"):
        expected = gather_scale_backward(gradient, *case, (True, True, True))
    for result, wanted in zip(found, expected, strict=True):
        assert result is not None and wanted is not None
        torch.testing.assert_close(result, wanted, rtol=2e-3, atol=2e-3)
    assert found[0] is not None and expected[0] is not None
    assert torch.equal(found[0] == 0, expected[0] == 0)


GOOD = Case(torch.zeros(4, 6), torch.tensor([0]), torch.ones(4), torch.tensor([5]), torch.ones(6))


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(4)}, r"weight must be .* got \[4\]"),
        ({"weight": torch.zeros(4, 6, dtype=torch.int32)}, "torch.int32"),
        ({"rows": torch.tensor([[0]])}, r"rows must be \[1\] torch.int64 on cpu, got \[1, 1\]"),
        ({"columns": torch.tensor([0], dtype=torch.int32)}, "columns must be .* torch.int32"),
        ({"rows": torch.tensor([1, 4])}, "row index 4 is out of range for 4 rows"),
        ({"columns": torch.tensor([-1])}, "column index -1 is out of range for 6 columns"),
        ({"row_scale": torch.ones(6)}, r"row_scale must be \[4\]"),
        ({"column_scale": torch.ones(6).double()}, "column_scale must be .* torch.float64"),
        ({"column_scale": torch.ones(6, device="meta")}, "on cpu, got .* on meta"),
    ],
)
def test_bad_input_is_refused(backend: str, changed: dict[str, Tensor], message: str) -> None:
    case = GOOD._replace(**changed)
    with pytest.raises(ValueError, match=f"gather_scale: .*{message}"):
        gather_scale(*case)
    with pytest.raises(ValueError, match=f"gather_scale: .*{message}"):
        gather_scale_backward(torch.zeros(case.n, case.m), *case, (True, True, True))


@pytest.mark.cpu
@pytest.mark.parametrize(
    "gradient", [torch.zeros(1, 2), torch.zeros(1, 1).double(), torch.zeros(1, 1, device="meta")]
)
def test_gradient_must_fit(backend: str, gradient: Tensor) -> None:
    with pytest.raises(ValueError, match=r"gather_scale: gradient must be \[1, 1\] torch.float32"):
        gather_scale_backward(gradient, *GOOD, (True, True, True))


def test_compiled_code_refuses_bad_input_by_itself() -> None:
    """The Python checks run only to explain what it refused."""
    if not library.is_loaded("cpu"):
        pytest.skip("csrc/ is not built: pip install --no-build-isolation -e .")
    operator = torch.ops.shorn.gather_scale_compiled
    for changed in ({"rows": torch.tensor([9])}, {"row_scale": torch.ones(3)}):
        with pytest.raises(RuntimeError, match="gather_scale: row"):
            operator(*GOOD._replace(**changed))
    with pytest.raises(RuntimeError, match="gather_scale: gradient"):
        torch.ops.shorn.gather_scale_backward_compiled(torch.zeros(2, 2), *GOOD, True, True, True)


@pytest.mark.parametrize("arguments", operators_arguments(), ids=["all", "columns", "rows", "none"])
def test_compiled_operator_is_registered_correctly(arguments: tuple[Tensor | None, ...]) -> None:
    if not library.is_loaded("cpu"):
        pytest.skip("csrc/ is not built: pip install --no-build-isolation -e .")
    detached = [None if t is None else t.detach() for t in arguments]
    torch.library.opcheck(torch.ops.shorn.gather_scale_compiled.default, tuple(detached))
    gradient = torch.randn_like(gather_scale(*detached))  # type: ignore[arg-type]
    wanted = (True, detached[2] is not None, detached[4] is not None)
    torch.library.opcheck(
        torch.ops.shorn.gather_scale_backward_compiled.default, (gradient, *detached, *wanted)
    )
