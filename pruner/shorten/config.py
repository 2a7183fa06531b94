"""Options of removing whole blocks, or attention and feed-forward layers."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from data.errors import InputError, require, require_at_least, require_finite
from data.options import ON_DISK
from pruner.config import MaskConfig, RefitConfig, ShearConfig, calibration_sequences
from pruner.shapes import PRESETS, parse_sizes
from pruner.shorten.parts import Units
from trainer.config import Kernels, Precision, TrainConfig

SEARCHES = {"evolution": (40, 16), "refitted": (8, 8)}
"""Searches over the set of blocks; generations and offspring by default."""
SIZES = ("hidden", "heads", "kv-heads", "ffn")
"""What --then may cut."""
Criterion = Literal["ppl", "taylor", "magnitude", "influence", "angular", "reverse", "random"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortenConfig:
    """Remove whole blocks of a model, or layers of them, by importance; running it again resumes
    --output."""

    ESSENTIAL: ClassVar = (
        "source units criterion remove ratio params then search protect-first protect-last data "
        "output seq-len json"
    )

    source: Annotated[str, ON_DISK] = "meta-llama/Llama-2-7b-hf"
    """Model to shorten: a Hugging Face folder, a .gguf file, a run's output folder or a hub id
    (org/name, or org/name@revision)."""
    units: Units = "block"
    """What is removed. block: whole blocks; attention, feed-forward: these layers, while the rest
    of their blocks stays; both: either of the two, whichever score less. Models without all layers
    load in transformers with trust_remote_code=True and the file that is saved along."""
    criterion: Criterion = "ppl"
    """What the score of a block or layer is; the lowest go first. ppl: perplexity without it;
    taylor: first-order change of the loss, magnitude: size of weights, each summed over the block;
    influence: one minus the cosine of the stream in front of and behind the block; angular: the
    same as an angle over as many blocks in a row as are removed, so that they go together; reverse:
    the last go first; random: by --seed."""
    remove: int | None = None
    """Number of blocks (or layers) to remove."""
    ratio: float | None = None
    """Instead: fraction of all parameters to remove, in as many whole blocks (or layers of one
    kind) as it holds."""
    params: str | None = None
    """Instead: parameters to come nearest to, such as 5.5b or 70m."""
    then: str | None = None
    """Sizes to cut as well once the blocks are chosen, as in --target of `shorn shear`: ffn=832 or
    hidden=448,heads=7. Their units are chosen by the strength of activations, and all that is kept
    is refitted at once."""
    search: Literal["one-shot", "greedy", "evolution", "refitted"] = "one-shot"
    """one-shot: all go by one scoring; greedy: the others are scored anew after each that goes
    (ppl); evolution: blocks of the one-shot set are exchanged for others, as long as the divergence
    from the source falls; refitted: the same, but sets are compared after a refit of each, which
    counts only what the refit cannot mend and takes far longer."""
    generations: int | None = None
    """Rounds of exchange (evolution, refitted). Default: 40, and 8 for refitted."""
    offspring: int | None = None
    """Sets that are tried in each, most of them on a part of the text only (evolution, refitted).
    Default: 16, and 8 for refitted."""
    protect_first: int = 4
    """First blocks that stay whole."""
    protect_last: int = 2
    """Last blocks that stay whole."""
    data: Annotated[str, ON_DISK] = "runs/tokens"
    """Folder made by `shorn tokenize`, on whose text blocks are scored and weights refitted."""
    output: Annotated[str, ON_DISK] = "runs/shorten"
    """Folder of this run: model/, scores/, masks.safetensors, shear.json."""
    sequences: int | None = None
    """Sequences to score on: those that training draws first. Default: as many as hold 65,536
    tokens, and at least 32."""
    domain_weights: str | None = None
    """Share of each domain in that text, "c4=0.6,github=0.4". Default: proportional to tokens."""
    seq_len: int = 4096
    """Tokens per sequence."""
    micro_batch: int = 1
    """Sequences per rank in one pass; ppl computes each of them once around every block."""
    eval_sequences: int = 32
    """Held-out sequences per domain that source and result are measured on; 0: none."""
    seed: int = 0
    """Seed of the order of the text, and of --criterion random."""
    precision: Precision = "auto"
    """Compute precision. auto: bf16 on a GPU, fp32 on a CPU."""
    kernels: Kernels = "auto"
    """What computes the operators, as in training."""
    threads: int | None = None
    """CPU threads per rank. Default: cores of the machine divided by its ranks."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in OUTPUT/model; continued pre-training returns to the source's type."""
    json: Annotated[str | None, ON_DISK] = None
    """Copy the final report to this file."""
    refit: RefitConfig = field(default_factory=RefitConfig)

    def __post_init__(self) -> None:
        require_finite(self)
        given = [name for name in ("remove", "ratio", "params") if getattr(self, name) is not None]
        if len(given) != 1:
            flags = " and ".join(f"--{name} {getattr(self, name)}" for name in given)
            raise InputError(
                f"{flags or 'nothing'} says how much to remove: give one of --remove 6 (blocks), "
                "--ratio 0.2 (of the parameters) and --params 5.5b (that are left)"
            )
        require_at_least(self, 1, "remove", "sequences", why="; use for example 6")
        require_at_least(self, 1, "generations", "offspring")
        self._require_sizes()
        ratio = self.ratio
        require(ratio is None or 0 < ratio < 1, "ratio", ratio, "between 0 and 1, such as 0.2")
        require_at_least(self, 0, "protect_first", "protect_last")
        self._require_units()
        if self.search == "greedy" and self.criterion != "ppl":
            raise InputError(
                f"--search greedy: scores anew by --criterion ppl only, and --criterion is "
                f"{self.criterion}; leave one of the two out"
            )
        if self.search == "refitted" and not self.refit.refit:
            raise InputError(
                "--no-refit: --search refitted compares what a refit makes of the blocks that are "
                "left; leave one of the two out, or use --search evolution"
            )
        _ = self.train

    def _require_units(self) -> None:
        """Raises InputError where --units does not go with another option."""
        if self.units == "both" and self.remove is None:
            raise InputError(
                "--units both: attention and feed-forward layers hold different numbers of "
                "parameters, so that how many go cannot be known before; say it with --remove 6, "
                "or use --units attention or --units feed-forward"
            )
        if self.units != "block" and self.criterion == "angular":
            raise InputError(
                f"--criterion angular: is taken over whole blocks in a row, and --units is "
                f"{self.units}; use --criterion influence for layers"
            )

    def _require_sizes(self) -> None:
        """Raises InputError where --then holds no sizes besides blocks."""
        if self.then is None:
            return
        example = "write for example ffn=832 or hidden=448,heads=7"
        for pair in self.then.split(","):
            key = pair.partition("=")[0].strip().lower().replace("_", "-")
            if key == "layers" or key in PRESETS:
                raise InputError(
                    f"--then {self.then}: how many blocks go is for --remove, --ratio or --params "
                    f"to say; {example}"
                )
            if key not in SIZES or "=" not in pair:
                raise InputError(
                    f"--then {self.then}: {pair.strip()!r} is not key=size with a key of "
                    f"{', '.join(SIZES)}; {example}"
                )
        try:
            parse_sizes(self.then)
        except InputError as error:
            raise InputError(f"--then {self.then}: {error}") from error

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        found = {}
        if self.search not in SEARCHES:
            why = f"only --search {' and --search '.join(SEARCHES)} have them"
            found = dict.fromkeys(("generations", "offspring"), why)
        if self.search == "evolution" or self.then is not None:
            return found
        if self.criterion in ("magnitude", "reverse", "random"):
            found["sequences"] = f"--criterion {self.criterion} reads no text"
        return found

    @property
    def train(self) -> TrainConfig:
        """What the command shares with those that train. Raises InputError for bad options."""
        return TrainConfig(
            steps=0,
            seq_len=self.seq_len,
            global_batch=1,
            micro_batch=self.micro_batch,
            seed=self.seed,
            precision=self.precision,
            kernels=self.kernels,
            eval_sequences=self.eval_sequences,
            threads=self.threads,
        )

    @property
    def scored_sequences(self) -> int:
        """Sequences to score on."""
        return self.sequences or calibration_sequences(self.seq_len)

    @property
    def rounds(self) -> tuple[int, int]:
        """Generations of a search, and the offspring in each."""
        generations, offspring = SEARCHES.get(self.search, SEARCHES["evolution"])
        return self.generations or generations, self.offspring or offspring

    def shearing(self, sizes: dict[str, int]) -> ShearConfig:
        """The run of shearing that keeps `sizes` by their names in --target, and else what --then
        says."""
        narrows = self.then is not None and "hidden" in parse_sizes(self.then)
        return ShearConfig(
            source=self.source,
            target=",".join(
                [*(f"{key}={size}" for key, size in sizes.items()), *filter(None, [self.then])]
            ),
            data=self.data,
            output=self.output,
            domain_weights=self.domain_weights,
            save_dtype=self.save_dtype,
            json=self.json,
            masks=MaskConfig(
                basis=None if narrows else "source",
                calibration_sequences=self.scored_sequences if self.then else None,
            ),
            refit=self.refit,
            train=self.train,
        )
