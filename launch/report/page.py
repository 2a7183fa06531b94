"""What `python -m launch.report` does: the folders of runs in, one HTML file and pictures out.

The page is a single file without scripts and without links. Its own content security policy lets
it load nothing but the images inside it.
"""

import base64
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from data.errors import InputError
from data.files import require_distinct, require_writable, write_bytes, write_copy, write_text
from data.log import logger
from data.records import fits
from launch.report.config import ReportConfig
from launch.report.curves import training_groups
from launch.report.figures import COLOURS, ORANGE, RAMP, Group, Picture
from launch.report.lineage import Line, lines_of, run_names
from launch.report.markup import Html, element, table
from launch.report.masks import mask_groups
from launch.report.run_folder import (
    Run,
    UnitCounts,
    facts,
    read_run,
    removed_layers,
    unit_counts,
)
from launch.report.verdicts import verdict_sections
from pruner.units import APART, label
from trainer.disk import size_text

HERE = Path(__file__).parent
UNKNOWN = "not known yet"
_SEARCHES = {
    "one-shot": "and those of least score went at once",
    "greedy": "and went one at a time, the others scored anew after each",
    "evolution": "and those of least score exchanged for others that change predictions less",
    "refitted": "and those of least score exchanged for others that cost less after a refit",
}
"""How blocks were chosen once they were scored, by --search of `shorn shorten`."""


def run(config: ReportConfig) -> dict[str, Any]:
    """Writes the page, the pictures to --figures and the numbers to --json; returns the numbers.

    Raises InputError for folders that hold no run, without matplotlib, and for a file that cannot
    be written.
    """
    _refuse_repeated(config.runs)
    runs = [read_run(Path(folder)) for folder in config.runs]
    runs.sort(key=lambda one: one.command != "shear")
    lines = lines_of(runs)
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the page's pictures need matplotlib: pip install -e '.[demo]'")
    path = Path(config.output) if config.output else runs[0].folder / "report.html"
    require_distinct({"--output": path, "--json": config.json})
    require_writable(path, "--output")
    require_writable(config.json, "--json")
    if config.figures is not None:
        require_writable(Path(config.figures) / "loss.png", "--figures")
    groups = [*_mask_groups(runs), *training_groups(lines)]
    text = page(runs, lines, groups)
    write_text(path, text)
    numbers: dict[str, Any] = {
        "page": str(path),
        "bytes": len(text.encode(errors="backslashreplace")),
    }
    numbers["runs"] = [facts(one) for one in runs]
    write_copy(config.json, numbers)
    if config.figures is not None:
        write_figures(Path(config.figures), groups)
    logger.info(f"{path} ({size_text(numbers['bytes'])})")
    return numbers


def _refuse_repeated(folders: Sequence[str]) -> None:
    known: dict[Path, str] = {}
    for folder in folders:
        path = Path(folder).resolve()
        if path in known:
            raise InputError(f"{folder} is named twice: name each run once")
        known[path] = folder


def _mask_groups(runs: Sequence[Run]) -> list[Group]:
    """Those of every shearing run; their titles name it where there are several."""
    shears = [one for one in runs if one.command == "shear"]
    names = run_names(shears)
    groups = []
    for one, name in zip(shears, names, strict=True):
        suffix = f": {name}" if len(shears) > 1 else ""
        groups += [replace(group, title=group.title + suffix) for group in mask_groups(one)]
    return groups


def write_figures(folder: Path, groups: Sequence[Group]) -> None:
    """Writes FOLDER/<title>.png for every group, such as units-that-are-on.png and loss.png."""
    for group in groups:
        name = group.title.lower().replace(": ", "-").replace(" ", "-").replace("/", "-")
        write_bytes(folder / f"{name}.png", group.png())


