"""The matrix kernels without anything optional, for the contracts: most launches are like this."""

from dataclasses import replace

from trainer.kernels import compilation
from trainer.kernels.compilation import Compilation


def compilations() -> tuple[Compilation, ...]:
    return tuple(
        replace(
            record,
            constants={
                name: False if name.startswith("HAS_") else value
                for name, value in record.constants.items()
            },
        )
        for record in compilation.compilations()
        if record.flops
    )
