"""Takes every operator through Triton's own compiler and launcher, without a GPU; run by
test_compilation.py in a process of its own. Tensors are on the CPU."""

import math
import sys

import torch
import triton
from torch import Tensor

from tests.trainer.kernels.checking_driver import ARCHITECTURE, LAUNCHES, Driver
from trainer.kernels import attention_tiles, registry
from trainer.kernels import linear_cross_entropy as loss
from trainer.kernels.attention import attention
from trainer.kernels.gather_scale import gather_scale
from trainer.kernels.rms_norm import rms_norm
from trainer.kernels.rope import rope
from trainer.kernels.swiglu import swiglu


def results(name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What an operator returns for random arguments of these sizes."""

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    if name == "attention":
        batch, length, heads, key_heads, width = sizes
        several = [draw(batch, length, n, width) for n in (heads, key_heads, key_heads)]
        mask, documents = draw(heads, dtype=torch.float32), torch.arange(length).expand(batch, -1)
        masked = attention(*several, head_mask=mask, documents=documents // 10)
        return masked, attention(*several, window=4)
    if name == "rope":
        query, key = (draw(1, sizes[0], heads, sizes[2]) for heads in (sizes[1], 1))
        return rope(query, key, *(draw(sizes[0], sizes[2] // 4).detach() for _ in "cs"))
    rows, width = sizes
    if name == "gather_scale":
        kept, columns = (torch.randperm(size)[: size // 2] for size in sizes)
        scales = [draw(size, dtype=torch.float32) for size in sizes]
        return (gather_scale(draw(*sizes), kept, scales[0], columns.sort()[0], scales[1]),)
    if name == "cross_entropy":
        inputs = draw(rows, 64), draw(width, 64), torch.randint(width, (rows,)), torch.rand(rows)
        teacher_output = loss.TeacherOutput(inputs[0].detach(), inputs[1].detach(), 0.4, 1.5)
        plain, distilled = loss.linear_cross_entropy, loss.linear_distillation
        return plain(*inputs)[0], distilled(*inputs, teacher_output)[0]
    if name == "swiglu":
        return (swiglu(draw(*sizes), draw(*sizes)),)
    x, gain, residual = draw(*sizes), draw(width), draw(*sizes)
    return rms_norm(x, gain, 1e-5)[0], *rms_norm(x, gain, 1e-5, residual=residual)


SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "attention": ((2, 9, 4, 2, 16), (2, 515, 8, 2, 80), (1, 1024, 32, 8, 128)),
    "cross_entropy": ((5, 17), (64, 32000), (16, 49152)),
    "gather_scale": ((17, 33), (2048, 5504)),
    "rms_norm": ((7, 33), (257, 5120)),
    "rope": ((3, 5, 24), (257, 32, 128)),
    "swiglu": ((7, 33), (257, 11008)),
}


def main(largest: float) -> None:
    """Prints the kernels that were launched, and how often, at sizes of that product at most."""
    triton.runtime.driver.set_active(Driver())
    registry._has_triton = lambda kind: True
    attention_tiles.architecture = lambda device: ARCHITECTURE
    registry.choose("triton", torch.device("cpu"))
    for name, every in SIZES.items():
        for sizes in (sizes for sizes in every if math.prod(sizes) <= largest):
            for dtype in (torch.float32, torch.bfloat16):
                found = results(name, sizes, dtype)
                torch.autograd.backward(found, [torch.ones_like(x) for x in found])
    for kernel, count in LAUNCHES.items():
        print(kernel, count)


if __name__ == "__main__":
    main(float(sys.argv[1]))
