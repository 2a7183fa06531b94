"""Options of a comparison: which methods and targets they name, and what is refused."""

from typing import Any

import pytest

from data.errors import InputError
from launch.compare.config import (
    METHODS,
    TARGETS,
    CompareConfig,
    Method,
    methods_of,
    pruned_of,
    targets_of,
)


def configure(**options: Any) -> CompareConfig:
    return CompareConfig(source="model", input=("text",), **options)


def test_every_method_trains_for_the_same_number_of_steps() -> None:
    config = configure(shear_steps=3, cpt_steps=4)
    methods = {method.name: method for method in methods_of(config)}
    assert tuple(methods) == METHODS and config.steps == 7
    assert {name: method.shear_steps for name, method in methods.items()} == {
        "ours": 0,
        "masks": 3,
        "paper": 3,
        "activation+refit+kl": 0,
        "blocks+refit+kl": 0,
        "blocks": 0,
        "blocks+kl": 0,
        "activation": 0,
        "activation+kl": 0,
        "magnitude": 0,
        "random": 0,
    }
    assert methods["paper"].shear_flags == ("--rule", "paper")
    published = ("--basis", "source", "--norm-scale", "live")
    for name, start in (("activation+kl", "activation"), ("random", "activation")):
        assert methods[name].prunes_as == start
        assert methods[name].shear_flags == methods[start].shear_flags
        assert methods[name].shear_flags == ("--init", "importance", *published, "--no-refit")
    with_teacher = {name for name, method in methods.items() if "--teacher" in method.cpt_flags}
    # Shearing by projection, and a refit, leave training the source as its teacher.
    assert with_teacher == {name for name in METHODS if name.endswith("+kl")}
    for name in ("ours", "masks"):
        assert methods[name].shear_flags == methods[name].cpt_flags == ("--lr", "0.0005")
    for name in ("ours", "masks", "activation+refit+kl", "blocks+refit+kl"):
        assert methods[name].cpt_flags[:2] == ("--lr", "0.0005") and methods[name].warmup is None
        assert "--no-refit" not in methods[name].shear_flags
    # As published.
    assert methods["paper"].cpt_flags == ("--no-moments",) and methods["paper"].warmup == 0.1


def test_variants_are_ours_with_other_flags() -> None:
    variants = ("taylor=--init taylor", "late=--steps 2 --mask-lr 1|--lr 3e-4 --eps {seed}")
    found = methods_of(configure(methods=(), variant=variants, shear_steps=5))
    rate = ("--lr", "0.0005")
    late = (*rate, "--lr", "3e-4", "--eps", "{seed}")
    assert found == [
        Method("taylor", 0, (*rate, "--init", "taylor"), rate, warmup=None),
        Method("late", 2, (*rate, "--mask-lr", "1"), late, warmup=None),
    ]
    (joined,) = methods_of(configure(methods=(), variant=("late=--steps=0 --init=flat",)))
    assert joined == Method("late", 0, (*rate, "--init=flat"), rate, warmup=None)


@pytest.mark.parametrize("flags", ["--bogus 3", "|--mask-lr 1", "--teacher x", "--no-init"])
def test_variants_have_options_of_their_commands(flags: str) -> None:
    with pytest.raises(InputError, match=r"`shorn (shear|cpt)` has no --.* --help-all` shows"):
        methods_of(configure(methods=(), variant=(f"late={flags}",)))
    methods_of(configure(methods=(), variant=("late=--no-compact --mask-lr 1|--mixture-clip",)))


def test_variants_may_be_shortened() -> None:
    variant = ("apart=shorten --units both --remove 3|--lr 3e-4",)
    (found,) = methods_of(configure(methods=(), variant=variant))
    assert found.shorten_flags == ("--units", "both", "--remove", "3")
    assert found.cpt_flags == ("--lr", "0.0005", "--lr", "3e-4")
    assert not found.shear_flags and not found.shear_steps and not found.whole_blocks


def test_pruned_models_belong_to_a_target() -> None:
    found = pruned_of(configure(targets=("half", "small=layers=2"), pruned=("small/a=models/b=c",)))
    assert found["half"] == [] and [one.name for one in found["small"]] == ["a"]
    (method,) = found["small"]
    assert method.folder == "models/b=c" and method.cpt_flags[-2:] == ("--teacher", "model")


