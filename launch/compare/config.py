"""What a comparison consists of: its options, methods and targets."""

import math
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from data.cli import all_options
from data.errors import InputError, require, require_at_least, require_threads
from data.mixture import parse_values
from data.options import ON_DISK
from data.paths import home_expanded
from pruner.budget import BUDGETS, budget_error, refuse_budget
from pruner.config import ShearConfig
from pruner.shorten.config import ShortenConfig
from trainer.config import CptConfig, Precision

TARGETS = {
    "half": "layers=24,hidden=432,heads=6,kv-heads=2,ffn=1152",
    "quarter": "layers=22,hidden=336,heads=6,kv-heads=2,ffn=768",
}
"""Named targets: 44% and 23% of SmolLM2-135M's parameters without embeddings."""
OURS = "ours"
MASKS = "masks"
REFITTED = ("activation+refit+kl", "blocks+refit+kl")
_AT_ONCE = ("blocks", "blocks+kl", "activation", "activation+kl", "magnitude")
METHODS = (OURS, MASKS, "paper", *REFITTED, *_AT_ONCE, "random")
UNREPAIRED = "principal+kl"
SHORTENED = {
    "shorten-ppl": ("--criterion", "ppl"),
    "shorten-taylor": ("--criterion", "taylor"),
    "shorten-magnitude": ("--criterion", "magnitude"),
    "shorten-reverse": ("--criterion", "reverse"),
    "shorten-greedy": ("--criterion", "ppl", "--search", "greedy"),
    "shorten-evolution": ("--criterion", "ppl", "--search", "evolution"),
    "shorten-refitted": ("--criterion", "influence", "--search", "refitted"),
}
"""Whole blocks removed by `shorn shorten` with these flags, refitted and trained as ours is."""
SEARCHED = "searched"
OPTIONAL = (SEARCHED, UNREPAIRED, *SHORTENED)
"""Methods that are known as well, but not run unless they are named."""
_OURS_BEFORE = "principal+refit+kl"
SHORTEN = "shorten"
"""First word of the flags of a variant that `shorn shorten` prunes."""
WARMUP_RATIO = 0.1
"""Of learning masks, and of training after the peers' pruning."""
STAGE_FOLDERS = ("text", "tokens", "source", "logs", "dead-units")
"""What a comparison keeps in its output folder beside a folder for each target."""
_PUBLISHED = ("--basis", "source", "--norm-scale", "live")
_SHEAR = ("shear", ShearConfig)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]*")
_EQUAL_FLAGS = (
    *("source", "target", "model", "data", "output", "domain-weights", "seed", "precision"),
    *("seq-len", "global-batch", "micro-batch"),
)
"""What the comparison gives all methods alike, or takes care of: no variant may change it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Compare pruning methods on one model at equal tokens. Resumable."""

    ESSENTIAL: ClassVar = (
        "source input output json methods variant pruned targets seeds jobs shear-steps cpt-steps"
    )

    source: Annotated[str, ON_DISK]
    """Model to prune: a Hugging Face folder or hub id."""
    input: Annotated[tuple[str, ...], ON_DISK]
    """Documents with domains, as for `shorn tokenize`."""
    output: Annotated[str, ON_DISK] = "runs/compare"
    """Folder of everything this makes."""
    json: Annotated[str | None, ON_DISK] = None
    """Write the table to this file, anew after every finished run."""
    methods: tuple[str, ...] = METHODS
    """ours: cut at once in the basis of principal components, refitted on the sequences it is then
    trained on, and distilled from the source; masks: learned by projection, with the weights, and
    distilled; paper: learned by Sheared LLaMA's rule; blocks: whole blocks removed at once;
    activation, magnitude: the same shape cut at once, by strength of activations or norm of
    weights; activation+kl, blocks+kl: those distilled from the source; activation+refit+kl,
    blocks+refit+kl: refitted and trained as ours is; random: that shape trained from scratch;
    searched: as ours, in the best shape that a search finds with as many parameters outside
    embeddings (pruner.shear --propose search); principal+kl: ours without its refit; shorten-ppl,
    shorten-taylor, shorten-magnitude, shorten-reverse, shorten-greedy, shorten-evolution,
    shorten-refitted: whole blocks removed by `shorn shorten`, refitted and trained as ours is."""
    variant: tuple[str, ...] = ()
    """Further methods as NAME=FLAGS: ours with these flags of pruner.shear and, after a |, of
    launch/cpt.py; --steps N learns masks for N steps and leaves the others to training, and {seed}
    stands for the seed. NAME=shorten FLAGS: pruned by `shorn shorten` with these, which say how
    much goes."""
    pruned: tuple[str, ...] = ()
    """Models that other programs have pruned, as TARGET/NAME=FOLDER: they are trained as ours is,
    and measured beside what is made for that target."""
    targets: tuple[str, ...] = ("half", "quarter")
    """Shapes as NAME=SIZES, or half and quarter, which fit SmolLM2-135M."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of data order and masks."""
    jobs: int = 1
    """Stages run at once."""
    threads: int | None = None
    """CPU threads of a stage. Default: one where several run at once, else all cores."""
    dead_units: bool = False
    """Instead of comparing losses, shear under both rules and count kept units that are not on."""
    sparsities: tuple[float, ...] = (0.5, 0.75, 0.95)
    """With --dead-units: fraction of the units that is removed of every unit kind."""
    domain_weights: str = "c4=0.6,stackexchange=0.25,github=0.15"
    """Domains and their share of the training tokens; documents of others are left out."""
    held_out_documents: int = 60
    """First documents of each domain, kept for measuring."""
    train_documents: int = 340
    """Documents of each domain after those, for training."""
    sequences: int = 24
    """Held-out sequences measured per domain."""
    text: Annotated[str | None, ON_DISK] = None
    """UTF-8 text on which trained models and the source are measured as well, as one document in
    windows of 2,048 tokens; or a set of publications: wikitext2, ptb, c4."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval, or sets of them, on which trained models and the source are measured as
    well, as by `shorn evaluate`."""
    task_files: Annotated[str | None, ON_DISK] = None
    """Folder of further task files for lm-eval."""
    limit: int | None = None
    """Questions of each of --tasks, the first ones. Default: all."""
    seq_len: int = 256
    """Tokens per sequence."""
    batch: int = 2
    """Sequences per step."""
    shear_steps: int = 64
    """Steps of mask learning; methods that cut at once train that much longer instead."""
    cpt_steps: int = 96
    """Steps of continued pre-training after them."""
    ours_lr: float = 5e-4
    """Learning rate of ours, of masks and of what is refitted; masks hold it from shearing on into
    training, where it falls."""
    shear_lr: float = 3e-4
    """Peak learning rate while shearing by Sheared LLaMA's rule."""
    cpt_lr: float = 6e-4
    """Peak learning rate of continued pre-training after other methods."""
    random_lr: float = 1e-3
    """Peak learning rate from scratch."""
    precision: Precision = "bf16"
    """Compute precision. auto: bf16 on a GPU, fp32 on a CPU."""

    def __post_init__(self) -> None:
        counts = ("shear_steps", "cpt_steps", "sequences", "batch", "jobs", "held_out_documents")
        require_at_least(self, 1, *counts, "train_documents", "limit")
        require_threads(self.threads)
        require_at_least(self, 2, "seq_len", why=" (a token and its successor)")
        for name in ("ours_lr", "shear_lr", "cpt_lr", "random_lr"):
            rate = getattr(self, name)
            limit = "above 0 and finite, such as 3e-4"
            require(math.isfinite(rate) and rate > 0, name, rate, limit)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds {list(self.seeds)}: give at least one, and each once")
        outside = [value for value in self.sparsities if not 0 < value < 1]
        if outside:
            raise InputError(f"--sparsities {outside[0]}: must lie between 0 and 1, such as 0.5")
        if not self.sparsities or len(set(self.sparsities)) < len(self.sparsities):
            raise InputError(
                f"--sparsities {list(self.sparsities)}: give at least one, and each once"
            )
        if not any(parse_values(self.domain_weights, "--domain-weights").values()):
            raise InputError(
                f"--domain-weights {self.domain_weights!r}: the weights sum to 0; give one above 0"
            )
        methods_of(self)
        pruned_of(self)

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        of_tasks = ("task_files", "limit")
        if not self.dead_units:
            found = {"sparsities": "only --dead-units removes fractions of the units"}
            why = "there are no --tasks to measure on"
            return found if self.tasks else found | dict.fromkeys(of_tasks, why)
        losses = ("methods", "variant", "pruned", "targets", "sequences", "text", "tasks")
        training = ("cpt_steps", "ours_lr", "cpt_lr", "random_lr")
        return dict.fromkeys((*losses, *of_tasks, *training), "--dead-units compares no losses")

    @property
    def domains(self) -> list[str]:
        """Names of the domains."""
        return list(parse_values(self.domain_weights, "--domain-weights"))

    @property
    def steps(self) -> int:
        """Training steps of every method."""
        return self.shear_steps + self.cpt_steps


