"""Attention of the widest heads, the few of head_kernels.py that are compiled with every change."""

from tests.launch.bench_kernels.static.head_kernels import of_heads
from trainer.kernels.compilation import Compilation


def compilations() -> tuple[Compilation, ...]:
    records = of_heads((256,), ("bf16",))
    return tuple(record for record in records if record.name.split()[0] != "attention.backward_key")
