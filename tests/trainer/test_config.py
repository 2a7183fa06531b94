"""Options of a training run: their defaults, and refusals that name the flag."""

import pytest

from data.cli import parse
from data.errors import InputError
from trainer.config import DistillationConfig, TrainConfig, check_layout


def test_defaults_are_the_published_recipe() -> None:
    config = TrainConfig()
    assert (config.global_batch, config.micro_batch, config.seq_len) == (512, 2, 4096)
    assert (config.lr, config.weight_decay, config.beta1, config.beta2) == (1e-4, 0.1, 0.9, 0.95)
    check_layout(config, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "--steps -1: must be at least 0"),
        ({"seq_len": 1}, "--seq-len 1"),
        ({"lr": 0.0}, "--lr 0.0: must be above 0"),
        ({"lr": float("nan")}, "--lr nan: must be a finite number"),
        ({"clip": float("inf")}, "--clip inf: must be a finite number"),
        ({"weight_decay": float("nan")}, "--weight-decay nan: must be a finite number"),
        ({"eps": float("inf")}, "--eps inf: must be a finite number"),
        ({"beta2": 1.0}, "--beta2 1.0"),
        ({"warmup_ratio": 1.5}, "--warmup-ratio 1.5"),
        ({"save_interval": -1}, "--save-interval -1"),
        ({"threads": 0}, "--threads 0"),
        ({"threads": 100_000}, "--threads 100000: must be at least 1, and at most 1024"),
        ({"lr": 1e300}, r"--lr 1e\+300: must be at most 1e\+30"),
        ({"weight_decay": 1e31}, "--weight-decay .*: must be at most"),
        ({"eps": 1e-300}, "--eps 1e-300: must be at least 1e-30"),
        ({"steps": 10**20}, "--steps 1000.*: must be at most 1,000,000,000,000"),
        ({"global_batch": 10**20}, "--global-batch 1000.*: must be at most 16,777,216"),
    ],
)
def test_bad_values_name_the_flag(changes: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({}, 6, r"--global-batch 512 .* 6 ranks; start one of \[1, 2, 4.*--global-batch 510"),
        ({"global_batch": 8}, 16, "use --global-batch 16"),
        (
            {"global_batch": 12, "micro_batch": 4},
            2,
            r"--micro-batch 4 .* 6 sequences.*\[1, 2, 3, 6",
        ),
        ({"replicas": 3}, 8, r"--replicas 3 does not divide 8 ranks; use one of \[1, 2, 4, 8\]"),
    ],
)
def test_impossible_layouts_name_the_remedy(
    changes: dict[str, int], world: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_layout(TrainConfig(**changes), world)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 1.5}, r"--distill-weight 1.5: must be in \[0, 1\]"),
        ({"weight": float("nan")}, "--distill-weight nan"),
        ({"temperature": 0.0}, "--distill-temperature 0.0: must be above 0"),
        ({"temperature": float("inf")}, "--distill-temperature inf"),
        ({"temperature": 1e300}, r"--distill-temperature 1e\+300: must be .*from 0.001 to 1000"),
        ({"temperature": 1e-300}, "--distill-temperature 1e-300: must be above 0"),
        ({"top_k": -1}, "--distill-top-k -1"),
        ({"top_k": 1}, "--distill-top-k 1: must be 0 .* or at least 2"),
    ],
)
def test_bad_distillation_names_the_flag(changes: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistillationConfig(**changes)  # type: ignore[arg-type]


def test_distillation_flags() -> None:
    words = "--distill-weight 0.5 --distill-temperature 2 --distill-top-k 64"
    config = parse(DistillationConfig, section="cpt", argv=words.split())
    assert config == DistillationConfig(weight=0.5, temperature=2.0, top_k=64)
    assert config.kind == "forward-kl"
