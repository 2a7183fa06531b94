"""Triton's interpreter, made faithful where it is silently wrong and strict where a GPU would be.

As it comes, the interpreter (Triton 3.6 to 3.9) truncates fp32 to bf16 instead of rounding,
computes on the bits of bf16 operands, and runs programs in order, so that it does not see races.
`install` changes that for the process. Needs TRITON_INTERPRET=1 before Triton is first imported.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


class KernelError(Exception):
    """What a kernel must not do; the interpreter wraps it into an error of its own."""


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bf16 numbers that are stored as uint16."""
    values = torch.from_numpy(np.array(bits, copy=True).view(np.int16)).view(torch.bfloat16)
    return values.float().numpy().reshape(bits.shape)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """uint16 bits of the nearest bf16 numbers, ties to even."""
    rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


class Memory:
    """The tensors of one launch: what may be accessed, and which program wrote what."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        extents = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + _bytes(tensor))
            for tensor in tensors
            if tensor.numel()
        )
        merged: list[tuple[int, int]] = []
        for start, end in extents:
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self.starts = np.array([start for start, _ in merged], dtype=np.uint64)
        self.ends = np.array([end for _, end in merged], dtype=np.uint64)
        self.writers = [np.full(end - start, -1, dtype=np.int64) for start, end in merged]

    def access(self, pointers: np.ndarray, mask: np.ndarray, program: int, write: bool) -> None:
        """Refuses addresses outside the tensors, and those another program has written."""
        shape = np.broadcast_shapes(np.shape(pointers), np.shape(mask))
        addresses = np.broadcast_to(pointers, shape)[np.broadcast_to(mask, shape)]
        found = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        outside = (found < 0) | (addresses >= self.ends[np.maximum(found, 0)])
        if outside.any():
            raise KernelError(f"{outside.sum()} of {addresses.size} addresses are out of bounds")
        for index in np.unique(found):
            places = (addresses[found == index] - self.starts[index]).astype(np.int64)
            writers = self.writers[index]
            others = (writers[places] != -1) & (writers[places] != program)
            if others.any():
                raise KernelError(f"{others.sum()} values were written by another program")
            if write:
                if np.unique(places).size != places.size:
                    raise KernelError("one store writes an address twice")
                writers[places] = program


def _bytes(tensor: torch.Tensor) -> int:
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class StrictBuilder(interpreter.InterpreterBuilder):
    """bf16 as on a GPU; bounds, races and undefined values are errors; order is random."""

    memory = Memory(())
    order: tuple[int, ...] = ()
    generator = random.Random(0)

    def cast_impl(self, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return super().cast_impl(source, target)
        data = widen_bf16(source.data) if before == tl.bfloat16 else source.data
        if after == tl.bfloat16:
            return interpreter.TensorHandle(round_to_bf16(data), after)
        return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(after)), after)

    def create_fp_to_fp(self, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return self.cast_impl(source, target)
        return super().create_fp_to_fp(source, target, rounding)

    def binary_op(self, left: Any, right: Any, operation: Any) -> Any:
        if operation not in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            self._refuse_bf16(operation, left, right)
        return super().binary_op(left, right, operation)

    def unary_op(self, argument: Any, operation: Any) -> Any:
        self._refuse_bf16(operation, argument)
        return super().unary_op(argument, operation)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        self._refuse_bf16(np.multiply, x, y, z)
        return super().create_fma(x, y, z)

    def create_dot(self, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widen_bf16(x.data), tl.float32) for x in (a, b))
        return super().create_dot(a, b, *rest)

    def create_masked_load(self, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        self.memory.access(pointers.data, mask.data, self._program(), write=False)
        if other is None:
            # A GPU leaves in such a register whatever it held before.
            element = pointers.get_element_ty()
            undefined = np.full(pointers.data.shape, 255, np.uint8).repeat(
                max(1, element.primitive_bitwidth // 8)
            )
            undefined = undefined.view(interpreter._get_np_dtype(element))
            other = interpreter.TensorHandle(undefined.reshape(pointers.data.shape), element)
        return super().create_masked_load(pointers, mask, other, *rest)

    def create_masked_store(self, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self.memory.access(pointers.data, mask.data, self._program(), write=True)
        return super().create_masked_store(pointers, value, mask, *rest)

    def create_atomic_rmw(self, operation: Any, pointers: Any, value: Any, *rest: Any) -> Any:
        if value.dtype.scalar.is_floating():
            raise KernelError("atomics on floating point add up in an order that varies")
        return super().create_atomic_rmw(operation, pointers, value, *rest)

    def set_grid_dim(self, *size: int) -> None:
        super().set_grid_dim(*size)
        count = size[0] * size[1] * size[2]
        self.order = tuple(self.generator.sample(range(count), count))

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        _, height, depth = self.grid_dim
        chosen = self.order[(x * height + y) * depth + z]
        super().set_grid_idx(chosen // (height * depth), chosen // depth % height, chosen % depth)

    def _program(self) -> int:
        x, y, z = self.grid_idx
        _, height, depth = self.grid_dim
        return int((x * height + y) * depth + z)

    def _refuse_bf16(self, operation: Any, *operands: Any) -> None:
        if any(operand.dtype.scalar == tl.bfloat16 for operand in operands):
            raise KernelError(f"{operation.__name__} on bf16: convert to fp32 before")


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        value = getattr(value, "base", value)
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif hasattr(value, "data_ptr"):
            yield value


def install() -> None:
    """Makes every following launch of this process strict."""
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before Triton's import"
    builder = interpreter.interpreter_builder
    if isinstance(builder, StrictBuilder):
        return
    builder.__class__ = StrictBuilder
    copy_to_host: Callable[..., Any] = interpreter.GridExecutor._init_args_hst

    def watched(self: Any, arguments: Any, named: Any) -> Any:
        on_host, named_on_host = copy_to_host(self, arguments, named)
        builder.memory = Memory(_tensors([*on_host, *named_on_host.values()]))
        return on_host, named_on_host

    interpreter.GridExecutor._init_args_hst = watched
