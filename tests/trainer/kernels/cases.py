"""Random arguments of gather_scale, and what is expected of it in fp64."""

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tests.trainer.kernels.backends import DEVICE, INTERPRETED

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 15, 16, 17, 33, 70, 131)
LARGE = (1000, 1003, 2048, 5504)
# The interpreter is slow, and a GPU waits for the compiler.
SEEDS = 20 if INTERPRETED or DEVICE == "cuda" else 60
# Allowed relative error of sums and products; results in bf16 and fp16 are rounded once more.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Case(NamedTuple):
    weight: Tensor
    rows: Tensor | None
    row_scale: Tensor | None
    columns: Tensor | None
    column_scale: Tensor | None

    @property
    def n(self) -> int:
        return self.weight.shape[0] if self.rows is None else len(self.rows)

    @property
    def m(self) -> int:
        return self.weight.shape[1] if self.columns is None else len(self.columns)


def draw_index(size: int, generator: random.Random) -> Tensor | None:
    """All, none, one, some in or out of order, or runs of a head's width."""
    kind = generator.choice(["all", "none", "one", "ascending", "shuffled", "runs"])
    if kind == "all":
        return None
    if kind == "runs":
        width = generator.choice([1, 4, 16, 64])
        starts = [start for start in range(0, size, width) if generator.random() < 0.5]
        chosen = [i for start in starts for i in range(start, min(size, start + width))]
    else:
        count = {"none": 0, "one": min(1, size)}.get(kind, generator.randint(0, size))
        chosen = generator.sample(range(size), count)
        chosen = chosen if kind == "shuffled" else sorted(chosen)
    return torch.tensor(chosen, dtype=torch.int64)


def draw_case(seed: int, dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> Case:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    out, width = (generator.choice(sizes) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(out, width, dtype=wide).to(dtype)
    if generator.random() < 0.3:  # rows of a wider tensor, or a transposed one
        weight = torch.randn(out, width + 3, dtype=wide).to(dtype)[:, 1 : width + 1]
    elif generator.random() < 0.2:
        weight = weight.t().contiguous().t()
    # Masks: a third each exactly 0, exactly 1 and between.
    scales = [
        None if generator.random() < 0.25 else (torch.rand(size, dtype=wide) * 3 - 1).clamp(0, 1)
        for size in (out, width)
    ]
    rows, columns = draw_index(out, generator), draw_index(width, generator)
    return Case(weight, rows, scales[0], columns, scales[1])


def draw_cases(dtype: torch.dtype) -> Iterator[tuple[Case, random.Random]]:
    """Many small weights and on a GPU some large ones, each with a generator of its own."""
    for seed in range(SEEDS):
        yield draw_case(seed, dtype), random.Random(~seed)
    for seed in range(6 if DEVICE == "cuda" else 0):
        yield draw_case(seed, dtype, LARGE), random.Random(~seed)


def in_double(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight, selected rows and columns, and the scales, all present and in fp64."""
    out, width = case.weight.shape
    one = torch.ones(1, dtype=torch.float64)
    return (
        case.weight.double(),
        torch.arange(out) if case.rows is None else case.rows,
        one.expand(out) if case.row_scale is None else case.row_scale.double(),
        torch.arange(width) if case.columns is None else case.columns,
        one.expand(width) if case.column_scale is None else case.column_scale.double(),
    )


def expected_forward(case: Case) -> Tensor:
    weight, rows, row_scale, columns, column_scale = in_double(case)
    return weight[rows][:, columns] * row_scale[rows].unsqueeze(1) * column_scale[columns]


def expected_backward(case: Case, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight, rows, row_scale, columns, column_scale = in_double(case)
    spread = torch.zeros_like(weight)
    spread[rows.unsqueeze(1), columns] = gradient.double()
    product = spread * weight
    d_weight = spread * row_scale.unsqueeze(1) * column_scale
    return d_weight, product @ column_scale, row_scale @ product


def poison() -> None:
    """Leaves NaN in the memory that the next allocations of a test are likely to get."""
    sizes = (1, 8, 64, 512, 4096, 16384, *((2**20, 2**23) if DEVICE == "cuda" else ()))
    kept = [torch.full((size,), torch.nan) for size in sizes for _ in "abc"]
    del kept


def assert_close(found: Tensor, expected: Tensor, size: Tensor | None = None) -> None:
    """Equal up to the rounding of `found`'s dtype; `size`: magnitude of what was added up."""
    wide = torch.float64 if found.dtype == torch.float64 else torch.float32
    scale = expected.abs() if size is None else size
    allowed = TOLERANCE[wide] * scale + ROUNDING.get(found.dtype, 0.0) * expected.abs()
    smallest = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    error = (found.double() - expected).abs()
    assert found.shape == expected.shape
    assert bool((error <= allowed + smallest).all()), error.max()
