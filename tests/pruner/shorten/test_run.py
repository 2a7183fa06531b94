"""Whole runs of shortening: what they write, how they resume and what they refuse."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.cli import all_options
from data.errors import InputError
from pruner.config import RefitConfig
from pruner.divergence import PARTS
from pruner.refitted import RefittedDivergence
from pruner.run import shear
from pruner.shapes import parse_target, shape_of
from pruner.shorten import run as run_module
from pruner.shorten.__main__ import main
from pruner.shorten.config import ShortenConfig
from pruner.shorten.run import shorten
from tests.distributed import run_ranks
from tests.factories import write_model, write_tokens
from trainer.models.hf import load_config, load_model
from trainer.run import pretrained

LAYERS = 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    model = write_model(root / "model", num_hidden_layers=LAYERS, initializer_range=0.2)
    write_tokens(root / "tokens", model, number=40)
    return root


def configure(inputs: Path, output: Path, **options: Any) -> ShortenConfig:
    defaults: dict[str, Any] = {
        "source": str(inputs / "model"),
        "data": str(inputs / "tokens"),
        "output": str(output),
        "remove": 2,
        "protect_first": 1,
        "protect_last": 1,
        "sequences": 5,
        "seq_len": 32,
        "eval_sequences": 2,
        "precision": "fp32",
        "threads": 1,
        "refit": RefitConfig(refit_sequences=8, refit_held_out=4),
    }
    return ShortenConfig(**defaults | options)


def report_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "shear.json").read_text())
    return found


@pytest.mark.parametrize(
    "criterion", ["ppl", "taylor", "magnitude", "influence", "angular", "reverse", "random"]
)
def test_blocks_of_least_score_go(criterion: Any, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shorten(
        configure(inputs, output, criterion=criterion, refit=RefitConfig(refit=False)),
    )
    report = report_of(output)
    told = report["selection"]
    assert told["init"] == criterion and told["search"] == "one-shot"
    assert sorted(told["order"]) == list(range(LAYERS)) and told["protected"] == [0, 4]
    removed = told["removed"]
    if criterion == "angular":
        assert removed in ([1, 2], [2, 3])
    else:
        assert removed == sorted([index for index in told["order"] if 0 < index < 4][:2])
    assert (told["intervals"] is None) == (criterion not in ("ppl", "influence", "angular"))
    assert report["target_shape"]["layers"] == 3
    assert report["parameters"]["target"] == load_config(output / "model").num_parameters()
    kept = [index for index in range(LAYERS) if index not in removed]
    source = load_file(inputs / "model" / "model.safetensors")
    for name, tensor in load_file(output / "model" / "model.safetensors").items():
        for number, index in enumerate(kept):
            if f"layers.{number}." in name:
                assert torch.equal(
                    tensor, source[name.replace(f"layers.{number}.", f"layers.{index}.")]
                )
    # What is removed is what the result of shearing says, too.
    masks = load_file(output / "masks.safetensors")
    assert masks["kept.layer"][0].tolist() == kept


def test_a_run_is_refitted_and_copied(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shorten(configure(inputs, tmp_path / "out", json=str(tmp_path / "copy.json")))
    report = report_of(tmp_path / "out")
    assert json.loads((tmp_path / "copy.json").read_text()) == report
    assert report["refit"]["sequences"] == 8 and report["refit"]["held_out_sequences"] == 4
    assert report["parameters"]["target"] < report["parameters"]["source"]
    printed = capsys.readouterr().out
    assert "scoring 5 blocks by ppl; 2 of the 3 that are not protected will go" in printed
    assert "removed: blocks" in printed and "shorn cpt --model" in printed


@pytest.mark.parametrize("then", ["ffn=24", "hidden=16,heads=2,kv-heads=1"])
def test_other_sizes_are_cut_behind_the_blocks(then: str, inputs: Path, tmp_path: Path) -> None:
    """Blocks by their own criterion, the rest as a run of shearing to the same sizes cuts it."""
    config = configure(inputs, tmp_path / "out", criterion="reverse", then=then)
    shorten(config)
    report, masks = report_of(tmp_path / "out"), load_file(tmp_path / "out" / "masks.safetensors")
    assert report["selection"]["removed"] == [2, 3] and report["selection"]["then"] == then
    assert masks["kept.layer"][0].tolist() == [0, 1, 4]
    shape = parse_target(f"layers=3,{then}", shape_of(load_config(inputs / "model")))
    assert shape_of(load_config(tmp_path / "out" / "model")) == shape
    assert report["refit"]["kept"] in (True, False)
    shear(replace(config.shearing({"layers": 3}), output=str(tmp_path / "sheared")))
    others = load_file(tmp_path / "sheared" / "masks.safetensors")
    assert others.keys() == masks.keys()
    for name, tensor in masks.items():
        if not name.endswith(".layer"):
            assert torch.equal(tensor, others[name])


def test_sets_are_compared_after_a_refit(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"criterion": "random", "search": "refitted", "then": "ffn=32"}
    config = configure(inputs, tmp_path / "out", **options, generations=4, offspring=3)
    shorten(config)
    told = report_of(tmp_path / "out")["selection"]
    assert told["search"] == "refitted"
    found = told["divergence"]
    assert found["after"] <= found["before"] and found["refits"] > 3
    # The best of all three sets, as they are measured apart.
    own = replace(config, output=str(tmp_path / "apart"))
    fitness = run_module.Scorer(own, run_module._open(own)[0], context())._refits()
    sets = {pair: fitness.of(pair, PARTS) for pair in itertools.combinations(range(1, 4), 2)}
    assert len(set(sets.values())) == 3
    assert tuple(told["removed"]) == min(sets, key=lambda pair: sets[pair])
    assert found["after"] == pytest.approx(min(sets.values()), rel=1e-5)
    # What is known is not measured again.
    (tmp_path / "out" / "shear.json").unlink()
    for path in (tmp_path / "out" / "scores").glob("chosen-*"):
        path.unlink()
    monkeypatch.setattr(RefittedDivergence, "_measure", None)
    shorten(config)
    assert report_of(tmp_path / "out")["selection"]["removed"] == told["removed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"then": "layers=3"}, r"--then layers=3: how many blocks go is for --remove"),
        ({"then": "1.3b"}, r"--then 1.3b: how many blocks go is for --remove"),
        ({"then": "ffn"}, r"--then ffn: 'ffn' is not key=size with a key of hidden, heads"),
        ({"then": "params=20k"}, r"'params=20k' is not key=size .*; write for example ffn=832"),
        ({"then": ""}, r"--then : '' is not key=size"),
        ({"then": "ffn=many"}, r"--then ffn=many: .* not a whole number"),
        ({"then": "ffn=4096"}, r"--then ffn=4096: target ffn=4096 is outside 1\.\.48"),
        ({"then": "ffn=48"}, r"--then ffn=48: is what the source has; make one of the sizes"),
        ({"search": "refitted", "refit": RefitConfig(refit=False)}, r"--no-refit: --search refit"),
    ],
)
def test_sizes_and_searches_that_cannot_be_had(
    options: dict[str, Any], message: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        shorten(configure(inputs, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("criterion", ["ppl", "magnitude"])
def test_a_finished_run_is_not_scored_again(
    criterion: Any, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(inputs, tmp_path / "out", criterion=criterion)
    shorten(config)
    before = (tmp_path / "out" / "shear.json").read_bytes()
    monkeypatch.setattr(run_module, "build_model", None)
    shorten(config)
    assert (tmp_path / "out" / "shear.json").read_bytes() == before
    changes: list[tuple[dict[str, Any], str]] = [
        ({"criterion": "reverse"}, rf"--criterion was '{criterion}', now 'reverse'[^-]*Repeat"),
        ({"remove": 1}, r"--remove was 2, now 1\. Repeat"),
        ({"then": "ffn=32"}, r"--then was not given, now 'ffn=32'"),
        ({"protect_first": 0}, r"--protect-first was 1, now 0"),
        ({"refit": RefitConfig(refit_ridge=0.5)}, r"--refit-.* was "),
    ]
    if criterion == "ppl":
        changes.append(({"search": "greedy"}, r"--search was 'one-shot', now 'greedy'"))
        changes.append(({"sequences": 7}, r"--sequences was 5, now 7"))
    for other, message in changes:
        with pytest.raises(InputError, match=message):
            shorten(configure(inputs, tmp_path / "out", **{"criterion": criterion} | other))


def test_ranks_remove_the_same(inputs: Path, tmp_path: Path) -> None:
    for name, world in (("alone", 1), ("two", 2)):
        config = configure(inputs, tmp_path / name, refit=RefitConfig(refit=False))
        run_ranks(shorten, world, config)
    own, other = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("alone", "two")
    )
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, other[name])


def test_greedy_scores_what_is_left_anew(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = configure(inputs, output, search="greedy", refit=RefitConfig(refit=False))
    shorten(config)
    told = report_of(output)["selection"]
    assert told["search"] == "greedy" and len(told["removed"]) == 2
    first, second = told["removed_in_order"]
    assert first == next(index for index in told["order"] if 0 < index < 4)
    # The second round's scores are those of models without both.
    ids = run_module.Scorer(config, run_module._open(config)[0], context()).sequences

    def loss(removed: set[int]) -> float:
        model = load_model(inputs / "model")
        layers = model.get_submodule(model.names.blocks)
        kept = [block for index, block in enumerate(layers.children()) if index not in removed]
        model._place(model.names.blocks, torch.nn.ModuleList(kept))
        with torch.no_grad():
            logits = model(ids)[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()

    others = {index: loss({first, index}) for index in range(1, 4) if index != first}
    assert second == min(others, key=lambda index: others[index])


def context() -> Any:
    from trainer import parallel

    return parallel.init(threads=1)


def test_a_source_is_loaded_once_where_greedy_goes_on(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []

    def counted(folder: Path) -> Any:
        loads.append(folder)
        return pretrained(folder)

    monkeypatch.setattr(run_module, "pretrained", counted)
    config = configure(inputs, tmp_path / "out", search="greedy", refit=RefitConfig(refit=False))
    shorten(config)
    assert len(loads) == 1 and len(list((tmp_path / "out" / "scores").glob("losses-*"))) == 2


def test_a_search_is_no_worse_than_its_start(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options: dict[str, Any] = {"search": "evolution", "generations": 3, "offspring": 2}
    shorten(configure(inputs, output, criterion="reverse", **options))
    told = report_of(output)["selection"]
    assert told["init"] == "reverse" and told["search"] == "evolution"
    assert told["divergence"]["start"] == [2, 3]
    assert told["divergence"]["after"] <= told["divergence"]["before"]
    assert told["divergence"]["sequences_computed"] > 0 and set(told["removed"]) <= {1, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove": None}, r"nothing says how much to remove: give one of --remove 6"),
        ({"ratio": 0.2}, r"--remove 2 and --ratio 0.2 says how much"),
        ({"remove": None, "ratio": 1.5}, r"--ratio 1.5: must be between 0 and 1"),
        ({"remove": 0}, r"--remove 0: must be at least 1"),
        ({"protect_first": -1}, r"--protect-first -1: must be at least 0"),
        ({"search": "greedy", "criterion": "taylor"}, r"--search greedy: scores anew by --crit"),
        ({"seq_len": 1}, r"--seq-len 1: must be at least 2"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        configure(tmp_path, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove": 4}, r"--remove 4: takes 4 of 5 blocks"),
        ({"seq_len": 999}, r"999"),
        ({"domain_weights": "gamma=1"}, r"--domain-weights"),
        ({"source": "/nowhere"}, r"--source /nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(
    options: dict[str, Any],
    message: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_module, "build_model", None)
    with pytest.raises(InputError, match=message):
        shorten(configure(inputs, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_the_command_line(inputs: Path, tmp_path: Path) -> None:
    words = ["--source", str(inputs / "model"), "--data", str(inputs / "tokens"), "--ratio", "0.3"]
    words += ["--criterion", "reverse", "--protect-first", "1", "--protect-last", "0"]
    words += ["--seq-len", "32", "--no-refit", "--output", str(tmp_path / "out"), "--threads", "1"]
    main(words)
    assert report_of(tmp_path / "out")["selection"]["removed"] == [4]


@pytest.mark.parametrize("more", [["--then", "ffn=24"], ["--units", "both"]])
def test_what_is_printed_names_options_that_there_are(
    more: list[str], inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--source", str(inputs / "model"), "--data", str(inputs / "tokens"), "--remove", "2"]
    words += ["--protect-first", "1", "--protect-last", "1", "--seq-len", "32", "--threads", "1"]
    main([*words, *more, "--sequences", "4", "--output", str(tmp_path / "out")])
    captured = capsys.readouterr()
    lines = (captured.out + captured.err).splitlines()
    # Commands that come next have options of their own.
    printed = "\n".join(line for line in lines if "shorn " not in line)
    found = set(re.findall(r"(?<![\w-])--[a-z-]+", printed))
    assert found <= {option.flag for option in all_options(ShortenConfig)}, found
    if more[0] == "--then":
        assert "--sequences" in found


def test_what_is_kept_is_of_this_very_model(inputs: Path, tmp_path: Path) -> None:
    """Scores are not those of the same weights under other settings, and what is told of the choice
    is what this command says."""
    shutil.copytree(inputs / "model", tmp_path / "model")
    config = configure(inputs, tmp_path / "out", source=str(tmp_path / "model"), then="ffn=24")
    shorten(config)
    first = report_of(tmp_path / "out")["selection"]
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"rms_norm_eps": 0.5}))
    for name in ("shear.json", "run.json"):
        (tmp_path / "out" / name).unlink()
    shutil.rmtree(tmp_path / "out" / "model")
    (tmp_path / "out" / "masks.safetensors").unlink()
    (tmp_path / "out" / "source.safetensors").unlink()
    shorten(replace(config, then=None))
    again = report_of(tmp_path / "out")["selection"]
    assert again["intact"] != first["intact"] and "then" not in again
    fresh = tmp_path / "fresh"
    shorten(replace(config, then=None, output=str(fresh)))
    assert report_of(fresh)["selection"]["scores"] == again["scores"]
    # Without the change nothing is scored again.
    shorten(replace(config, then="ffn=32", output=str(fresh / "then")))
    assert report_of(fresh / "then")["selection"]["then"] == "ffn=32"


def test_a_full_disk_is_met_before_anything_is_scored(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.disk.free_bytes", lambda _: 1000)
    monkeypatch.setattr(run_module, "Scorer", None)
    with pytest.raises(InputError, match=r"no room for what this run will write"):
        shorten(configure(inputs, tmp_path / "out"))
