"""Options of a shearing run."""

import contextlib
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from data.errors import InputError, require, require_at_least, require_finite
from data.log import logger
from data.mixture import MixtureConfig
from data.options import ON_DISK
from pruner.budget import parse_budget
from pruner.shapes import Shape
from trainer.config import (
    DISTILL_WEIGHT,
    DISTILLED,
    MIN_LR_RATIO,
    DistillationConfig,
    TrainConfig,
)
from trainer.models.config import ModelConfig

WARMUP_RATIO = 0.1
"""Default of TrainConfig.warmup_ratio in shearing."""
CALIBRATION_TOKENS, CALIBRATION_SEQUENCES = 65_536, 32
"""What a calibration pass reads at least by default."""
CALIBRATION = "masks.calibration_sequences"
"""What former versions called that in a run's identity."""
COLDEST = 1e-4
"""Lowest temperature at which rounding of the scores leaves the count exact."""
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "projection": {
        "masks": {
            "init": "importance",
            "basis": "principal",
            "norm_scale": "held",
            "mask_lr": 0.05,
            "target_warmup": 0.5,
            "mask_draws": "step",
        },
        # Training goes on after it, from the source's own predictions.
        "train": {"min_lr_ratio": 1.0, "warmup_ratio": WARMUP_RATIO},
        "distillation": {"weight": DISTILL_WEIGHT},
    },
    "sheared-llama": {
        "masks": {
            "init": "flat",
            "basis": "source",
            "norm_scale": "live",
            "mask_lr": 1.0,
            "target_warmup": 0.2,
            "mask_draws": "micro-batch",
        },
        "train": {"min_lr_ratio": MIN_LR_RATIO, "warmup_ratio": WARMUP_RATIO},
        "distillation": {"weight": 0.0},
    },
}
"""What options are that are None: by rule, part of ShearConfig and option."""
AT_ONCE = {
    "train": {"min_lr_ratio": MIN_LR_RATIO, "warmup_ratio": WARMUP_RATIO},
}
"""The same where nothing is trained (--steps 0)."""
_TRAINING = (
    *("lr", "min_lr_ratio", "warmup_ratio", "weight_decay", "beta1", "beta2", "eps", "clip"),
    *("save_interval", "eval_interval", "log_interval", "mask_lr", "mask_clip", "target_warmup"),
    *("harden", "temperature", "final_temperature", "mask_noise", "mask_draws"),
    *("implicit_gradient", "mixture_strength", "mixture_floor", "mixture_ceiling"),
    *("mixture_clip", "mixture_interval"),
)
"""Options that only steps of training use."""
ALIASES: dict[str, Literal["sheared-llama"]] = {"paper": "sheared-llama"}
"""Former names of rules."""