def test_targets_are_named_shapes() -> None:
    found = targets_of(configure(targets=("half", "small=layers=2,hidden=24")))
    assert found == {"half": TARGETS["half"], "small": "layers=2,hidden=24"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"methods": ("best",)},
            r"--methods best: unknown; known are ours, masks, paper, activation\+refit",
        ),
        ({"methods": ("principal+refit+kl",)}, r"refit\+kl: is called ours now"),
        ({"methods": ("ours", "ours")}, r"two methods are called 'ours'"),
        ({"variant": ("paper=--init flat",)}, r"two methods are called 'paper'"),
        ({"methods": ()}, r"no method to compare"),
        ({"domain_weights": "c4=inf,github=1"}, r"--domain-weights .*'c4=inf' is not"),
        ({"domain_weights": "c4"}, r"--domain-weights 'c4'"),
        ({"variant": ("taylor",)}, r"--variant 'taylor' is not NAME=FLAGS"),
        ({"variant": ("a/b=--init flat",)}, r"is not NAME=FLAGS"),
        ({"variant": ("x=--steps 160",)}, r"--steps 160 must be a number from 0 to 159"),
        ({"variant": ("x=--steps",)}, r"--steps  must be a number"),
        ({"variant": ("x=--steps=160",)}, r"--steps 160 must be a number from 0 to 159"),
        ({"variant": ("x=--init flat|--steps 3",)}, r"give --steps N before the \| only"),
        ({"variant": ("x=--seed 10{seed}",)}, r"--seed is the comparison's to set"),
        ({"variant": ("x=|--global_batch=4",)}, r"--global-batch is the comparison's to set"),
        ({"variant": ("x=--init 'flat",)}, r"--variant \"x=--init 'flat\": No closing quotation"),
        ({"targets": ("params=10k",)}, r"--targets 'params=10k': budgets are resolved by pruner"),
        ({"targets": ("a=speedup=2",)}, r"--targets 'speedup=2': budgets are resolved by pruner"),
        ({"targets": ("third",)}, r"'third' is neither half nor quarter nor NAME=SIZES"),
        ({"targets": ("half", "half=layers=2")}, r"the name 'half' is not usable, or given"),
        ({"targets": ("half,quarter",)}, r"--targets half,quarter: .*: --targets half quarter$"),
        ({"methods": ("ours,paper",)}, r"--methods ours,paper: .*: --methods ours paper$"),
        ({"methods": ("ours,", "paper")}, r"--methods ours, paper: .*: --methods ours paper$"),
        ({"targets": ("source=layers=2",)}, r"keeps its own in source/, .*choose another name"),
        ({"targets": ("Text=layers=2",)}, r"keeps its own in Text/"),
        ({"targets": ()}, r"no target"),
        ({"variant": ("x=shorten --remove 3 --bogus",)}, r"`shorn shorten` has no --bogus"),
        ({"variant": ("x=shorten --units both",)}, r"says not how much goes; add --remove 6"),
        ({"variant": ("x=shorten --seed 1",)}, r"--seed is the comparison's to set"),
        ({"pruned": ("theirs=models/a",)}, r"not TARGET/NAME=FOLDER: write .* half/theirs="),
        ({"pruned": ("half/theirs=",)}, r"not TARGET/NAME=FOLDER"),
        ({"pruned": ("third/a=b",)}, r"the targets are half, quarter, and 'third' is none"),
        ({"pruned": ("half/paper=b",)}, r"half has a row 'paper': use another name"),
        ({"pruned": ("half/a=b", "half/a=c")}, r"half has a row 'a': use another name"),
        ({"seeds": ()}, r"--seeds \[\]"),
        ({"seeds": (1, 1)}, r"--seeds \[1, 1\]"),
        ({"sparsities": (0.5, 95.0)}, r"--sparsities 95.0: must lie between 0 and 1"),
        (
            {"sparsities": (0.5, 0.5)},
            r"--sparsities \[0.5, 0.5\]: give at least one, and each once",
        ),
        ({"sparsities": ()}, r"--sparsities \[\]: give at least one"),
        ({"domain_weights": "c4=0,github=0"}, r"--domain-weights .*: the weights sum to 0"),
        ({"shear_steps": 0}, r"--shear-steps 0: must be at least 1"),
        ({"jobs": 0}, r"--jobs 0"),
        ({"seq_len": 1}, r"--seq-len 1: must be at least 2"),
        ({"threads": 0}, r"--threads 0: must be at least 1"),
        ({"threads": 5000}, r"--threads 5000: must be at least 1, and at most 1024"),
        ({"cpt_lr": 0.0}, r"--cpt-lr 0.0: must be above 0 and finite"),
        ({"random_lr": float("nan")}, r"--random-lr nan: must be above 0 and finite"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        configure(**options)
