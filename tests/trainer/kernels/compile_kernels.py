"""Launches every Triton kernel through its own compiler, without a GPU; run by test_compilation.py.

The interpreter accepts what the compiler rejects. The shapes of the static report are compiled by
its tests; these are others: not aligned, in other dtypes, without what is optional.
"""

import sys

from triton.runtime import driver

from launch.bench_kernels.static.kernels import (
    Launch,
    Launches,
    attention,
    attentions,
    cross_entropy,
    gather_scale,
    rms_norm,
    rope,
    swiglu,
)
from tests.trainer.kernels.checking_driver import LAUNCHES, CheckingDriver
from trainer.kernels import attention_tiles


def operators(dtype: str, odd: bool) -> Launches:
    """Every kernel, at a 7B model's shapes or at ones that nothing divides."""
    if not odd:
        losses = (*cross_entropy(dtype=dtype), *cross_entropy(teacher=True, dtype=dtype))
        others = (*rms_norm(dtype=dtype), *rope(dtype=dtype), *swiglu(dtype=dtype))
        return (*attentions(dtype=dtype), *losses, *gather_scale(dtype=dtype), *others)
    return (
        *attention(key_heads=8, head_dim=77, dtype=dtype, optional=False),
        *cross_entropy(1001, dtype=dtype),
        *cross_entropy(50257, dtype=dtype),
        *cross_entropy(1001, teacher=True, dtype=dtype),
        *gather_scale(1001, 777, columns=True, dtype=dtype),
        *rms_norm(1001, dtype=dtype, optional=False),
        *rope(77, rotary_dim=20, dtype=dtype),
        *swiglu(1001, dtype=dtype),
    )


def main(arch: int, every: bool) -> None:
    """Prints the kernels that were launched, and how often."""
    driver.set_active(CheckingDriver(arch))
    attention_tiles.architecture = lambda device: arch
    launches: list[Launch] = [*operators("fp16", odd=True), *gather_scale(dtype="fp64")]
    # What shared passes ask for: bf16 weights, whose gradients were summed in fp32.
    launches += gather_scale(columns=True, summed=True)
    if every:
        launches += [*operators("fp32", odd=True), *operators("bf16", odd=True)]
        launches += [*operators("fp32", odd=False), *operators("fp16", odd=False)]
        launches += attention(head_dim=256)
    for launch in launches:
        launch.call()
    for kernel, count in LAUNCHES.items():
        print(kernel, count)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "every")