Part = TypeVar("Part", "MaskConfig", TrainConfig, DistillationConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig:
    """How the masks are learned."""

    rule: Literal["projection", "sheared-llama", "paper"] = "projection"
    """projection meets the target count at every step; sheared-llama is the published penalty,
    whose masks may end between 0 and 1 (paper: its former name)."""
    init: Literal["importance", "second-order", "taylor", "magnitude", "flat"] | None = None
    """Initial scores: by the strength of activations (importance), by what removing heads and
    channels costs once the others make up for it (second-order), or by gradients of the loss
    (taylor) in one calibration pass, by the norm of the weights (magnitude), or flat. Default:
    importance for projection, flat (as published) for sheared-llama."""
    basis: Literal["principal", "source"] | None = None
    """Which hidden dimensions are pruned. principal: the principal components of what the norms
    read, to which the source is rotated first, exactly where embedding and head are not tied;
    source: its own. Default: principal for projection where the family allows it, source (as
    published) for sheared-llama."""
    norm_scale: Literal["held", "live"] | None = None
    """How norms scale their output while hidden dimensions are pruned. held: those that remain keep
    their scale; live: they are normed over the remaining ones, as in a smaller model with the same
    gains. Default: held for projection, live (as published) for sheared-llama."""
    calibration_sequences: int | None = None
    """Sequences of the calibration pass: those that training draws first. Default: as many as hold
    65,536 tokens, and at least 32."""
    mask_lr: float | None = None
    """Adam's learning rate for the scores. Default: 0.05 for projection, 1.0 for sheared-llama."""
    mask_clip: float = 1.0
    """Largest norm of the score gradient of each kind of units."""
    target_warmup: float | None = None
    """Fraction of the steps over which the count falls linearly from the source's to the target's.
    Default: 0.5 for projection, 0.2 for sheared-llama."""
    harden: float = 0.75
    """Fraction of the steps after which masks are exactly 0 or 1 and only weights train
    (projection); without effect under --freeze-weights."""
    temperature: float = 0.5
    """Initial width of the masks' transition, in units of the scores (projection)."""
    final_temperature: float = 0.02
    """Width reached when masks harden (projection)."""
    mask_noise: float = 0.5
    """Initial scale of the logistic noise; it falls to 0 with the temperature (projection)."""
    compact: bool = True
    """Compute only the units whose mask is not zero. The result is the same; --no-compact computes
    the whole source in every pass."""
    mask_draws: Literal["step", "rank", "micro-batch"] | None = None
    """Which passes share a draw of the masks: all of a step, all of a rank in a step, or none.
    Default: step for projection, micro-batch (as published) for sheared-llama."""
    implicit_gradient: bool = True
    """Differentiate through the threshold, so that the gradient cannot change the count
    (projection)."""
    freeze_weights: bool = False
    """Train the masks alone, on the source's own weights, without gradients or optimizer state of
    weights; a few steps select the units. The source, cut to the selection, is refitted, and
    `shorn cpt` trains it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", ALIASES.get(self.rule, self.rule))
        require_finite(self)
        require(0 < self.harden <= 1, "harden", self.harden, "in (0, 1]; use for example 0.75")
        temperature, warmup = self.temperature, self.target_warmup
        if warmup is None:
            warmup = DEFAULTS[self.rule]["masks"]["target_warmup"]
        require(0 < warmup <= 1, "target_warmup", warmup, "in (0, 1]; use for example 0.5")
        require(
            self.rule != "projection" or self.freeze_weights or warmup <= self.harden,
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
        rate = self.mask_lr
        require(rate is None or rate > 0, "mask_lr", rate, "above 0; use for example 0.05")
        require(self.mask_clip > 0, "mask_clip", self.mask_clip, "above 0; use for example 1.0")
        require(self.mask_noise >= 0, "mask_noise", self.mask_noise, "0 (no noise) or more")
        require(
            self.calibration_sequences is None or self.calibration_sequences >= 1,
            "calibration_sequences",
            self.calibration_sequences,
            "at least 1; use for example 32, or --init flat for no calibration pass",
        )

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        found = {}
        if self.rule != "projection":
            own = ("harden", "temperature", "final_temperature", "mask_noise", "implicit_gradient")
            found = dict.fromkeys(own, f"--rule {self.rule} knows none of it")
        masks = resolve_masks(self)
        if masks.init in ("flat", "magnitude") and masks.basis == "source":
            found["calibration_sequences"] = (
                f"--init {masks.init} with --basis source calibrates nothing"
            )
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitConfig:
    """How the kept weights are refitted before the model is saved (pruner.refit)."""

    refit: bool = True
    """Refit the kept weights in closed form, so that the pruned model reproduces the source's
    residual stream; held-out text decides whether the result is kept. Where weights are trained
    (--steps N without --freeze-weights) it would do harm and is left out; --selection takes the
    units of such a run back to the source's weights."""
    refit_sequences: int = 256
    """Sequences the weights are refitted on: those that training would draw next."""
    refit_held_out: int = 32
    """Sequences after those, on which the refitted model must be better."""
    refit_ridge: float = 0.1
    """Weight of the penalty on changes, relative to the mean square of a matrix's inputs; with few
    sequences use more (0.3 for 64)."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, 1, "refit_sequences", "refit_held_out", why="; use for example 32")
        require(self.refit_ridge > 0, "refit_ridge", self.refit_ridge, "above 0; use 0.1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShearConfig:
    """Prune a model to a target shape with learned masks; running it again resumes --output."""

    ESSENTIAL: ClassVar = (
        "source target data output steps seq-len global-batch micro-batch lr seed rule json"
    )

    source: Annotated[str, ON_DISK] = "meta-llama/Llama-2-7b-hf"
    """Model to prune: a Hugging Face folder, a .gguf file, a run's output folder or a hub id
    (org/name, or org/name@revision)."""
    target: str = "1.3b"
    """Preset of LLaMA-2-7B (1.3b, 2.7b, 370m) or Pythia-410m (pythia-160m) or sizes such as
    layers=24,hidden=432,heads=6,kv-heads=2,ffn=1152; sizes left out stay as in the source. Or a
    budget, which proposes the sizes and says why before anything starts: params=70m or 70m (all
    parameters), params-non-embedding=46m, or speedup=2 (decoding at batch 1, measured on this
    device); sizes beside a budget are kept: params=70m,layers=24."""
    propose: Literal["rule", "search"] = "rule"
    """How a budget becomes a shape. rule: the one nearest to the source and its proportions;
    search: of the rule's shapes for every depth, the one whose predictions are nearest to the
    source's once it is cut and refitted, which is tried for each."""
    align: int | None = None
    """Have a budget give hidden and feed-forward sizes that are multiples of this, such as 128 for
    4-bit serving kernels or 256 for GGUF's k-quants."""
    layer_widths: Literal["uniform", "free"] = "uniform"
    """uniform: all feed-forward layers keep as many channels; free: as many in all, but a search
    moves them between layers, compared by the predictions after a refit (with --steps 0). Such a
    model loads in transformers with trust_remote_code=True and the file that is saved along."""
    selection: Annotated[str | None, ON_DISK] = None
    """Keep the units that another pruned model of the source keeps: the output of a run of shear,
    or a Hugging Face folder whose weights were only cut. They are cut from the source anew and
    refitted (with --steps 0; the target is the other model's)."""
    data: Annotated[str, ON_DISK] = "runs/tokens"
    """Folder made by `shorn tokenize`."""
    output: Annotated[str, ON_DISK] = "runs/shear"
    """Folder of this run: model/, masks.safetensors, moments.safetensors, shear.json,
    metrics.jsonl, checkpoints/."""
    domain_weights: str | None = None
    """Initial weights, "c4=0.6,github=0.4". Default: proportional to tokens."""
    reference_losses: str | None = None
    """Losses to steer towards, "c4=2.1,github=0.9". Default: the source's on training text."""
    reference_fit: Annotated[str | None, ON_DISK] = None
    """JSON file {"sizes": {"6738415616": {"c4": 1.92, ...}, ...}} of held-out losses by number of
    parameters, from which the losses to steer towards are fitted at the target's number."""
    reference_sequences: int = 32
    """Training sequences per domain on which the source's loss is measured."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in OUTPUT/model; float32 loses nothing before continued pre-training,
    which returns to the source's type."""
    save_moments: bool = True
    """Write OUTPUT/moments.safetensors: the optimizer's moments of what is kept, 8 bytes per
    parameter, with which `shorn cpt` goes on. Where no weight is trained there are none."""
    json: Annotated[str | None, ON_DISK] = None
    """Copy the final report to this file."""
    masks: MaskConfig = field(default_factory=MaskConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=3200,
            global_batch=32,
            micro_batch=4,
            min_lr_ratio=None,
            warmup_ratio=WARMUP_RATIO,
            activation_checkpointing=True,
        )
    )

    def __post_init__(self) -> None:
        require_at_least(self, 1, "reference_sequences", why="; use for example 32")
        require_at_least(self, 1, "align", why="; use for example 128")
        if self.selection is not None and self.train.steps:
            raise InputError(
                f"--selection {self.selection}: names the units to keep, and --steps "
                f"{self.train.steps} would learn others; add --steps 0"
            )
        if self.layer_widths == "free":
            self._require_free_widths()

    def _require_free_widths(self) -> None:
        """Raises InputError where another option decides how many channels layers keep."""
        if self.train.steps:
            raise InputError(
                f"--layer-widths free: a search finds the widths, and masks that --steps "
                f"{self.train.steps} would learn keep the same in every layer; add --steps 0"
            )
        if self.selection is not None:
            raise InputError(
                f"--layer-widths free: --selection {self.selection} says which channels are kept; "
                "leave one of the two out"
            )
        if self.masks.init in ("flat", "second-order"):
            raise InputError(
                f"--init {self.masks.init}: --layer-widths free chooses units by one measure of "
                "all kinds; use importance, taylor or magnitude"
            )
        if not self.refit.refit:
            raise InputError(
                "--no-refit: --layer-widths free compares what a refit makes of the widths; leave "
                "one of the two out"
            )

    @property
    def trains_weights(self) -> bool:
        """Whether the run changes weights before they are cut."""
        return self.train.steps > 0 and not self.masks.freeze_weights

    @property
    def refits(self) -> bool:
        """Whether the weights that are kept are refitted."""
        return self.refit.refit and not self.trains_weights

    @property
    def saves_moments(self) -> bool:
        """Whether the moments of what is kept are written."""
        return self.save_moments and self.trains_weights

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        found = {} if self.train.steps else dict.fromkeys(_TRAINING, "--steps 0 trains nothing")
        if not self.trains_weights:
            found["save_moments"] = "no weight is trained, so there are no moments"
        with contextlib.suppress(InputError):
            if parse_budget(self.target) is None:
                why = f"--target {self.target} leaves no size open"
                found |= dict.fromkeys(("propose", "align"), why)
        if self.layer_widths == "free":
            # Channels move in steps of it.
            found.pop("align", None)
        for flag, value in (
            ("--reference-losses", self.reference_losses),
            ("--reference-fit", self.reference_fit),
        ):
            if value is not None:
                found["reference_sequences"] = f"{flag} takes the place of what they would measure"
        return found


