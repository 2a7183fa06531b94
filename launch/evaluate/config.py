"""Options of launch.evaluate."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from data.errors import InputError, require_at_least, require_threads
from data.options import ON_DISK
from data.reader import Documents
from trainer.config import Kernels, Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Measure models on held-out tokens, on a text file, on tasks, or on all of them."""

    ESSENTIAL: ClassVar = (
        "model checkpoints data text tasks task-files sequences seq-len window batch speed json"
    )

    model: Annotated[tuple[str, ...], ON_DISK] = ()
    """Model folder, a run's output folder, a .gguf file or a hub id. Several are compared: name
    them in the order of their making, such as source, sheared and trained. Default: runs/cpt, and
    none beside --checkpoints."""
    checkpoints: Annotated[str | None, ON_DISK] = None
    """Output folder of a run of `shorn cpt` or `shorn finetune --method full`, all of whose saved
    steps are measured as well: its learning curve."""
    data: Annotated[str | None, ON_DISK] = None
    """Folder made by `shorn tokenize`."""
    split: Literal["held_out", "train"] = "held_out"
    """Part of the token folder to measure on."""
    sequences: int = 64
    """Sequences per domain, the first ones of its split; fewer where a domain holds fewer."""
    seq_len: int = 4096
    """Tokens per sequence."""
    documents: Documents | None = None
    """Whether documents of --data see each other, as in training. Default: apart for conversations,
    joined for text."""
    text: Annotated[tuple[str, ...], ON_DISK] = ()
    """UTF-8 text files, each scored as one document; or sets of publications, fetched from the hub:
    wikitext2 (test), ptb (validation), c4 (validation)."""
    window: int = 2048
    """Positions the model sees at once in --text, a BOS token included."""
    stride: int | None = None
    """Tokens between window starts in --text. Default: windows do not overlap."""
    bos: Literal["auto", "no", "yes", "every"] = "auto"
    """BOS in --text. yes: before the document; every: before each window; auto: the tokenizer's."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval, such as piqa or mmlu, or all of a paper with its shots and metrics:
    sheared-llama, shortened-llm."""
    task_files: Annotated[str | None, ON_DISK] = None
    """Folder of further task files for lm-eval (its --include_path)."""
    shots: int | None = None
    """Solved examples in front of each question of --tasks. Default: as many as the task says."""
    limit: int | None = None
    """Questions of each of --tasks, the first ones. Default: all."""
    task_results: Annotated[str | None, ON_DISK] = None
    """Folder in which every finished task is kept, by weights and settings, so that it is not
    measured again. Default: beside --json."""
    batch: int = 8
    """Sequences, windows or answers per rank in one forward pass."""
    speed: bool = False
    """Time greedy decoding at batch 1 too, with weights drawn at random, models taking turns."""
    precision: Precision = "auto"
    """Compute precision. auto: bf16 on a GPU, fp32 on a CPU."""
    kernels: Kernels = "auto"
    """What computes the operators, as in training."""
    threads: int | None = None
    """CPU threads per rank. Default: cores of the machine divided by its ranks."""
    json: Annotated[str | None, ON_DISK] = None
    """File for the same results as JSON; for several models a list of them, under "models"."""

    def __post_init__(self) -> None:
        if self.data is None and not (self.text or self.tasks or self.speed):
            raise InputError(
                "nothing to measure: give --data TOKENS, --text FILE, --tasks NAME, --speed, or "
                "some of them"
            )
        if self.checkpoints is not None and self.speed:
            raise InputError(
                f"--speed beside --checkpoints {self.checkpoints}: all of a run's steps have one "
                "shape and take equally long; time its model in a call of its own"
            )
        if len(set(self.text)) < len(self.text):
            raise InputError(f"--text {' '.join(self.text)}: give each text once")
        require_at_least(self, 1, "sequences", "batch", "stride", "limit")
        require_at_least(self, 0, "shots")
        require_threads(self.threads)
        require_at_least(self, 2, "seq_len", "window", why=" (a token and its successor)")

    @property
    def models(self) -> tuple[str, ...]:
        """Models that are named, or meant."""
        return self.model or (() if self.checkpoints is not None else ("runs/cpt",))

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        found: dict[str, str] = {}
        if not self.text:
            found |= dict.fromkeys(("window", "stride", "bos"), "there is no --text to score")
        if self.data is None:
            names = ("split", "sequences", "seq_len", "documents")
            found |= dict.fromkeys(names, "there is no --data to measure on")
        if not self.tasks:
            of_tasks = ("task_files", "shots", "limit", "task_results")
            found |= dict.fromkeys(of_tasks, "there are no --tasks to measure on")
        if self.data is None and not (self.text or self.tasks):
            found |= dict.fromkeys(("batch", "kernels"), "--speed alone times plain transformers")
        return found
