"""What operators check about their arguments, and how they say what is wrong."""

from typing import NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def wide_dtype(x: Tensor) -> torch.dtype:
    """What an operator on x computes in, and the dtype of its masks: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def refuse(operator: str, argument: str, expected: str, found: object) -> NoReturn:
    """Raises the ValueError of a wrong argument; a tensor is described by shape and dtype."""
    if isinstance(found, Tensor):
        found = f"{list(found.shape)} {found.dtype} on {found.device}"
    raise ValueError(f"{operator}: {argument} must be {expected}, got {found}")


def check_rows(operator: str, argument: str, x: Tensor, dimensions: int | None = None) -> None:
    """x must be floating point and contiguous in its last dimension, with `dimensions` dimensions
    (None: at least 1)."""
    if x.dtype not in FLOATING:
        refuse(operator, argument, "fp64, fp32, bf16 or fp16", x)
    if x.dim() < 1 or (dimensions is not None and x.dim() != dimensions):
        expected = "at least 1 dimension" if dimensions is None else f"{dimensions} dimensions"
        refuse(operator, argument, f"a tensor of {expected}", x)
    check_last_stride(operator, argument, x)


def check_last_stride(operator: str, argument: str, x: Tensor) -> None:
    """x must be contiguous in its last dimension, so that a GPU can read several values at once."""
    if x.shape[-1] > 1 and x.numel() and x.stride(-1) != 1:
        refuse(operator, argument, "contiguous in its last dimension", f"strides {x.stride()}")


def check_like(
    operator: str,
    argument: str,
    x: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """x, where there is one, must have this shape, one of these dtypes, and be on this device."""
    if x is None:
        return
    if tuple(x.shape) != tuple(shape) or x.dtype not in dtypes or x.device != device:
        wanted = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        refuse(operator, argument, f"{list(shape)} {wanted} on {device}", x)