def calibration_sequences(seq_len: int) -> int:
    """Sequences of `seq_len` tokens that a calibration pass reads by default."""
    return max(CALIBRATION_SEQUENCES, -(-CALIBRATION_TOKENS // seq_len))


def resolve(config: ShearConfig, model: ModelConfig, target: Shape) -> ShearConfig:
    """`config` with every option that is None filled in, for pruning `model` to `target`.

    Raises InputError when an option cannot be had for `model`.
    """
    defaults = DEFAULTS[config.masks.rule] | ({} if config.train.steps else AT_ONCE)
    number = config.masks.calibration_sequences
    if number is None:
        number = calibration_sequences(config.train.seq_len)
    basis = _basis(config.masks, model, target)
    masks = replace(config.masks, basis=basis, calibration_sequences=number)
    return replace(
        config,
        masks=_fill(masks, defaults["masks"]),
        train=_fill(config.train, defaults["train"]),
        distillation=_fill(config.distillation, DISTILLED | defaults["distillation"]),
    )


def resolve_masks(masks: MaskConfig) -> MaskConfig:
    """The options of `masks`, those that are None as by default for its rule."""
    return _fill(masks, DEFAULTS[masks.rule]["masks"])


def resolve_identity(saved: dict[str, Any]) -> dict[str, Any]:
    """The saved identity of a run, as this version would save it.

    Former versions saved most options of MaskConfig as they were given: None, or a rule's alias.
    """
    rule = saved.get("masks.rule", "")
    rule = ALIASES.get(rule, rule)
    if rule not in DEFAULTS:
        # Another command's run.
        return saved
    defaults = {f"masks.{name}": value for name, value in DEFAULTS[rule]["masks"].items()}
    defaults |= {"masks.freeze_weights": False, "layer_widths": "uniform"}
    missing = {name: value for name, value in defaults.items() if saved.get(name) is None}
    # How much was measured is decided before training: what it gave is kept.
    known = {name: value for name, value in saved.items() if name != CALIBRATION}
    return known | missing | {"masks.rule": rule}


def _basis(
    masks: MaskConfig, model: ModelConfig, target: Shape
) -> Literal["principal", "source"] | None:
    """The basis, if the rule does not decide about it.

    A LayerNorm subtracts the mean over the dimensions, which a rotated stream does not have.
    """
    rotatable = model.traits.rotatable
    if masks.basis == "principal" and not rotatable:
        raise InputError(
            f"--basis principal needs a model with RMSNorm, and {model.family} has LayerNorm: use "
            "--basis source"
        )
    if rotatable and target.hidden < model.hidden_size:
        return masks.basis
    if masks.basis == "principal":
        logger.info("note: no effect of --basis principal: the target keeps all hidden dimensions")
    return "source"


def _fill(part: Part, defaults: dict[str, Any]) -> Part:
    """`part` with the `defaults` of the options that are None."""
    missing = {name: value for name, value in defaults.items() if getattr(part, name) is None}
    return replace(part, **missing)
