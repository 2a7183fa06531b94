"""`python -m launch.report`: one page without a network, during a run and after it."""

import base64
import hashlib
import json
import re
import shutil
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from data.errors import InputError
from launch.report.__main__ import main
from launch.report.curves import joined, smoothed
from launch.report.lineage import lines_of
from launch.report.masks import COMPONENT, INDEX, step_edges
from launch.report.run_folder import facts, first_step_on_target, mean_loss, read_run
from pruner.history import encode_mask
from pruner.run import shear
from tests.factories import write_model, write_tokens
from tests.pruner.test_run import configure
from tests.trainer.tiny import options, pretrain

VOID = {"meta", "img", "br"}
SHOWN = (
    "Units",
    "Kept units",
    "Units that are on",
    "Distribution of the masks",
    "How units settled",
)
TRAINING = ("Loss", "Domains", "Learning rate and speed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a finished run of shearing, "shear", and one that followed it, "cpt"."""
    root = tmp_path_factory.mktemp("runs")
    model = write_model(root / "model", num_hidden_layers=3)
    write_tokens(root / "tokens", model, number=40)
    shear(configure(root, root / "shear", eval_interval=4))
    pretrain(
        options(steps=3, seq_len=32, eval_interval=2),
        model=root / "shear",
        data=root / "tokens",
        output=root / "cpt",
    )
    return root


class Page(HTMLParser):
    """What a browser would see: tags in order, texts, and tags that do not close properly."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.headings: list[str] = []
        self.wrong: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        self.wrong += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def make(
    tmp_path: Path, *folders: Path, figures: Path | None = None
) -> tuple[Page, dict[str, Any]]:
    """The page about `folders`, and what --json holds."""
    page, numbers = tmp_path / "pages" / "page.html", tmp_path / "pages" / "page.json"
    words = ["--output", str(page), "--json", str(numbers)]
    words += ["--figures", str(figures)] if figures else []
    main([*map(str, folders), *words])
    return Page(page), json.loads(numbers.read_text())


def copy(runs: Path, tmp_path: Path, name: str = "shear") -> Path:
    """A copy of a run that a test may change."""
    return Path(
        shutil.copytree(
            runs / name, tmp_path / name, ignore=shutil.ignore_patterns("model", "checkpoints")
        )
    )


def cut(path: Path, lines: int) -> None:
    """Leaves `lines` lines and half of the next."""
    content = path.read_text().splitlines(keepends=True)
    path.write_text("".join(content[:lines]) + content[lines][:20])


def check_self_contained(page: Page) -> None:
    """Nothing is loaded, nothing runs, and the page's own policy allows what it holds."""
    assert page.source.startswith("<!doctype html>") and not page.wrong
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "svg"}
    attributes = [pair for _, values in page.tags for pair in values.items()]
    assert not [
        name for name, _ in attributes if name.startswith("on") or name in ("href", "style")
    ]
    sources = [value or "" for name, value in attributes if name == "src"]
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert all(base64.b64decode(v.split(",")[1]).startswith(b"\x89PNG") for v in sources)
    assert not re.search(r"https?://|url\(|@import", page.source)
    (style,) = re.findall(r"<style>(.*?)</style>", page.source, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [values["content"] or "" for _, values in page.tags if "http-equiv" in values]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:" and rules["style-src"] == f"'sha256-{digest}'"
    assert page.images and all(image["alt"] and image["width"] for image in page.images)


def test_the_page_of_shearing_and_what_followed(runs: Path, tmp_path: Path) -> None:
    page, numbers = make(tmp_path, runs / "shear", runs / "cpt")
    check_self_contained(page)
    assert set(page.headings) == {"Verdict", *SHOWN, "Multipliers and temperature", *TRAINING}
    report = json.loads((runs / "shear" / "shear.json").read_text())
    first, second = numbers["runs"]
    for key in ("polarised", "alive", "kept_not_alive", "parameters"):
        assert first[key] == report[key], key
    assert first["source"] == report["source_shape"]
    assert first["target"] == report["target_shape"]
    assert report["target"]["layer"] == [2]
    assert (first["finished"], first["step"], first["steps"]) == (True, 8, 8)
    assert first["loss"] == pytest.approx(report["final_loss"])
    assert second["parameters"]["source"] == report["parameters"]["target"]
    assert (second["command"], second["finished"], second["step"]) == ("cpt", True, 3)
    assert numbers["bytes"] == len(page.source.encode())
    sizes = report["parameters"]
    for words in (
        f"{sizes['source']:,} → {sizes['target']:,}",
        "all masks 0 or 1 yes",
        "8 of 8",
        "nonzero, but not on 0 units",
        "FFN channels per layer 3 48 20 20 20 0",
        "Configuration of shear",
    ):
        assert words.replace(" ", "") in page.text.replace(" ", ""), words
    (removed,) = np.flatnonzero(load_file(runs / "shear" / "masks.safetensors")["z.layer"][0] == 0)
    maps = [str(i["alt"]) for i in page.images if str(i["alt"]).startswith("Heat map")]
    assert len(maps) == 2 and all(alt.endswith(f"removed layers: {removed}") for alt in maps)
    assert "Layers marked × were removed whole." in page.text
    assert "Shearing usually gets faster" in page.text and "Not shown" not in page.text
    assert "look removed here" not in page.text
    assert page.text.count("A vertical line marks where one run ends") == len(TRAINING)


def test_the_order_in_which_runs_are_named_does_not_matter(runs: Path, tmp_path: Path) -> None:
    page, numbers = make(tmp_path, runs / "cpt", runs / "shear")
    assert [one["command"] for one in numbers["runs"]] == ["shear", "cpt"]
    assert page.text.index("Shearing: shear") < page.text.index("Continued pre-training: cpt")


def test_pictures_as_files_and_a_baseline_beside_its_run(runs: Path, tmp_path: Path) -> None:
    baseline = copy(runs, tmp_path, "cpt").rename(tmp_path / "scratch_$\\frac{")
    identity = json.loads((baseline / "run.json").read_text())
    (baseline / "run.json").write_text(json.dumps(identity | {"init": "random"}))
    folders = [runs / "shear", runs / "cpt", baseline]
    tokens = [
        [point.tokens for point in c.points]
        for c in joined(lines_of([read_run(f) for f in folders]))
    ]
    assert tokens[0][-1] < tokens[1][0] and tokens[1] == tokens[2]
    page, _ = make(tmp_path, *folders, figures=tmp_path / "pictures")
    assert "scratch_$\\frac{: from random weights" in page.text
    found = {path.stem: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    shown = {heading.lower().replace(" ", "-") for heading in page.headings}
    assert set(found) == shown - {"units", "verdict", "runs-beside-each-other"}
    assert all(content.startswith(b"\x89PNG") for content in found.values())


def test_reports_whose_target_is_a_shape_are_shown_too(runs: Path, tmp_path: Path) -> None:
    folder = copy(runs, tmp_path)
    expected = facts(read_run(folder))
    report = json.loads((folder / "shear.json").read_text())
    report["target"] = report.pop("target_shape")
    (folder / "shear.json").write_text(json.dumps(report))
    assert facts(read_run(folder)) == expected


def test_residual_dimensions_are_counted_in_their_basis(runs: Path, tmp_path: Path) -> None:
    folder = copy(runs, tmp_path)
    identity = json.loads((folder / "run.json").read_text())
    for basis, axis in (("principal", COMPONENT), ("source", INDEX)):
        (folder / "run.json").write_text(json.dumps(identity | {"masks.basis": basis}))
        page, _ = make(tmp_path, folder)
        alts = [image["alt"] or "" for image in page.images]
        (strip,) = [alt for alt in alts if re.match(r"Strip of \d+ hidden", alt)]
        assert strip.endswith(f"by {axis}")


def test_a_layer_that_is_kept_with_a_small_mask_is_not_marked(runs: Path, tmp_path: Path) -> None:
    """The published rule keeps as many layers as the target has, however small their masks."""
    output = tmp_path / "paper"
    shear(configure(runs, output, rule="paper"))
    stored = load_file(output / "masks.safetensors")
    kept = stored["kept.layer"][0].tolist()
    (removed,) = set(range(3)) - set(kept)
    stored["z.layer"][0, kept[0]] = 0.004
    save_file(stored, output / "masks.safetensors")
    page, numbers = make(tmp_path, output)
    assert numbers["runs"][0]["polarised"] is False
    assert "kept with a mask near 0 look removed here" in page.text
    maps = [str(i["alt"]) for i in page.images if str(i["alt"]).startswith("Heat map")]
    assert len(maps) == 2 and all(alt.endswith(f"removed layers: {removed}") for alt in maps)
    table = page.source.split("Units on in every layer")[1].split("</table>")[0]
    cells = re.findall(r'<th scope="row">(\d)</th><td>(.*?)</td>', table)
    found = {int(layer): unescape(cell) for layer, cell in cells}
    assert found[removed] == "removed" and found[kept[0]] == "< 0.01"
    assert found[kept[1]] != "removed"


def test_a_run_that_is_going_on(runs: Path, tmp_path: Path) -> None:
    folder = copy(runs, tmp_path)
    for name in ("shear.json", "masks.safetensors"):
        (folder / name).unlink()
    cut(folder / "metrics.jsonl", 5)
    cut(folder / "history.jsonl", 5)
    page, numbers = make(tmp_path, folder)
    check_self_contained(page)
    (found,) = numbers["runs"]
    last = json.loads((folder / "history.jsonl").read_text().splitlines()[4])
    assert (found["finished"], found["step"], found["polarised"]) == (False, 5, False)
    between = {n: sum(f["nonzero"]) - sum(f["alive"]) for n, f in last["families"].items()}
    assert found["kept_not_alive"] == between and sum(between.values()) > 0
    assert set(SHOWN) < set(page.headings)
    (folder / "history.jsonl").write_text((folder / "history.jsonl").read_text() + '{"st')
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + "\n{")
    assert json.loads(json.dumps(facts(read_run(folder)))) == numbers["runs"][0]
    for words in ("not finished", "5 of 8", "Masks at step 5", "not yet"):
        assert words in page.text, words


def test_a_run_that_has_just_started(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    shutil.copy(runs / "shear" / "run.json", folder)
    main([str(folder)])
    page = Page(folder / "report.html")
    assert not page.wrong and "0 of 8" in page.text and "not known yet" in page.text
    assert "No step is on record yet." in page.text and 'class="note"' not in page.source
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "run.json"]


def test_a_run_without_history(runs: Path, tmp_path: Path) -> None:
    folder = copy(runs, tmp_path)
    (folder / "history.jsonl").unlink()
    page, _ = make(tmp_path, folder)
    check_self_contained(page)
    assert "No history of the masks is on record" in page.text
    shown = {"Verdict", "Units", "Kept units", "Units that are on", *TRAINING}
    assert set(page.headings) == shown


def test_a_run_of_no_steps(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "none"
    shear(configure(runs, folder, steps=0, init="magnitude"))
    page, numbers = make(tmp_path, folder)
    check_self_contained(page)
    assert page.headings == ["Verdict", "Units", "Kept units"]
    assert numbers["runs"][0]["tokens_per_second"] is None
    assert "no training steps: units were chosen once" in page.text
    for words in ("0 of 0", "tokens/s", "training tokens", 'class="note"'):
        assert words not in page.source, words
    report = json.loads((folder / "shear.json").read_text())
    for chosen, words in (
        ({"from": "runs/other"}, "keeps the units that runs/other keeps (--selection)."),
        ({"init": "ppl", "search": "one-shot"}, "by the criterion ppl, and those of least score"),
        ({"init": "taylor", "search": "greedy", "then": "ffn=8"}, "; the units of ffn=8 by"),
        ({"init": "ppl", "search": "one-shot", "units": ["attention 0"]}, "layers were scored by"),
        ({"init": "taylor", "search": "layer-widths"}, "scores (taylor), and a search moved chan"),
        ({"init": "ppl", "search": "new"}, "by the criterion ppl, and searched (new)."),
    ):
        told = report | {"selection": report["selection"] | chosen}
        (folder / "shear.json").write_text(json.dumps(told))
        page = make(tmp_path, folder)[0]
        assert words in page.text and "initial scores" not in page.text


def test_what_was_measured_behind_the_last_step_is_shown_everywhere(
    runs: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"refit_sequences": 16, "refit_held_out": 8}
    folders = [tmp_path / name for name in ("frozen", "none")]
    shear(configure(runs, folders[0], steps=2, freeze_weights=True, **flags))
    shear(configure(runs, folders[1], steps=0, init="magnitude", **flags))
    page, numbers = make(tmp_path, *folders)
    assert "not measured" not in page.text.split("Runs beside each other")[1].split("Shearing:")[0]
    for folder, run in zip(folders, numbers["runs"], strict=True):
        report = json.loads((folder / "shear.json").read_text())
        assert run["held_out"] == {name: row["loss"] for name, row in report["held_out"].items()}
        for row in report["held_out"].values():
            # In the verdict and beside the other run.
            assert page.source.count(f"{row['loss']:.4f}") >= 2


def test_continued_pretraining_alone(runs: Path, tmp_path: Path) -> None:
    page, numbers = make(tmp_path, runs / "cpt")
    check_self_contained(page)
    assert tuple(page.headings) == ("Verdict", *TRAINING)
    assert "Speed should be level;" in page.text and "vertical line" not in page.text
    assert "target" not in numbers["runs"][0]


def test_whatever_comes_from_files_is_text(runs: Path, tmp_path: Path) -> None:
    hostile = "<script src=x>alert(1)</script>\"'&$\\frac{_"
    folder = tmp_path / "<b>run"
    shutil.move(copy(runs, tmp_path), folder)
    (folder / "history.jsonl").unlink()
    identity = json.loads((folder / "run.json").read_text())
    identity |= {"data": hostile, hostile: hostile, "masks.rule": hostile}
    (folder / "run.json").write_text(json.dumps(identity))
    for name in ("metrics.jsonl", "shear.json"):
        path = folder / name
        path.write_text(path.read_text().replace('"alpha"', json.dumps(hostile)))
    page, _ = make(tmp_path, folder)
    assert not page.wrong and not {"script", "b"} & {tag for tag, _ in page.tags}
    assert page.texts.count(hostile) >= 3
    alts = [image["alt"] or "" for image in page.images]
    assert any(hostile in alt for alt in alts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent: no such folder; name the --output folder"),
        (["."], "holds no run"),
        (["RECORD"], "it is a record of the run in .*; name the run's folder, .*shear$"),
        (["abs*"], "only --input takes patterns in quotes"),
        (["SHEAR", "SHEAR"], "is named twice"),
        (["OTHER"], "a run of 'tokenize'"),
        (["DAMAGED"], "run.json: not valid JSON"),
        (["OLD"], "cannot be read .*num_layers"),
        (["SHEAR", "--output", "FOLDER"], "is a folder; name a file"),
        (["SHEAR", "--json", "FOLDER"], "is a folder; name a file"),
        (["SHEAR", "--output", "FILE/page.html"], "cannot write"),
        (["SHEAR", "--figures", "FILE"], "cannot write"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    runs: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    identity = json.loads((runs / "shear" / "run.json").read_text())
    del identity["model.num_layers"]
    for name, content in (
        ("other", '{"command": "tokenize", "steps": 1}'),
        ("damaged", "{"),
        ("old", json.dumps(identity)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
    known = {"SHEAR": runs / "shear", "OTHER": tmp_path / "other", "OLD": tmp_path / "old"}
    known |= {"DAMAGED": tmp_path / "damaged", "FOLDER": tmp_path, ".": tmp_path}
    known["RECORD"] = runs / "shear" / "metrics.jsonl"
    known["FILE"] = tmp_path / "other" / "run.json"
    known["FILE/page.html"] = known["FILE"] / "page.html"
    with pytest.raises(InputError, match=message):
        main([str(known.get(word, word)) for word in arguments])


def test_matplotlib_is_asked_for(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[demo\]'"):
        main([str(runs / "shear"), "--output", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def test_smoothing_keeps_level_and_gaps() -> None:
    assert smoothed([1.0] * 99) is None
    values = [2.0] * 200
    values[100] = float("nan")
    found = smoothed(values)
    assert found is not None and np.nanmax(found) == np.nanmin(found) == 2.0
    assert 1 < np.isnan(found[90:111]).sum() == np.isnan(found).sum() < 10
    slope = smoothed(list(range(200)))
    assert slope is not None and slope[20:180] == pytest.approx(np.arange(20, 180))


def test_cells_meet_half_way_between_steps() -> None:
    assert step_edges([1, 4, 8]).tolist() == [0.5, 2.5, 6.0, 8.5]
    assert step_edges([3]).tolist() == [2.5, 3.5]


def test_the_step_from_which_every_row_stays_on_its_target() -> None:
    rows = [(30, 30, 28), (24, 25, 24), (24, 24, 24), (23, 24, 24), (24, 24, 24), (24, 24, 24)]
    records = [
        {"step": step, "alive_hidden_min": low, "alive_hidden_max": high, "target_hidden": target}
        for step, (low, high, target) in enumerate(rows, start=1)
    ]
    assert first_step_on_target(records, ["hidden"]) == 5
    assert first_step_on_target(records[:4], ["hidden"]) is None


def test_held_out_mean_is_token_weighted() -> None:
    rows = {"a": {"loss": 1.0, "tokens": 30}, "b": {"loss": 3.0, "tokens": 10}}
    assert mean_loss(rows) == pytest.approx(1.5)


def write_large_run(folder: Path) -> None:
    """A run in progress on a model of LLaMA-2-7B's shape, with random masks."""
    layers, steps = 32, 3200
    kinds = {
        "hidden": (1, 4096, 2048),
        "layer": (1, layers, 24),
        "kv_group": (layers, 32, 16),
        "intermediate": (layers, 11008, 5504),
    }
    shape = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    shape |= {"num_layers": layers, "num_heads": 32, "num_kv_heads": 32, "head_dim": 128}
    identity: dict[str, Any] = {f"model.{name}": value for name, value in shape.items()}
    identity |= {"command": "shear", "steps": steps, "model.family": "llama"}
    identity["target"] = "layers=24,hidden=2048,heads=16,kv-heads=16,ffn=5504"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(identity))
    generator = np.random.default_rng(0)
    names = [f"domain{index}" for index in range(7)]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record: dict[str, Any] = {"step": step, "tokens": step * 2**17, "lr": 1e-4}
            record |= {"loss": 2 + generator.random(), "tokens_per_second": 1e4, "grad_norm": 1.0}
            record["domain_weights"] = {name: float(generator.random()) for name in names}
            if step % 400 == 0:
                record["held_out"] = {name: {"loss": 2.0, "tokens": 9} for name in names}
            file.write(json.dumps(record) + "\n")
    with (folder / "history.jsonl").open("w") as file:
        for step in range(16, steps + 1, 16):
            record = {"step": step, "temperature": 0.1, "families": {}}
            for name, (rows, units, target) in kinds.items():
                record["families"][name] = {
                    "rows": rows,
                    "units": units,
                    "target": target,
                    "current_target": target,
                    "alive": generator.integers(0, units, rows).tolist(),
                    "nonzero": [units] * rows,
                    "multipliers": generator.random(rows).tolist(),
                    "histogram": generator.integers(1, 999, 20).tolist(),
                }
                if step % 80 == 0:
                    z = torch.from_numpy(generator.random((rows, units)))
                    record.setdefault("masks", {})[name] = encode_mask(z)
            file.write(json.dumps(record) + "\n")


@pytest.mark.slow
def test_the_page_of_a_large_run_stays_small(tmp_path: Path) -> None:
    write_large_run(tmp_path / "run")
    page, numbers = make(tmp_path, tmp_path / "run")
    check_self_contained(page)
    assert numbers["bytes"] < 5e6
    assert numbers["runs"][0]["parameters"]["target"] == pytest.approx(1.3e9, rel=0.05)
    assert "smoothed" in page.text
    assert "Not shown: FFN channels per layer. There are too many" in page.text
