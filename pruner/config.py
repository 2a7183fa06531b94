"""Options of a shearing run."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from data.errors import require, require_at_least, require_finite
from data.mixture import MixtureConfig
from trainer.config import DistillationConfig, TrainConfig

COLDEST = 1e-4
"""Lowest temperature at which rounding of the scores leaves the count exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig:
    """How the masks are learned."""

    rule: Literal["projection", "paper"] = "projection"
    """projection meets the target count at every step; paper is Sheared LLaMA's penalty, which need
    not polarise."""
    init: Literal["importance", "taylor", "magnitude", "flat"] | None = None
    """Initial scores: by the strength of activations (importance) or by gradients of the loss
    (taylor) in one calibration pass, by the norm of the weights (magnitude), or flat. Default:
    importance for projection, flat (as published) for paper."""
    basis: Literal["principal", "source"] | None = None
    """Basis in which residual dimensions are pruned. principal: the principal components of what
    the norms read, to which the source is turned first without changing its function; source: its
    own dimensions. Default: principal for projection where the family allows it, source (as
    published) for paper."""
    norm_scale: Literal["held", "live"] | None = None
    """What the norms' outputs do while residual dimensions leave. held: those that stay keep their
    scale; live: they are normed to that of a full stream, as in a smaller model with the same
    gains. Default: held for projection, live (as published) for paper."""
    calibration_sequences: int = 32
    """Training sequences of the calibration pass."""
    mask_lr: float | None = None
    """Adam's learning rate for the scores. Default: 0.05 for projection, 1.0 for paper."""
    mask_clip: float = 1.0
    """Largest norm of the score gradient of each mask family."""
    target_warmup: float | None = None
    """Fraction of the steps over which the count falls linearly from the source's to the target's.
    Default: 0.5 for projection, 0.2 for paper."""
    harden: float = 0.75
    """Fraction of the steps after which masks are exactly 0 or 1 and only weights train
    (projection)."""
    temperature: float = 0.5
    """Initial width of the masks' transition, in units of the scores (projection)."""
    final_temperature: float = 0.02
    """Width reached when masks harden (projection)."""
    mask_noise: float = 0.5
    """Initial scale of the logistic noise; it falls to 0 with the temperature (projection)."""
    compact: bool = True
    """Run each pass on the units whose mask is not zero. The result is that of the dense masked
    model; off, every pass computes the whole source."""
    mask_draws: Literal["step", "rank", "micro-batch"] | None = None
    """Which passes share a draw of the masks: all of a step, all of a rank in a step, or none.
    Default: step for projection, micro-batch (as published) for paper."""
    implicit_gradient: bool = True
    """Differentiate through the threshold, so that the gradient cannot change the count
    (projection)."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(0 < self.harden <= 1, "harden", self.harden, "in (0, 1]; use for example 0.75")
        warmup, temperature = self.warmup, self.temperature
        require(0 < warmup <= 1, "target_warmup", warmup, "in (0, 1]; use for example 0.5")
        require(
            self.rule != "projection" or warmup <= self.harden,
            "target_warmup",
            warmup,
            f"at most --harden {self.harden}, because the count must reach the target before masks "
            "harden; lower --target-warmup or raise --harden",
        )
        require(
            COLDEST <= self.final_temperature <= temperature,
            "final_temperature",
            self.final_temperature,
            f"in [{COLDEST}, --temperature {temperature}]; use for example 0.02",
        )
        require(
            self.learning_rate > 0, "mask_lr", self.learning_rate, "above 0; use for example 0.05"
        )
        require(self.mask_clip > 0, "mask_clip", self.mask_clip, "above 0; use for example 1.0")
        require(self.mask_noise >= 0, "mask_noise", self.mask_noise, "0 (no noise) or more")
        require(
            self.calibration_sequences >= 1,
            "calibration_sequences",
            self.calibration_sequences,
            "at least 1; use for example 32, or --init flat for no calibration pass",
        )

    @property
    def initial(self) -> str:
        """The initialisation in force: a value of `init`."""
        return self.init or ("importance" if self.rule == "projection" else "flat")

    @property
    def holds_scale(self) -> bool:
        """Whether norms hold the scale of the dimensions that stay, in force."""
        return (self.norm_scale or ("held" if self.rule == "projection" else "live")) == "held"

    @property
    def draws(self) -> str:
        """What shares a draw of the masks, in force."""
        return self.mask_draws or ("step" if self.rule == "projection" else "micro-batch")

    @property
    def learning_rate(self) -> float:
        """The scores' learning rate in force."""
        default = 0.05 if self.rule == "projection" else 1.0
        return default if self.mask_lr is None else self.mask_lr

    @property
    def warmup(self) -> float:
        """The fraction of the steps in force over which the count falls."""
        default = 0.5 if self.rule == "projection" else 0.2
        return default if self.target_warmup is None else self.target_warmup


@dataclass(frozen=True, kw_only=True, slots=True)
class ShearConfig:
    """Prune a model to a target shape with learned masks; running it again resumes --output."""

    ESSENTIAL: ClassVar = (
        "source target data output steps seq-len global-batch micro-batch lr seed rule json"
    )

    source: str = "meta-llama/Llama-2-7b-hf"
    """Model to prune: a Hugging Face folder, a .gguf file, a run's output folder or a hub id."""
    target: str = "1.3b"
    """Preset of LLaMA-2-7B (1.3b, 2.7b, 370m) or Pythia-410m (pythia-160m) or sizes such as
    layers=24,hidden=432,heads=6,kv-heads=2,ffn=1152; sizes left out stay as in the source. Or a
    budget, which proposes the sizes and says why before anything starts: params=70m (all
    parameters), params-non-embedding=46m, or speedup=2 (decoding at batch 1, measured on this
    device); sizes beside a budget are kept: params=70m,layers=24."""
    data: str = "runs/tokens"
    """Folder made by data.tokenize."""
    output: str = "runs/shear"
    """Folder of this run: model/, masks.safetensors, shear.json, metrics.jsonl, checkpoints/."""
    domain_weights: str | None = None
    """Initial weights, "c4=0.6,github=0.4". None: proportional to tokens."""
    reference_losses: str | None = None
    """Losses to steer towards, "c4=2.1,github=0.9". None: the source's on training text."""
    reference_fit: str | None = None
    """JSON file {"sizes": {"6738415616": {"c4": 1.92, ...}, ...}} of held-out losses by number of
    parameters, from which the losses to steer towards are fitted at the target's number."""
    reference_sequences: int = 32
    """Training sequences per domain on which the source's loss is measured."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in OUTPUT/model; float32 loses nothing before continued pre-training."""
    json: str | None = None
    """Copy the final report to this file."""
    masks: MaskConfig = field(default_factory=MaskConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=3200,
            global_batch=32,
            micro_batch=4,
            warmup_ratio=0.1,
            activation_checkpointing=True,
        )
    )

    def in_force(self) -> "ShearConfig":
        """The same options with those settled that depend on others.

        The projection rule distils, and holds the learning rate for the training after it; the
        paper's does neither.
        """
        learned = self.masks.rule == "projection" and self.train.steps > 0
        ratio = self.train.min_lr_ratio
        if ratio is None and learned:
            ratio = 1.0
        return replace(
            self,
            train=replace(self.train, min_lr_ratio=ratio),
            distillation=self.distillation.in_force(learned),
        )

    def __post_init__(self) -> None:
        require_at_least(self, 1, "reference_sequences", why="; use for example 32")
