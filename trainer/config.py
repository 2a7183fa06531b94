"""Options of training runs."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from data.errors import InputError, require, require_at_least, require_finite, require_threads
from data.mixture import MixtureConfig
from data.options import ON_DISK, Name
from data.reader import Documents

Precision = Literal["auto", "bf16", "fp32"]
Kernels = Literal["auto", "reference", "triton", "cuda"]
Optimizer = Literal["adamw", "muon"]

DISTILL_WEIGHT = 0.9
"""Weight of the divergence from a teacher when none is named."""
DISTILLED = {"temperature": 1.0, "top_k": 0}
"""What options of DistillationConfig are where nothing is said of them, with a teacher or not."""
MIN_LR_RATIO = 0.1
"""Default of TrainConfig.min_lr_ratio where nothing else is said."""
WARMUP_RATIO = 0.03
"""Default of TrainConfig.warmup_ratio where nothing else is said."""
MUON_MOMENTUM = 0.95
"""Default of TrainConfig.muon_momentum."""
HOTTEST = 1000.0
"""Highest temperature of distillation, and the inverse of the lowest: beyond, rounding is left."""
SMALLEST_EPS = 1e-30
"""Of a lower AdamW epsilon nothing is left in single precision."""
MOST_STEPS = 10**12
"""More steps than a run could make."""
MOST_SEQUENCES = 2**24
"""Largest global batch: of more, a step would draw for hours, or end for want of memory."""


ALL_CHECKPOINTS = 10**9
"""More than any run has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Options shared by every command that trains."""

    steps: int = 24000
    """Optimizer steps of the whole run; the learning-rate schedule spans exactly these. In
    shearing, 0 prunes at once, by the initial scores; in fine-tuning it leaves the number to
    --epochs."""

    seq_len: int = 4096
    """Tokens per sequence."""

    global_batch: int = 512
    """Sequences per optimizer step, over all ranks and micro-batches."""

    micro_batch: int = 2
    """Sequences per rank in one forward pass."""

    lr: float = 1e-4
    """Peak learning rate."""

    min_lr_ratio: float | None = MIN_LR_RATIO
    """Learning rate at the last step, as a fraction of the peak. Default: 0.1; in shearing by the
    projection rule 1, because training goes on after it; in fine-tuning 0."""

    warmup_ratio: float | None = WARMUP_RATIO
    """Fraction of the steps over which the learning rate rises linearly. Default: 0.03; in shearing
    0.1; in training that goes on with shearing's moments 0; in fine-tuning 0.06."""

    optimizer: Optimizer = "adamw"
    """muon: the matrices in blocks move along their orthogonalised momentum, by as much as AdamW
    would move them at the same --lr; embedding, head, norms and biases stay with AdamW."""

    muon_momentum: float | None = None
    """Decay of Muon's momentum. Default: 0.95."""

    weight_decay: float = 0.1
    """Weight decay of matrices (never of norms and biases)."""

    beta1: float = 0.9
    """AdamW decay of the first moment."""

    beta2: float = 0.95
    """AdamW decay of the second moment."""

    eps: float = 1e-8
    """AdamW epsilon."""

    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    seed: int = 0
    """Seed of the data order and of every random number."""

    precision: Precision = "auto"
    """Compute precision (parameters, gradient sums and moments stay fp32). auto: bf16 on a GPU,
    fp32 on a CPU."""

    kernels: Kernels = "auto"
    """What computes the operators. auto: on a GPU compiled CUDA code, FlashAttention or PyTorch's
    attention, and Triton, as far as usable; on a CPU compiled C++ code and PyTorch. reference:
    PyTorch; triton: Triton throughout; cuda: as auto, refused without compiled CUDA code."""

    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a quarter more compute."""

    replicas: int = 1
    """Copies of the sharded model (HSDP). 1 shards over all ranks; one per node keeps gathers
    inside a node."""

    reshard_after_forward: bool = False
    """Drop gathered weights after each forward pass: saves 2 bytes per parameter, gathers them
    twice."""

    save_interval: int = 500
    """Steps between checkpoints; 0 saves at the end and on a stop signal only."""

    keep_checkpoints: int = 2
    """Number of newest checkpoints kept while the run is unfinished."""

    keep_last_checkpoint: bool = False
    """Keep the last checkpoint of a finished run: its weights and moments in fp32. Without it
    a finished run's checkpoints are removed once model and report are written."""

    keep_all_checkpoints: bool = False
    """Keep every checkpoint, also of a finished run. `shorn evaluate --checkpoints` measures those
    of runs that train all weights: their learning curve."""

    eval_interval: int = 0
    """Steps between held-out evaluations; 0 evaluates at the end only."""

    eval_sequences: int = 32
    """Held-out sequences per domain in an evaluation; 0 turns evaluation off."""

    log_interval: int = 1
    """Steps between lines in metrics.jsonl."""

    threads: int | None = None
    """CPU threads per rank. Default: cores of the machine divided by its ranks."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, 1, "global_batch", "micro_batch", "replicas", "keep_checkpoints")
        require_at_least(self, 1, "log_interval")
        require_threads(self.threads)
        most, batch = MOST_SEQUENCES, self.global_batch
        require(batch <= most, "global_batch", batch, f"at most {most:,} sequences")
        require_at_least(self, 2, "seq_len", why=" (a token and its successor)")
        require_at_least(self, 0, "steps", "save_interval", "eval_interval", "eval_sequences")
        require_at_least(self, 0, "weight_decay", "clip")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        momentum = self.muon_momentum
        require(momentum is None or 0 <= momentum < 1, "muon_momentum", momentum, "in [0, 1)")
        if momentum is not None and self.optimizer != "muon":
            raise InputError(
                f"--muon-momentum {momentum:g}: only --optimizer muon has a momentum; add that, or "
                f"leave it out (--optimizer {self.optimizer} has --beta1)"
            )
        ratio = self.min_lr_ratio
        require(ratio is None or 0 <= ratio <= 1, "min_lr_ratio", ratio, "in [0, 1]")
        ratio = self.warmup_ratio
        require(ratio is None or 0 <= ratio <= 1, "warmup_ratio", ratio, "in [0, 1]")
        require(self.lr > 0, "lr", self.lr, "above 0")
        require(self.eps > 0, "eps", self.eps, "above 0")
        require(self.eps >= SMALLEST_EPS, "eps", self.eps, f"at least {SMALLEST_EPS:g}")
        require(self.steps <= MOST_STEPS, "steps", self.steps, f"at most {MOST_STEPS:,}")

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        if not self.steps:
            return {}
        late = f"it comes after --steps {self.steps}; the end of the run is what counts"
        names = ("save_interval", "eval_interval", "log_interval")
        found = {name: late for name in names if getattr(self, name) > self.steps}
        if not self.eval_sequences:
            found["eval_interval"] = "--eval-sequences 0 turns evaluation off"
        return found

    @property
    def checkpoints_kept(self) -> int:
        """Newest checkpoints that stay while the run is unfinished."""
        return ALL_CHECKPOINTS if self.keep_all_checkpoints else self.keep_checkpoints

    @property
    def checkpoints_left(self) -> int:
        """Newest checkpoints that stay once it is finished."""
        return ALL_CHECKPOINTS if self.keep_all_checkpoints else int(self.keep_last_checkpoint)

    @property
    def momentum(self) -> float | None:
        """Muon's momentum; None where AdamW trains everything."""
        if self.optimizer != "muon":
            return None
        return MUON_MOMENTUM if self.muon_momentum is None else self.muon_momentum


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """How much training follows a frozen teacher besides the text.

    The loss of a token is (1 - a) * cross-entropy + a * T^2 * KL(teacher || student), where both
    models' logits are divided by T in the divergence.
    """

    weight: Annotated[float | None, Name("distill-weight")] = None
    """Weight of the teacher in the loss, 0 (off) to 1 (the teacher alone). Default: 0.9 with a
    teacher, which shearing by projection has in its source, and training after it, also where
    shearing trained nothing (--steps 0); after shearing at another weight, that; else 0."""

    kind: Annotated[Literal["forward-kl"], Name("distill-kind")] = "forward-kl"
    """forward-kl: the divergence of the student's distribution from the teacher's, weighted by the
    teacher's."""

    temperature: Annotated[float | None, Name("distill-temperature")] = None
    """T: above 1 the teacher's unlikely ids count for more. Default: after shearing, what shearing
    used; else 1."""

    top_k: Annotated[int | None, Name("distill-top-k")] = None
    """Tell only the teacher's K likeliest ids of each token apart and count all others as one; 0
    compares the whole vocabulary. Default: after shearing, what shearing used; else 0."""

    def __post_init__(self) -> None:
        require(
            self.weight is None or 0 <= self.weight <= 1, "distill_weight", self.weight, "in [0, 1]"
        )
        temperature, top_k = self.temperature, self.top_k
        require(
            temperature is None or 1 / HOTTEST <= temperature <= HOTTEST,
            "distill_temperature",
            temperature,
            f"above 0 and finite, from {1 / HOTTEST:g} to {HOTTEST:g}; use for example 1 or 2",
        )
        require(
            top_k is None or (top_k >= 0 and top_k != 1),
            "distill_top_k",
            top_k,
            "0 (the whole vocabulary) or at least 2 (over a single id nothing is compared)",
        )

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        names = ("distill_kind", "distill_temperature", "distill_top_k")
        return dict.fromkeys(names, "--distill-weight 0 has no teacher") if self.weight == 0 else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class CptConfig:
    """Continue the pre-training of a sheared model, or of any supported one.

    Running it again resumes --output.
    """

    ESSENTIAL: ClassVar = (
        "model data output init steps seq-len global-batch micro-batch lr mixture documents seed "
        "json"
    )

    model: Annotated[str, ON_DISK] = "runs/shear"
    """Folder of a shearing run, a Hugging Face folder, a .gguf file or a hub id (org/name, or
    org/name@revision)."""
    data: Annotated[str, ON_DISK] = "runs/tokens"
    """Folder made by `shorn tokenize`."""
    output: Annotated[str, ON_DISK] = "runs/cpt"
    """Folder of this run: model/, cpt.json, metrics.jsonl, checkpoints/."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: fresh weights of the same shape, as a baseline."""
    domain_weights: str | None = None
    """Initial weights, "c4=0.6,github=0.4". Default: the shearing run's last, else proportional
    to tokens."""
    reference_losses: str | None = None
    """Losses to steer towards, "c4=2.1,github=0.9". Default: the shearing run's reference, else the
    model's own at the start."""
    reference_fit: Annotated[str | None, ON_DISK] = None
    """JSON file {"sizes": {"6738415616": {"c4": 1.92, ...}, ...}} of held-out losses by number of
    parameters, from which the losses to steer towards are fitted at the model's number."""
    teacher: Annotated[str | None, ON_DISK] = None
    """Model to learn from besides the text, named like --model; same vocabulary. Default: for a
    sheared model the source, at shearing's --distill-weight; else none."""
    moments: bool = True
    """Go on with the optimizer's moments that shearing left beside --model, if it left any."""
    documents: Documents | None = None
    """apart: tokens see their own document alone, positions begin anew in each, and no token is
    predicted from another document; joined: samples are read end to end. Default: apart for
    conversations, which cannot be joined, and joined for text."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights in OUTPUT/model. Default: the original's, also after shearing in
    float32; bfloat16 where nothing states it."""
    json: Annotated[str | None, ON_DISK] = None
    """Copy the final report to this file."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(warmup_ratio=None))

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        found = {"moments": "--init random has no former ones"} if self.init == "random" else {}
        if self.mixture.kind == "dynamic":
            return found
        steers = f"--mixture {self.mixture.kind} steers towards no losses"
        return found | dict.fromkeys(("reference_losses", "reference_fit"), steers)


def check_layout(config: TrainConfig, world: int) -> None:
    """Raises InputError unless the global batch splits evenly over ranks and micro-batches."""
    if world % config.replicas:
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        raise InputError(
            f"--replicas {config.replicas} does not divide {world} ranks; use one of {divisors}"
        )
    if config.global_batch % world:
        fits = [n for n in range(1, config.global_batch + 1) if config.global_batch % n == 0]
        raise InputError(
            f"--global-batch {config.global_batch} does not divide over {world} ranks; "
            f"start one of {fits} ranks, or use --global-batch "
            f"{_nearest_multiple(config.global_batch, world)}"
        )
    rows = config.global_batch // world
    if rows % config.micro_batch:
        fits = [n for n in range(1, rows + 1) if rows % n == 0]
        raise InputError(
            f"--micro-batch {config.micro_batch} does not divide the {rows} sequences of each rank "
            f"(--global-batch {config.global_batch} over {world} ranks); use one of {fits}"
        )


def _nearest_multiple(value: int, factor: int) -> int:
    return max(factor, round(value / factor) * factor)
