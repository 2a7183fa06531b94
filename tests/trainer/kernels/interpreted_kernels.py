"""What the strict interpreter computes and refuses; run by test_triton.py in its own process."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels import registry
from trainer.kernels.swiglu import swiglu


@triton.jit
def convert(source: tl.tensor, target: tl.tensor, SIZE: tl.constexpr) -> None:
    place = tl.arange(0, SIZE)
    values = tl.load(source + place)
    tl.store(target + place, values.to(target.dtype.element_ty))


@triton.jit
def double(source: tl.tensor, target: tl.tensor, SIZE: tl.constexpr) -> None:
    place = tl.arange(0, SIZE)
    values = tl.load(source + place)
    tl.store(target + place, values + values)


@triton.jit
def shift(source: tl.tensor, target: tl.tensor, SIZE: tl.constexpr) -> None:
    place = tl.arange(0, SIZE)
    tl.store(target + place, tl.load(source + place + 1))


@triton.jit
def shift_write(source: tl.tensor, target: tl.tensor, SIZE: tl.constexpr) -> None:
    place = tl.arange(0, SIZE)
    tl.store(target + place - 1, tl.load(source + place))


@triton.jit
def undefined(source: tl.tensor, target: tl.tensor, SIZE: tl.constexpr) -> None:
    place = tl.arange(0, SIZE)
    tl.store(target + place, tl.load(source + place, mask=place < 3))


@triton.jit
def same_place(source: tl.tensor, target: tl.tensor, SIZE: tl.constexpr) -> None:
    tl.store(target, tl.load(source + tl.program_id(0)))


@triton.jit
def neighbour(source: tl.tensor, target: tl.tensor, SIZE: tl.constexpr) -> None:
    program = tl.program_id(0)
    tl.store(target + program, tl.load(source + program))
    tl.store(target + program, tl.load(target + (program + 1) % SIZE))


@triton.jit
def twice(source: tl.tensor, target: tl.tensor, SIZE: tl.constexpr) -> None:
    place = tl.arange(0, SIZE)
    tl.store(target + place // 2, tl.load(source + place))


@triton.jit
def add_atomically(source: tl.tensor, target: tl.tensor, SIZE: tl.constexpr) -> None:
    tl.atomic_add(target, tl.load(source + tl.program_id(0)))


Kernel = Callable[..., None]


def every_bf16() -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


def test_fp32_rounds_to_the_nearest_bf16() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (2**16,), dtype=torch.int32)
    # Half of the values lie exactly between two neighbours.
    bits[::2] = bits[::2] & -65536 | 32768
    source = bits.view(torch.float32)
    target = torch.empty(2**16, dtype=torch.bfloat16)
    convert[(1,)](source, target, SIZE=2**16)
    torch.testing.assert_close(target, source.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bf16_converts_to_others(dtype: torch.dtype) -> None:
    target = torch.empty(2**16, dtype=dtype)
    convert[(1,)](every_bf16(), target, SIZE=2**16)
    torch.testing.assert_close(target, every_bf16().to(dtype), rtol=0, atol=0, equal_nan=True)


def test_fp16_converts_to_bf16() -> None:
    source = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    target = torch.empty(2**16, dtype=torch.bfloat16)
    convert[(1,)](source, target, SIZE=2**16)
    torch.testing.assert_close(target, source.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("kernel", "programs", "message"),
    [
        (double, 1, "add on bf16: convert to fp32 before"),
        (shift, 1, "1 of 8 addresses are out of bounds"),
        (shift_write, 1, "1 of 8 addresses are out of bounds"),
        (same_place, 2, "1 values were written by another program"),
        (neighbour, 8, "1 values were written by another program"),
        (twice, 1, "one store writes an address twice"),
    ],
)
def test_mistakes_are_errors(kernel: Kernel, programs: int, message: str) -> None:
    source, target = torch.ones(8).bfloat16(), torch.zeros(8).bfloat16()
    with pytest.raises(Exception, match=message):
        kernel[(programs,)](source, target, SIZE=8)  # type: ignore[index]


def test_atomics_on_floating_point_are_errors() -> None:
    with pytest.raises(Exception, match="order that varies"):
        add_atomically[(2,)](torch.ones(8), torch.zeros(1), SIZE=8)


def test_values_behind_a_mask_are_undefined() -> None:
    target = torch.zeros(8)
    undefined[(1,)](torch.ones(8), target, SIZE=8)
    assert target[:3].tolist() == [1.0] * 3
    assert target[3:].isnan().all()


def test_triton_runs_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests of this process are about Triton, and not about the reference."""
    x = torch.ones(2, 4)
    with registry.chosen("triton", "cpu") as running:
        assert set(running.values()) == {"triton"}
        module = registry.triton_module("swiglu", x.device)
        assert module is not None
        monkeypatch.setattr(module, "forward", lambda gate, up: gate + 41)
        assert swiglu(x, x).tolist() == [[42.0] * 4] * 2
    with registry.chosen("auto", "cpu") as running:
        assert "triton" not in running.values()
        assert swiglu(x, x)[0, 0] < 1
