"""The matrix kernels without anything optional, for the contracts: most launches are like this."""

from launch.bench_kernels.static.kernels import Launches, attentions


def launches() -> Launches:
    return attentions(optional=False)
