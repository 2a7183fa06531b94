"""Options of `shorn finetune`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from data.errors import InputError, require, require_at_least, require_finite
from data.mixture import MixtureConfig
from data.options import ON_DISK, Name
from data.reader import Documents
from trainer.config import DistillationConfig, TrainConfig

Method = Literal["lora", "last-blocks", "full"]

EPOCHS = 2.0
"""Epochs where neither --epochs nor --steps is given."""
MOST_EPOCHS = 10_000
"""More epochs than a run could make of anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraOptions:
    """The adapters of --method lora (arXiv 2106.09685).

    Each of the target modules computes W x + alpha / r * B A x, where W stays as it is. Defaults as
    in Shortened LLaMA (arXiv 2402.02834, section 4.1, and its code).
    """

    r: Annotated[int, Name("lora-r")] = 8
    """Rank of an adapter: rows of A and columns of B."""

    alpha: Annotated[float, Name("lora-alpha")] = 16.0
    """The adapters' part is scaled by alpha / r."""

    dropout: Annotated[float, Name("lora-dropout")] = 0.05
    """Share of an adapter's inputs that a training step leaves out, 0 to below 1."""

    target_modules: tuple[str, ...] = ()
    """Modules that get an adapter, by the last part of their names, such as q_proj v_proj. Default:
    all matrices of attention and feed-forward layers."""

    def __post_init__(self) -> None:
        require(self.r >= 1, "lora_r", self.r, "at least 1")
        alpha, dropout = self.alpha, self.dropout
        require(0 < alpha <= 1e6, "lora_alpha", alpha, "above 0, and at most 1e6")
        require(0 <= dropout < 1, "lora_dropout", dropout, "in [0, 1)")

    @property
    def scale(self) -> float:
        """What the adapters' part is multiplied by."""
        return self.alpha / self.r


def _train() -> TrainConfig:
    """Training options as Shortened LLaMA's code has them, as far as there are such; 0 steps leave
    the number to the epochs."""
    return TrainConfig(
        steps=0,
        global_batch=64,
        lr=1e-4,
        min_lr_ratio=0.0,
        warmup_ratio=0.06,
        weight_decay=0.0,
        beta2=0.999,
        save_interval=200,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Heal a pruned model, or fine-tune any supported one: adapters, its last blocks, or all of it.

    Running it again resumes --output.
    """

    ESSENTIAL: ClassVar = (
        "model data output method epochs steps last-blocks lora-r lora-alpha seq-len global-batch "
        "micro-batch lr documents seed json"
    )

    model: Annotated[str, ON_DISK] = "runs/shear"
    """Folder of a run of shearing or training, a Hugging Face folder, a .gguf file or a hub id
    (org/name, or org/name@revision)."""
    data: Annotated[str, ON_DISK] = "runs/tokens"
    """Folder made by `shorn tokenize`."""
    output: Annotated[str, ON_DISK] = "runs/finetune"
    """Folder of this run: model/, adapter/ of --method lora, finetune.json, metrics.jsonl,
    checkpoints/."""
    method: Method = "lora"
    """lora: train low-rank adapters beside the matrices in blocks (pip install -e '.[lora]').
    last-blocks: the last blocks, final norm and head. full: all weights."""
    epochs: float | None = None
    """How often the run goes through the training text; the steps that this takes are rounded up.
    Default: 2, unless --steps says how many steps."""
    last_blocks: int = 3
    """Blocks from the end that --method last-blocks trains."""
    head: bool = True
    """With --method last-blocks train the output head too, which is the embedding as well where the
    two are tied."""
    domain_weights: str | None = None
    """Initial weights, "c4=0.6,github=0.4". Default: proportional to tokens; with --mixture dynamic
    a shearing run's last."""
    reference_losses: str | None = None
    """Losses that --mixture dynamic steers towards, "c4=2.1,github=0.9". Default: a shearing run's
    reference, else the model's own at the start."""
    reference_fit: Annotated[str | None, ON_DISK] = None
    """JSON file {"sizes": {"6738415616": {"c4": 1.92, ...}, ...}} of held-out losses by number of
    parameters, from which the losses to steer towards are fitted at the model's number."""
    teacher: Annotated[str | None, ON_DISK] = None
    """Model to learn from besides the text, named like --model; same vocabulary. Default: none."""
    documents: Documents | None = None
    """apart: tokens see their own document alone, positions begin anew in each, and no token is
    predicted from another document; joined: samples are read end to end. Default: apart for
    conversations, which cannot be joined, and joined for text."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights in OUTPUT/model. Default: the original's, also after shearing in
    float32; bfloat16 where nothing states it. Adapters are float32."""
    json: Annotated[str | None, ON_DISK] = None
    """Copy the final report to this file."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    mixture: MixtureConfig = field(default_factory=lambda: MixtureConfig(kind="fixed"))
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    train: TrainConfig = field(default_factory=_train)

    def __post_init__(self) -> None:
        require_finite(self)
        require_at_least(self, 1, "last_blocks")
        epochs, steps = self.epochs, self.train.steps
        if epochs is not None:
            limit = f"above 0, and at most {MOST_EPOCHS:,}"
            require(0 < epochs <= MOST_EPOCHS, "epochs", f"{epochs:g}", limit)
            if steps:
                raise InputError(
                    f"--epochs {epochs:g} and --steps {steps} both say how long to train: leave "
                    "one out"
                )
        if self.method == "lora" and self.train.optimizer == "muon":
            raise InputError(
                "--optimizer muon moves whole matrices, and adapters are products of two: use "
                "--method full or last-blocks, or leave --optimizer out"
            )

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        why = f"--method {self.method} has "
        found: dict[str, str] = {}
        if self.method != "lora":
            names = ("lora_r", "lora_alpha", "lora_dropout", "target_modules")
            found |= dict.fromkeys(names, why + "no adapters")
        if self.method != "last-blocks":
            found |= dict.fromkeys(("last_blocks", "head"), why + "no last blocks to choose")
        if self.mixture.kind != "dynamic":
            steers = f"--mixture {self.mixture.kind} steers towards no losses"
            found |= dict.fromkeys(("reference_losses", "reference_fit"), steers)
        return found

    def identity(self, targets: tuple[str, ...]) -> dict[str, Any]:
        """What of the method decides the course of a run; adapters are at the modules `targets`."""
        found: dict[str, Any] = {"method": self.method}
        if self.method == "lora":
            lora = self.lora
            numbers = {"r": lora.r, "alpha": lora.alpha, "dropout": lora.dropout}
            found |= {f"lora_{name}": value for name, value in numbers.items()}
            found["target_modules"] = " ".join(targets)
        elif self.method == "last-blocks":
            found |= {"last_blocks": self.last_blocks, "head": self.head}
        return found
