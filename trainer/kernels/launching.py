"""What launches of Triton kernels share, without Triton: options, and tensors as rows."""

from dataclasses import dataclass

from torch import Tensor

ENABLE_FP_FUSION = True
"""Option of every launch: multiplications and additions become fused multiply-adds. Triton's
default differs between versions."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program of attention computes at a time, and how."""

    rows: int
    """Queries."""
    columns: int
    """Keys."""
    num_warps: int
    num_stages: int
    together: bool = True
    """Whether one walk over the queries finds the gradients of keys and those of values: two hold
    half as many numbers at a time, and compute the scores twice."""

    def options(self) -> dict[str, int | bool]:
        """Those of a launch."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": ENABLE_FP_FUSION,
        }


def as_rows(x: Tensor) -> Tensor:
    """x [..., d] as [rows, d] with contiguous rows; a copy only where it has to be."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
