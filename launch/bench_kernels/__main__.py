"""Kernels on a GPU: timed; without one: compiled and read, or timed on the CPU."""

from data import cli
from launch.bench_kernels.config import BenchKernelsConfig

EXAMPLES = """
python -m launch.bench_kernels --json gpu.json --csv gpu.csv
python -m launch.bench_kernels --static --json kernels.json
python -m launch.bench_kernels --static --archs 90
python -m launch.bench_kernels --cpu --json kernels-cpu.json
"""


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(BenchKernelsConfig, section="bench_kernels", argv=argv, examples=EXAMPLES)
    if config.static:
        from launch.bench_kernels.static.report import run
    elif config.cpu:
        from launch.bench_kernels.cpu import run
    else:
        from launch.bench_kernels.gpu.run import run
    run(config)


if __name__ == "__main__":
    cli.run(main, alone=True)
