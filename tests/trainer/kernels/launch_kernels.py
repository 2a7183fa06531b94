"""Takes every operator through Triton's own compiler and launcher, without a GPU; run by
test_compilation.py in a process of its own. Tensors are on the CPU.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from tests.trainer.kernels.checking_driver import ARCHITECTURE, LAUNCHES, Driver
from trainer.kernels import attention_tiles, registry
from trainer.kernels.attention import attention
from trainer.kernels.gather_scale import gather_scale
from trainer.kernels.linear_cross_entropy import (
    TeacherOutput,
    linear_cross_entropy,
    linear_distillation,
)
from trainer.kernels.rms_norm import rms_norm
from trainer.kernels.rope import rope
from trainer.kernels.swiglu import swiglu

Draw = Callable[..., Tensor]


def run_attention(draw: Draw, batch: int, length: int, heads: int, keys: int, width: int) -> Any:
    query, key, value = (draw(batch, length, n, width) for n in (heads, keys, keys))
    documents = (torch.rand(batch, length) < 0.1).cumsum(1)
    mask = torch.rand(heads, requires_grad=True)
    masked = attention(query, key, value, head_mask=mask, documents=documents)
    return masked, attention(query, key, value, window=1 + length // 3)


def run_gather_scale(draw: Draw, out: int, width: int) -> Any:
    rows, columns = torch.randperm(out)[: out // 2], torch.randperm(width)[: width // 2].sort()[0]
    scales = (torch.rand(size, requires_grad=True) for size in (out, width))
    return gather_scale(draw(out, width), rows, next(scales), columns, next(scales))


def run_cross_entropy(draw: Draw, tokens: int, width: int, vocabulary: int) -> Any:
    hidden, head, states = draw(tokens, width), draw(vocabulary, width), draw(tokens, width)
    arguments = hidden, head, torch.randint(vocabulary, (tokens,)), torch.rand(tokens)
    teacher_output = TeacherOutput(states.detach(), head.detach(), 0.4, 1.5)
    return linear_cross_entropy(*arguments)[0], linear_distillation(*arguments, teacher_output)[0]


def run_rms_norm(draw: Draw, rows: int, width: int) -> Any:
    x, residual, gain = draw(rows, width), draw(rows, width), draw(width)
    plain, _ = rms_norm(x, gain, 1e-5)
    return plain, *rms_norm(x, gain, 1e-5, residual=residual, scale=torch.tensor(1.7))


def run_rope(draw: Draw, batch: int, length: int, heads: int, keys: int, width: int) -> Any:
    tables = (draw(length, width // 4).detach() for _ in range(2))
    return rope(*(draw(batch, length, n, width) for n in (heads, keys)), *tables)


def run_swiglu(draw: Draw, rows: int, width: int) -> Any:
    return swiglu(draw(rows, width), draw(rows, width))


SIZES: dict[Callable[..., Any], tuple[tuple[int, ...], ...]] = {
    run_attention: ((2, 9, 4, 2, 16), (2, 515, 8, 2, 80), (1, 1024, 32, 8, 128)),
    run_gather_scale: ((17, 33), (2048, 5504)),
    run_cross_entropy: ((5, 8, 17), (64, 256, 32000), (16, 256, 49152)),
    run_rms_norm: ((7, 33), (257, 5120)),
    run_rope: ((1, 3, 5, 2, 24), (2, 257, 32, 8, 128)),
    run_swiglu: ((7, 33), (257, 11008)),
}


def main(largest: float) -> None:
    """Prints the kernels that were launched, and how often, at sizes of that product at most."""
    triton.runtime.driver.set_active(Driver())
    registry._has_triton = lambda kind: True
    attention_tiles.architecture = lambda device: ARCHITECTURE
    registry.choose("triton", torch.device("cpu"))
    for run, every_size in SIZES.items():
        for size in (size for size in every_size if math.prod(size) <= largest):
            for dtype in (torch.float32, torch.bfloat16):

                def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                    return torch.randn(shape).to(dtype).requires_grad_()

                found = run(draw, *size)
                results = [found] if isinstance(found, Tensor) else found
                torch.autograd.backward(results, [torch.ones_like(x) for x in results])
    for kernel, count in LAUNCHES.items():
        print(kernel, count)


if __name__ == "__main__":
    main(float(sys.argv[1]))
