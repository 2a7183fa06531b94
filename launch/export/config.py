"""Options of launch.export."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from data.errors import InputError, require_threads
from data.options import ON_DISK, Positional

Format = Literal["gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q5_0", "gguf-q4_0"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write models for other programs: GGUF files for llama.cpp and what is built on it."""

    ESSENTIAL: ClassVar = "model to output name check json"

    model: Annotated[str, Positional("MODEL"), ON_DISK] = "runs/cpt"
    """Model folder, a run's output folder, a .gguf file or a hub id."""
    to: tuple[Format, ...] = ("gguf-f16",)
    """What is written; several at once. f32, f16, bf16: weights as they are, or rounded; q8_0,
    q5_0, q4_0: matrices in blocks of 32 weights of as many bits, with a scale each; embedding and
    head are q8_0 at least."""
    output: Annotated[str, ON_DISK] = "runs/export"
    """Folder of the files."""
    name: str | None = None
    """What they are called, before the type. Default: the name of the model's or run's folder."""
    check: Literal["tensors", "logits"] = "logits"
    """tensors: every tensor is read back and compared; logits: what is written is also loaded by
    plain transformers and, where the package xllamacpp is installed, by llama.cpp, which must give
    the same tokens and predictions."""
    threads: int | None = None
    """CPU threads. Default: all cores."""
    json: Annotated[str | None, ON_DISK] = None
    """File for what was written and compared, as JSON."""

    def __post_init__(self) -> None:
        if not self.to:
            raise InputError("--to names no format; use for example --to gguf-f16 gguf-q8_0")
        if len(set(self.to)) < len(self.to):
            raise InputError(f"--to {' '.join(self.to)}: name each format once")
        if self.name is not None and (not self.name or "/" in self.name or self.name[0] == "."):
            raise InputError(f"--name {self.name!r}: is not the name of a file; leave out paths")
        require_threads(self.threads)
