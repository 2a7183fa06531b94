"""What is compiled of the Triton kernels: arguments, tiles and traffic at a 7B model's shapes.

Every Triton module lists its kernels in COMPILATIONS, exactly as it launches them at these shapes,
so that they can be compiled ahead of time, without a GPU, for any architecture.
"""

import importlib
from dataclasses import dataclass

TOKENS = 8192
WIDTH = 4096
HEADS = 32
HEAD_DIM = 128
CHANNELS = 11008
VOCABULARY = 32000
"""One micro-batch of 2 x 4096 tokens in LLaMA 2 7B (arXiv 2307.09288)."""

ENABLE_FP_FUSION = True
"""Option of every launch: multiplications and additions become fused multiply-adds. Triton's
default differs between versions."""

MODULES = (
    "trainer.kernels.attention_triton",
    "trainer.kernels.attention_backward_triton",
    "trainer.kernels.cross_entropy_triton",
    "trainer.kernels.gather_scale_triton",
    "trainer.kernels.rms_norm_triton",
    "trainer.kernels.rope_triton",
    "trainer.kernels.swiglu_triton",
)
"""The Triton modules, each with a tuple COMPILATIONS."""


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


@dataclass(frozen=True, slots=True)
class Compilation:
    """One kernel with everything its compiler is told."""

    name: str
    """Operator and pass, as "rms_norm.forward"; one on each architecture."""
    module: str
    """Dotted path of the module that defines the kernel."""
    function: str
    """Name of the @triton.jit function."""
    signature: dict[str, str]
    """Argument name to Triton type, as "*bf16" or "i32". Pointers are divisible by 16 bytes."""
    aligned: tuple[str, ...]
    """Integer arguments that are divisible by 16."""
    constants: dict[str, int | float | bool]
    """Compile-time values: of the tl.constexpr parameters, and of integers that are 1."""
    num_warps: int
    num_stages: int
    bytes_moved: int
    """Bytes that are read and written in device memory, partial sums both ways; what every program
    reads again (masks, gains, tables) counts once, and so does what is read again while the L2
    cache holds it: by other programs in attention, else where the shape says so."""
    minimum_bytes: int
    """Bytes of the operator's inputs and outputs, each counted once: without partial sums."""
    shape: str
    """The tensors, in words."""
    architectures: tuple[int, ...] = ()
    """Those it is launched on like this, 90 for sm_90; none: all."""
    flops: int = 0
    """Floating-point operations of its matrix products, of visible pairs in attention."""

    def runs_on(self, architecture: int) -> bool:
        """Whether it is launched like this on an architecture."""
        return architecture in (self.architectures or (architecture,))


def compilations() -> tuple[Compilation, ...]:
    """All kernels of all Triton modules. Imports Triton, but needs no GPU."""
    return tuple(
        compilation
        for module in MODULES
        for compilation in importlib.import_module(module).COMPILATIONS
    )