def page(runs: Sequence[Run], lines: Sequence[Line], groups: Sequence[Group]) -> str:
    """The whole page about runs, which stand in `lines`."""
    style = (HERE / "style.css").read_text("utf-8") + _colours()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    body = [*verdict_sections(lines), *(_head(one) for one in runs)]
    shears = [one for one in runs if one.command == "shear"]
    names = [f": {name}" if len(shears) > 1 else "" for name in run_names(shears)]
    body += [_units(one, name) for one, name in zip(shears, names, strict=True)]
    body += [_group(group) for group in groups]
    body += [_configuration(one) for one in runs]
    return Template((HERE / "page.html").read_text("utf-8")).substitute(
        digest=digest,
        style=style,
        title=escape("Report: " + ", ".join(str(one.folder) for one in runs)),
        body="\n".join(body),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def _colours() -> str:
    """The colours of the pictures, as style.css names them."""
    ramp = {f"r{index}": colour for index, colour in enumerate(RAMP)}
    lines = {f"c{index}": colour for index, colour in enumerate(COLOURS)}
    names = {"orange": ORANGE} | ramp | lines
    variables = "; ".join(f"--{name}: {colour}" for name, colour in names.items())
    swatches = "".join(f".{name} {{ border-top-color: var(--{name}) }}\n" for name in lines)
    return f":root {{ {variables} }}\n{swatches}"


def _head(run: Run) -> Html:
    """Name, state and key figures of one run."""
    numbers = facts(run)
    titles = {"shear": "Shearing", "cpt": "Continued pre-training", "finetune": "Fine-tuning"}
    title = titles[run.command]
    done = numbers["finished"]
    state = element(
        "span", "finished" if done else "not finished", class_=f"state {'done' if done else 'open'}"
    )
    figures = [
        element(
            "div",
            element("dt", name),
            element("dd", value, *([element("small", note)] if note else [])),
        )
        for name, value, note in _key_figures(run, numbers)
        if value
    ]
    return element(
        "header",
        element("h1", f"{title}: {run.folder.name or run.folder} ", state),
        element("p", str(run.folder), class_="path"),
        *([_shapes(numbers)] if run.command == "shear" else []),
        element("dl", *figures, class_="figures"),
    )


def _key_figures(run: Run, numbers: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, small print) of each; an empty value is left out."""
    counts = numbers["parameters"]
    if run.command == "shear":
        rows = _mask_figures(numbers)
    else:
        note = f"{counts['source_non_embedding']:,} without embeddings"
        rows = [("parameters", f"{counts['source']:,}", note)]
        trained = (run.report or {}).get("trained_parameters", 0)
        rows.append(("trained", f"{trained:,}" if trained else "", "parameters"))
    if numbers["steps"] == 0:
        return [*rows, ("steps", "none", "nothing was trained")]
    note = f"{numbers['step'] / numbers['steps']:.0%}"
    if run.written is not None:
        note += f", last line {datetime.fromtimestamp(run.written).astimezone():%Y-%m-%d %H:%M}"
    rows.append(("steps", f"{numbers['step']:,} of {numbers['steps']:,}", note))
    rows.append(("training tokens", f"{numbers['tokens']:,}", ""))
    loss, speed, held_out = (numbers[key] for key in ("loss", "tokens_per_second", "held_out"))
    note = "held out: " + ", ".join(f"{name} {value:.3f}" for name, value in held_out.items())
    note = note if held_out else ""
    rows.append(("training loss", f"{loss:.4f}" if loss is not None else "", note))
    rows.append(("tokens/s", f"{speed:,.0f}" if speed is not None else "", ""))
    return rows


def _mask_figures(numbers: dict[str, Any]) -> list[tuple[str, str, str]]:
    counts = numbers["parameters"]
    left = counts["target_non_embedding"] / counts["source_non_embedding"]
    no = "no" if numbers["finished"] else "not yet"
    polarised = {True: "yes", False: no, None: UNKNOWN}[numbers["polarised"]]
    between = numbers["kept_not_alive"]
    since = numbers["on_target_since_step"]
    return [
        (
            "parameters",
            f"{counts['source']:,} → {counts['target']:,}",
            f"without embeddings {counts['source_non_embedding']:,} → "
            f"{counts['target_non_embedding']:,} ({left:.0%})",
        ),
        (
            "all masks 0 or 1",
            polarised,
            f"every row on its target since step {since:,}" if since is not None else "",
        ),
        (
            "nonzero, but not on",
            f"{sum(between.values()):,} units" if between else UNKNOWN,
            "masks above 0 and below 0.99",
        ),
    ]


def _shapes(numbers: dict[str, Any]) -> Html:
    """The table of source and target sizes."""
    source, target = numbers["source"], numbers["target"]
    # Of layers apart the source has as many as blocks.
    every = dict.fromkeys([*source, *target])
    sizes = {"source": {name: source.get(name, source["layers"]) for name in every}}
    sizes["target"] = {name: target[name] for name in every}
    names = [name.replace("_", " ").replace("kv", "KV").replace("mlp", "MLP") for name in every]
    rows = [(which, *(f"{value:,}" for value in own.values())) for which, own in sizes.items()]
    return table(("", *names), rows)


def _units(run: Run, suffix: str) -> Html:
    """The tables of unit counts: by kind, and by layer to fold out; `suffix` ends the heading."""
    counts = unit_counts(run)
    parts: list[Html] = []
    if counts:
        rows = [
            (
                label(name),
                *(f"{number:,}" for number in (count.rows, count.units, count.target)),
                f"{count.current_target:,.1f}".removesuffix(".0"),
                _span(count.on),
                f"{count.between:,}",
            )
            for name, count in counts.items()
        ]
        header = ("kind", "rows", "source", "target", "target now", "on", "nonzero, not on")
        explanation = (
            "Units of a row, smallest to largest over the rows of a kind. A unit is on at a mask "
            "of 0.99 or more."
        )
        parts += [element("p", explanation), table(header, rows)]
    if not run.history:
        parts.append(_no_history(run))
    return element("section", element("h2", "Units" + suffix), *parts, *_by_layer(run, counts))


def _no_history(run: Run) -> Html:
    if run.steps == 0:
        return element("p", f"The run had no training steps: {_chosen(run)}.")
    if run.report is None and not run.metrics:
        return element("p", "No step is on record yet.")
    return element(
        "p",
        "No history of the masks is on record (history.jsonl), so their distribution, how units "
        "settled and the multipliers cannot be shown.",
        class_="note",
    )


def _chosen(run: Run) -> str:
    """How the units of a run without steps were found, in words."""
    found = (run.report or {}).get("selection")
    found = found if isinstance(found, dict) else {}
    if found.get("from"):
        return f"it keeps the units that {found['from']} keeps (--selection)"
    if found.get("search") == "layer-widths":
        return (
            f"units were chosen by their scores ({found.get('init')}), and a search moved channels "
            "between layers"
        )
    if found.get("search"):
        search = _SEARCHES.get(found["search"], f"and searched ({found['search']})")
        then = found.get("then")
        cut = f"; the units of {then} by the strength of their activations" if then else ""
        what = "layers" if found.get("units") else "blocks"
        return f"{what} were scored by the criterion {found.get('init')}, {search}{cut}"
    if run.report is None and "selection" in run.identity:
        return "its units were chosen before it, which its report will tell of"
    return "units were chosen once, by their initial scores"


def _by_layer(run: Run, counts: dict[str, UnitCounts]) -> list[Html]:
    """What is on in every layer; nothing where no kind has rows of layers."""
    layers = run.model.num_layers
    split = {n: c for n, c in counts.items() if c.rows > 1 and c.rows % layers == 0}
    whole = {n: run.masks[n][0] for n in ("layer", *APART) if counts and n in run.masks}
    if not split and not whole:
        return []
    finished = run.masks_step is None
    removed = removed_layers(run) if finished else []
    words = ["mask" if name == "layer" else name.replace("_", "-") for name in whole]
    told: Any = (run.report or {}).get("target")
    known: dict[str, list[int]] = told if fits(told, {"*": [int]}) else {}
    targets = {n: known[n] for n, c in split.items() if len(known.get(n, ())) == c.rows}
    header = ["layer", *words, *(label(name) for name in split)]
    rows = []
    for layer in range(layers):
        row = [str(layer)]
        for name, own in whole.items():
            gone = layer in removed if name == "layer" else finished and own[layer] <= 0
            row.append("removed" if gone else _mask(own[layer]))
        for name, count in split.items():
            each = count.rows // layers
            part = whole.get("feed_forward" if name == "intermediate" else "attention")
            target = targets[name][layer * each] if name in targets else count.target
            text = f"{_span(count.on[layer * each :][:each])} / {target:,}"
            row.append("" if finished and part is not None and part[layer] <= 0 else text)
        rows.append(row)
    explanation = "Units on / target in each layer; a layer whose own mask is 0 is removed whole."
    return [
        element(
            "details",
            element("summary", "Units on in every layer"),
            element("p", explanation),
            table(header, rows),
        )
    ]


def _mask(value: float) -> str:
    return f"{value:.2f}" if value == 0 or value >= 0.005 else "< 0.01"


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _group(group: Group) -> Html:
    legend = [
        element("li", element("span", class_=f"swatch {kind}"), text) for kind, text in group.legend
    ]
    pictures = [_figure(picture) for picture in group.pictures]
    return element(
        "section",
        element("h2", group.title),
        element("p", group.caption),
        *([element("ul", *legend, class_="legend")] if legend else []),
        element("div", *pictures, class_="pictures wide" if group.wide else "pictures"),
    )


def _figure(picture: Picture) -> Html:
    source = "data:image/png;base64," + base64.b64encode(picture.png()).decode("ascii")
    width, height = picture.pixels
    image = element("img", src=source, alt=picture.alt, width=width, height=height)
    return element("figure", element("figcaption", picture.title), image)


def _configuration(run: Run) -> Html:
    rows = [
        (name, value if isinstance(value, str) else json.dumps(value, indent=1))
        for name, value in run.identity.items()
    ]
    summary = element("summary", f"Configuration of {run.folder.name} (run.json)")
    return element("section", element("details", summary, table((), rows, class_="settings")))
