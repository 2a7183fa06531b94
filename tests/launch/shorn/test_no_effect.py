"""Options that are given and have no effect beside the others are named, for every command."""

import pytest

from data.cli import parse
from data.idle import idle_options
from data.options import options_of
from data.overrides import SECTIONS
from launch.shorn.commands import COMMANDS

REQUIRED = {
    "tokenize": "--input i --tokenizer t",
    "compare": "--source s --input i --domain-weights a=1",
}
NO_EFFECT = {
    "tokenize --workers 4 --max-bytes-per-domain 9": "--workers 4: --max-bytes-per-domain takes",
    "shear --rule paper --harden 0.5": "--harden 0.5: --rule sheared-llama knows none of it",
    "shear --rule sheared-llama --no-implicit-gradient": "--no-implicit-gradient: --rule",
    "shear --rule paper --mask-noise 0.5": "--mask-noise 0.5: --rule sheared-llama",
    "shear --steps 0 --lr 0.1 --mask-lr 2": "--lr 0.1, --mask-lr 2.0: --steps 0 trains nothing",
    "shear --steps 9 --save-interval 10": "--save-interval 10: it comes after --steps 9",
    "shear --steps 9 --eval-interval 10": "--eval-interval 10: it comes after --steps 9",
    "shear --eval-sequences 0 --eval-interval 1": "--eval-interval 1: --eval-sequences 0 turns",
    "shear --init magnitude --basis source --calibration-sequences 8": "--init magnitude with",
    "shear --reference-losses a=1 --reference-sequences 8": "--reference-losses takes the place",
    "shear --distill-weight 0 --distill-top-k 5": "--distill-top-k 5: --distill-weight 0 has no",
    "cpt --mixture fixed --mixture-floor 0.5": "--mixture-floor 0.5: --mixture fixed moves no",
    "cpt --mixture fixed --no-mixture-clip": "--no-mixture-clip: --mixture fixed",
    "cpt --mixture replay --mixture-history h --mixture-strength 2": "--mixture replay takes the",
    "cpt --mixture fixed --reference-losses a=1": "--reference-losses a=1: --mixture fixed steers",
    "finetune --method full --lora-r 4": "--lora-r 4: --method full has no adapters",
    "finetune --no-head": "--no-head: --method lora has no last blocks to choose",
    "finetune --reference-losses a=1": "--reference-losses a=1: --mixture fixed steers",
    "evaluate --speed --split train --batch 2": "--split train: there is no --data to measure on",
    "evaluate --data d --stride 3 --bos no": "--stride 3, --bos no: there is no --text to score",
    "compare --sparsities 0.5": "--sparsities 0.5: only --dead-units removes",
    "compare --dead-units --methods ours random": "--methods ours random: --dead-units compares",
    "bench-kernels --cpu --archs 90 80": "--archs 90 80: only --static compiles",
    "bench-kernels --static --tokens 5 --csv c": "--tokens 5: only --cpu measures",
}


def said(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    command, *words = line.split()
    config = COMMANDS[command].load_config()
    section = command.replace("-", "_")
    assert section in SECTIONS
    words = [*REQUIRED.get(command, "").split(), *words]
    parse(config, section=section, argv=words)
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize("line", NO_EFFECT)
def test_what_has_no_effect_is_said(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(line, capsys)
    assert "note: no effect of " in text
    assert NO_EFFECT[line] in text


@pytest.mark.parametrize(
    "line",
    [
        "shear --rule paper --mask-lr 2",
        "shear --harden 0.5 --mask-noise 0 --mixture-strength 2",
        "shear --steps 9 --save-interval 9 --eval-interval 3",
        "shear --init magnitude --calibration-sequences 8",
        "cpt --mixture replay --mixture-history h --mixture-interval 3",
        "evaluate --data d --text t --stride 3 --split train",
        "tokenize --workers 4",
        "bench-kernels --cpu --tokens 5",
        "compare --methods ours --cpt-steps 5",
        "demo --cpt-lr 0.1",
        "bench-shear --repeats 3",
    ],
)
def test_nothing_is_said_of_what_counts(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no effect" not in said(line, capsys)


def test_options_of_a_file_and_the_environment_count_as_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHORN_MIXTURE_FLOOR", "0.5")
    assert "no effect of --mixture-floor 0.5" in said("cpt --mixture fixed", capsys)


@pytest.mark.parametrize("line", NO_EFFECT)
def test_only_options_of_the_command_are_named(line: str) -> None:
    command, *words = line.split()
    config = COMMANDS[command].load_config()
    words = [*REQUIRED.get(command, "").split(), *words]
    built: object = parse(config, section=command.replace("-", "_"), argv=words)
    assert idle_options(built).keys() <= {option.name for option in options_of(config)}