@dataclass(frozen=True, slots=True)
class Method:
    """How one row of the table is made. All methods train for the same number of steps in all."""

    name: str
    shear_steps: int
    """Of them, steps of mask learning; 0 cuts at once."""
    shear_flags: tuple[str, ...] = ()
    cpt_flags: tuple[str, ...] = ()
    seeded: bool = True
    """Whether pruning depends on the seed; otherwise all seeds share it."""
    whole_blocks: bool = False
    """Remove whole blocks, to about as many parameters as the target has."""
    searched: bool = False
    """Prune to the best shape of as many parameters without embeddings, instead of the target's."""
    shorten_flags: tuple[str, ...] | None = None
    """Flags of pruner.shorten, which then prunes; None: pruner.shear does. They say how much goes,
    where `whole_blocks` does not."""
    folder: str | None = None
    """Model that another program has pruned; None: one of ours prunes."""
    random: bool = False
    """Train the shape from scratch instead of the pruned weights."""
    prunes_as: str | None = None
    """Name of the method whose pruned models this one starts from; None: its own."""
    warmup: float | None = WARMUP_RATIO
    """--warmup-ratio of training after pruning; None: the command's default, which is none after
    moments."""


def methods_of(config: CompareConfig) -> list[Method]:
    """The methods that `config` names. Raises InputError for unknown, repeated or bad ones."""
    rate = ("--lr", str(config.ours_lr))
    ours = Method(OURS, 0, rate, rate, warmup=None)
    masks = replace(ours, name=MASKS, shear_steps=config.shear_steps)
    methods = (ours, masks, *_peers(config), *_refitted(config, ours))
    made = {method.name: method for method in methods}
    known = {name: made[name] for name in (*METHODS, *OPTIONAL)}
    found: list[Method] = []
    for name in config.methods:
        if name not in known:
            _refuse_commas("--methods", config.methods, known)
            if name == _OURS_BEFORE:
                raise InputError(f"--methods {name}: is called {OURS} now")
            raise InputError(f"--methods {name}: unknown; known are {', '.join(known)}")
        found.append(known[name])
    found += [_variant(text, ours, config.steps) for text in config.variant]
    names = [method.name for method in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two methods are called {name!r}: give each name once")
    if not found:
        raise InputError(f"no method to compare: give --methods, some of {', '.join(known)}")
    return found


def _refuse_commas(flag: str, words: Sequence[str], known: Collection[str]) -> None:
    """Raises InputError where commas stand between `known` names."""
    names = " ".join(words).replace(",", " ").split()
    if names != list(words) and all(name in known for name in names):
        raise InputError(
            f"{flag} {' '.join(words)}: names are separated by spaces: {flag} {' '.join(names)}"
        )


def _peers(config: CompareConfig) -> list[Method]:
    """The other methods, as they were published, and two of them distilled."""
    distilled, alone = ("--teacher", config.source), ("--distill-weight", "0")
    blocks = Method("blocks", 0, ("--no-refit",), alone, seeded=False, whole_blocks=True)
    published = (*_PUBLISHED, "--no-refit")
    activation = Method("activation", 0, ("--init", "importance", *published), alone, seeded=False)
    return [
        Method("paper", config.shear_steps, ("--rule", "paper"), ("--no-moments",)),
        blocks,
        replace(blocks, name="blocks+kl", cpt_flags=distilled, prunes_as="blocks"),
        activation,
        replace(activation, name="activation+kl", cpt_flags=distilled, prunes_as="activation"),
        Method("magnitude", 0, ("--init", "magnitude", *published), alone, seeded=False),
        replace(activation, name="random", cpt_flags=(), random=True, prunes_as="activation"),
    ]


def _refitted(config: CompareConfig, ours: Method) -> list[Method]:
    """Peers with ours' repair and training, and ours without its repair. A refit depends on the
    seed, because it reads the sequences that training draws."""
    activation, blocks = REFITTED
    training = (*ours.cpt_flags, "--teacher", config.source)
    search = (*ours.shear_flags, "--propose", "search")
    known = [
        Method(SEARCHED, 0, search, searched=True),
        Method(activation, 0, ("--init", "importance", *_PUBLISHED)),
        Method(blocks, 0, whole_blocks=True),
        Method(UNREPAIRED, 0, ("--no-refit",), seeded=False),
        *(
            Method(name, 0, whole_blocks=True, shorten_flags=flags)
            for name, flags in SHORTENED.items()
        ),
    ]
    return [replace(method, cpt_flags=training, warmup=None) for method in known]


def _variant(text: str, ours: Method, steps: int) -> Method:
    name, equals, flags = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise InputError(
            f"--variant {text!r} is not NAME=FLAGS: write for example 'taylor=--init taylor'"
        )
    pruning, _, cpt = flags.partition("|")
    try:
        words, cpt_words = shlex.split(pruning), shlex.split(cpt)
    except ValueError as error:
        raise InputError(f"--variant {text!r}: {error}; quote it as for a shell") from None
    shortens = words[:1] == [SHORTEN]
    words = words[1:] if shortens else words
    _require_options(text, words, *((SHORTEN, ShortenConfig) if shortens else _SHEAR))
    _require_options(text, cpt_words, "cpt", CptConfig)
    if "steps" in map(_option, cpt_words):
        raise InputError(
            f"--variant {text!r}: training takes what shearing leaves of {steps} steps; give "
            "--steps N before the | only"
        )
    # The last of two equal options counts.
    varied = replace(ours, name=name, cpt_flags=(*ours.cpt_flags, *cpt_words))
    if shortens:
        if not {"remove", "ratio", "params"} & set(map(_option, words)):
            raise InputError(
                f"--variant {text!r}: says not how much goes; add --remove 6, --ratio 0.2 or "
                "--params 70m before the |"
            )
        return replace(varied, shear_flags=(), shorten_flags=tuple(words))
    learned, others = _learned_steps(text, words, steps)
    if learned is not None:
        varied = replace(varied, shear_steps=learned)
    return replace(varied, shear_flags=(*ours.shear_flags, *others))


def _require_options(text: str, words: Sequence[str], command: str, config: type) -> None:
    """Raises InputError for options that `shorn COMMAND` lacks, and for those that all methods
    share."""
    options = all_options(config)
    known = {option.flag[2:] for option in options}
    known |= {f"no-{option.flag[2:]}" for option in options if option.type is bool}
    for option in filter(None, map(_option, words)):
        if option in _EQUAL_FLAGS:
            raise InputError(
                f"--variant {text!r}: --{option} is the comparison's to set, because every method "
                "must get the same; leave it out"
            )
        if option not in known:
            raise InputError(
                f"--variant {text!r}: `shorn {command}` has no --{option}; "
                f"`shorn {command} --help-all` shows its options"
            )


def _learned_steps(text: str, words: Sequence[str], steps: int) -> tuple[int | None, list[str]]:
    """The value of --steps among the flags of shearing, None without one, and the other flags."""
    found, others = None, []
    remaining = iter(words)
    for word in remaining:
        if _option(word) != "steps":
            others.append(word)
            continue
        value = word.partition("=")[2] if "=" in word else next(remaining, "")
        if not value.isdecimal() or int(value) >= steps:
            raise InputError(
                f"--variant {text!r}: --steps {value} must be a number from 0 to {steps - 1}, "
                f"because shearing and training take {steps} steps together"
            )
        found = int(value)
    return found, others


def pruned_of(config: CompareConfig) -> dict[str, list[Method]]:
    """For every target the models of --pruned. Raises InputError for what is not
    TARGET/NAME=FOLDER, and for names that another row of the target has."""
    found: dict[str, list[Method]] = {target: [] for target in targets_of(config)}
    methods = methods_of(config)
    training = ("--lr", str(config.ours_lr), "--teacher", config.source)
    for text in config.pruned:
        place, _, folder = text.partition("=")
        target, _, name = place.partition("/")
        if not folder or not _NAME.fullmatch(name):
            raise InputError(
                f"--pruned {text!r} is not TARGET/NAME=FOLDER: write for example "
                f"{next(iter(found))}/theirs=models/theirs"
            )
        if target not in found:
            raise InputError(
                f"--pruned {text!r}: the targets are {', '.join(found)}, and {target!r} is none of "
                "them: name one of these, or add it to --targets"
            )
        if any(name == other.name for other in (*methods, *found[target])):
            raise InputError(f"--pruned {text!r}: {target} has a row {name!r}: use another name")
        folder = home_expanded(folder, "--pruned")
        method = Method(name, 0, cpt_flags=training, seeded=False, warmup=None, folder=folder)
        found[target].append(method)
    return found


def _option(word: str) -> str:
    """The option that a word of a command line names; other words name none."""
    return word.partition("=")[0][2:].replace("_", "-") if word.startswith("--") else ""


def targets_of(config: CompareConfig) -> dict[str, str]:
    """Shapes as --target takes them, by name. Raises InputError for bad or repeated names."""
    found: dict[str, str] = {}
    for text in config.targets:
        name, _, sizes = text.partition("=")
        if name.lower().replace("_", "-") in BUDGETS:
            raise budget_error("--targets", text)
        refuse_budget("--targets", sizes)
        _refuse_commas("--targets", config.targets, TARGETS)
        if not sizes and name not in TARGETS:
            raise InputError(
                f"--targets {text!r} is neither {' nor '.join(TARGETS)} nor NAME=SIZES: write for "
                f"example small={TARGETS['half']}"
            )
        if name.lower() in STAGE_FOLDERS:
            raise InputError(
                f"--targets {text!r}: the comparison keeps its own in {name}/, which a target of "
                "that name would share; choose another name"
            )
        if not _NAME.fullmatch(name) or name in found:
            raise InputError(f"--targets {text!r}: the name {name!r} is not usable, or given twice")
        found[name] = sizes or TARGETS[name]
    if not found:
        raise InputError(f"no target: give --targets, such as {' '.join(TARGETS)}")
    return found
