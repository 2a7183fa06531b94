"""FlashAttention, whichever version is installed, behind the arguments of our attention.

arXiv 2205.14135, 2307.08691 and 2407.08608. None of them has a mask per head, and none takes
documents without reading their number back from the GPU: `attention` applies the mask afterwards,
and leaves documents to other implementations.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class Library(NamedTuple):
    """One version, and what it computes forward and backward."""

    module: str
    largest: tuple[tuple[int, int], ...]
    """Major compute capability of a GPU and the largest head width there."""
    unlimited: int | None
    """The window size that means no window."""
    yields: tuple[int, ...] = ()
    """Major compute capabilities where PyTorch's own attention is preferred."""


LIBRARIES = (
    # Its deterministic backward pass takes heads of at most 192 channels.
    Library("flash_attn_interface", ((9, 192),), -1),
    Library("flash_attn.cute", ((9, 256), (10, 128)), None),
    # PyTorch's own attention is at least this one (docs/decisions/0011).
    Library("flash_attn", ((8, 256), (9, 256), (10, 256), (12, 256)), -1, yields=(9, 10)),
)
"""FlashAttention-3, 4 and 2, in the order in which they are taken."""

_problems: dict[str, str] = {}


def backend(device: torch.device | None = None) -> Literal["flash", "sdpa"]:
    """What computes attention on a GPU: "flash" with any of the packages, else PyTorch's own.

    With a device, a package counts only if it can be imported and is preferred there; without one
    nothing is imported and no GPU is asked. What no package computes (fp32, documents, heads that
    are too wide, traced calls) is left to PyTorch's own even then.
    """
    if device is None:
        names = {library.module.split(".")[0] for library in LIBRARIES}
        return "flash" if any(importlib.util.find_spec(name) for name in names) else "sdpa"
    capability = torch.cuda.get_device_capability(device)[0]
    fitting = [library for library in LIBRARIES if capability in dict(library.largest)]
    preferred = [library for library in fitting if capability not in library.yields]
    return "flash" if any(_function(library) for library in preferred) else "sdpa"


def find(query: Tensor, *, preferred: bool = True) -> Library | None:
    """The version that computes these queries, and is preferred to PyTorch's own attention unless
    that does not matter; None: none does, or torch.compile traces the call, which it cannot do
    through all of them."""
    if torch.compiler.is_compiling() or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    if query.shape[-1] % 8 or not query.numel():
        return None
    return _choose(torch.cuda.get_device_capability(query.device)[0], query.shape[-1], preferred)


@functools.cache
def _choose(capability: int, head_dim: int, preferred: bool) -> Library | None:
    for library in LIBRARIES:
        if preferred and capability in library.yields:
            continue
        if head_dim <= dict(library.largest).get(capability, 0) and _function(library):
            return library
    return None


@functools.cache
def _function(library: Library) -> Callable[..., Any] | None:
    """Its flash_attn_func; None where it is not installed, or built for another PyTorch."""
    try:
        module = importlib.import_module(library.module)
    # Packages for other hardware or versions fail at import in many ways.
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError) or not _is_part(error.name, library.module):
            _problems[library.module] = f"{type(error).__name__}: {error}"
        return None
    function: Callable[..., Any] | None = getattr(module, "flash_attn_func", None)
    return function


def _is_part(name: str | None, module: str) -> bool:
    """Whether a module that was not found is the package asked for, and not one that it needs."""
    return name is not None and f"{module}.".startswith(f"{name}.")


def problems() -> dict[str, str]:
    """Packages that are installed and could not be imported when they were asked for, and why."""
    return dict(_problems)


def attend(
    library: Library, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float
) -> Tensor:
    """Causal attention without a mask: [B, S, H, D] from query [B, S, H, D] and keys [B, S, G, D].

    The backward pass is deterministic where PyTorch is asked for that, as in its own attention.
    """
    function = _function(library)
    assert function is not None, library
    limited = window is not None and window < query.shape[1]
    result = function(
        query,
        key,
        value,
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1 if limited and window else library.unlimited, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # Some versions return the logsumexp as well.
    context: Tensor = result[0] if isinstance(result, tuple) else result
    return context
