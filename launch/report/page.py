"""What `python -m launch.report` does: the folders of runs in, one HTML file out.

The page is a single file without scripts and without links. Its own content security policy lets
it load nothing but the images inside it.
"""

import base64
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.files import write_json, write_text
from data.log import logger
from launch.report.config import ReportConfig
from launch.report.curves import training_groups
from launch.report.figures import Group, Picture, label, mask_groups
from launch.report.run_folder import (
    FamilyState,
    Run,
    facts,
    family_states,
    read_run,
    removed_layers,
)
from launch.report.style import STYLE_SHEET

COMMANDS = {"shear": "Shearing", "cpt": "Continued pre-training"}
UNKNOWN = "not known yet"


def run(config: ReportConfig) -> dict[str, Any]:
    """Writes the page, and the numbers at its head to --json; returns these.

    Raises InputError for folders that hold no run, without matplotlib, and for a file that cannot
    be written.
    """
    runs = [read_run(Path(folder)) for folder in config.runs]
    if sum(one.command == "shear" for one in runs) > 1:
        raise InputError("more than one run of pruner.shear is named; write one page for each")
    runs.sort(key=lambda one: one.command != "shear")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the page's pictures need matplotlib: pip install -e '.[demo]'")
    path = Path(config.output) if config.output else runs[0].folder / "report.html"
    copies = [Path(config.json)] if config.json is not None else []
    for file in (path, *copies):
        _prepare(file)
    text = page(runs)
    numbers: dict[str, Any] = {"page": str(path), "bytes": len(text.encode())}
    numbers["runs"] = [facts(one) for one in runs]
    try:
        write_text(path, text)
        for file in copies:
            write_json(file, numbers)
    except OSError as error:
        raise _cannot_write(path, error) from error
    logger.info(f"{path} ({numbers['bytes'] / 1e6:.1f} MB)")
    return numbers


def _prepare(file: Path) -> None:
    """Makes the folder of a file. Raises InputError when no file can be written there."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(file, error) from error
    if file.is_dir():
        raise InputError(f"{file} is a folder; name a file in it")


def _cannot_write(file: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write {error.filename or file}: {error.strerror}; name another file with --output "
        "or --json"
    )


def page(runs: Sequence[Run]) -> str:
    """The whole page about runs that followed each other."""
    title = "Report: " + ", ".join(str(one.folder) for one in runs)
    digest = base64.b64encode(hashlib.sha256(STYLE_SHEET.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    body = [_head(one) for one in runs]
    for one in runs:
        if one.command == "shear":
            body.append(_units(one))
            body += [_group(group) for group in mask_groups(one)]
    body += [_group(group) for group in training_groups(runs)]
    body += [_configuration(one) for one in runs]
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n<footer>Written {escape(made)} from the files of the run.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _head(run: Run) -> str:
    """Name, state and key figures of one run."""
    numbers = facts(run)
    name = f"{COMMANDS[run.command]}: {run.folder.name or run.folder}"
    state = "finished" if numbers["finished"] else "not finished"
    cells = [(key, value, note) for key, value, note in _key_figures(run, numbers) if value]
    figures = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}"
        + (f"<small>{escape(note)}</small>" if note else "")
        + "</dd></div>"
        for key, value, note in cells
    )
    kind = "done" if numbers["finished"] else "open"
    return (
        f'<header><h1>{escape(name)} <span class="state {kind}">{state}</span></h1>'
        f'<p class="path">{escape(str(run.folder))}</p>'
        + (_shapes(numbers) if run.command == "shear" else "")
        + f'<dl class="figures">{figures}</dl></header>'
    )


def _key_figures(run: Run, numbers: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, small print) of each; an empty value is left out."""
    counts = numbers["parameters"]
    rows = []
    if run.command == "shear":
        rows += _mask_figures(numbers)
    else:
        note = f"{counts['source_non_embedding']:,} without embeddings"
        rows.append(("parameters", f"{counts['source']:,}", note))
    if numbers["steps"] == 0:
        return [*rows, ("steps", "none", "nothing was trained")]
    share = numbers["step"] / numbers["steps"]
    written = run.written
    when = datetime.fromtimestamp(written).astimezone() if written is not None else None
    rows.append(
        (
            "steps",
            f"{numbers['step']:,} of {numbers['steps']:,}",
            f"{share:.0%}" + (f", last line {when:%Y-%m-%d %H:%M}" if when else ""),
        )
    )
    rows.append(("training tokens", f"{numbers['tokens']:,}", ""))
    loss, speed, held_out = (numbers[key] for key in ("loss", "tokens_per_second", "held_out"))
    note = "held out: " + ", ".join(f"{name} {value:.3f}" for name, value in held_out.items())
    rows.append(("training loss", f"{loss:.4f}" if loss is not None else "", held_out and note))
    rows.append(("tokens/s", f"{speed:,.0f}" if speed is not None else "", ""))
    return [(key, value, note or "") for key, value, note in rows]


def _mask_figures(numbers: dict[str, Any]) -> list[tuple[str, str, str]]:
    counts = numbers["parameters"]
    left = counts["target_non_embedding"] / counts["source_non_embedding"]
    no = "no" if numbers["finished"] else "not yet"
    polarised = {True: "yes", False: no, None: UNKNOWN}[numbers["polarised"]]
    soft = numbers["kept_not_alive"]
    since = numbers["on_target_since_step"]
    note = f"every row on its target since step {since:,}" if since is not None else ""
    return [
        (
            "parameters",
            f"{counts['source']:,} → {counts['target']:,}",
            f"without embeddings {counts['source_non_embedding']:,} → "
            f"{counts['target_non_embedding']:,} ({left:.0%})",
        ),
        ("masks polarised", polarised, note),
        (
            "kept, but not alive",
            f"{sum(soft.values()):,} units" if soft else UNKNOWN,
            "masks above 0 and below 0.99",
        ),
    ]


def _shapes(numbers: dict[str, Any]) -> str:
    """The table of source and target sizes."""
    names = list(numbers["source"])
    header = ("", *(name.replace("_", " ") for name in names))
    rows = [
        (which, *(f"{numbers[which][name]:,}" for name in names)) for which in ("source", "target")
    ]
    return _table(header, rows)


def _units(run: Run) -> str:
    """The tables of kept units: by family, and by layer to fold out."""
    states = family_states(run)
    note = "" if run.history else _no_history(run)
    if not states:
        return f"<section><h2>Units</h2>{note}</section>"
    header = ("family", "rows", "source", "target", "target now", "alive", "kept, not alive")
    rows = [
        (
            label(name),
            f"{state.rows:,}",
            f"{state.units:,}",
            f"{state.target:,}",
            f"{state.current_target:,.1f}".removesuffix(".0"),
            _span(state.alive),
            f"{state.soft:,}",
        )
        for name, state in states.items()
    ]
    return (
        "<section><h2>Units</h2><p>Units of a row, smallest to largest over the rows of a family. "
        "A unit is alive at a mask of 0.99 or more.</p>"
        + _table(header, rows)
        + note
        + _by_layer(run, states)
        + "</section>"
    )


def _no_history(run: Run) -> str:
    if run.steps == 0:
        return (
            "<p>The run had no training steps: units were chosen once, by their initial scores.</p>"
        )
    if run.report is None and not run.metrics:
        return "<p>No step is on record yet.</p>"
    return (
        '<p class="note">No history of the masks is on record (history.jsonl), so their '
        "distribution, how units settled and the multipliers cannot be shown.</p>"
    )


def _by_layer(run: Run, states: dict[str, FamilyState]) -> str:
    layers = run.model.num_layers
    split = {n: s for n, s in states.items() if s.rows > 1 and s.rows % layers == 0}
    own = run.masks["layer"][0] if "layer" in run.masks else None
    if not split and own is None:
        return ""
    removed = removed_layers(run) if run.masks_step is None else []
    header = ["layer", *(["mask"] if own is not None else []), *(label(name) for name in split)]
    rows = []
    for layer in range(layers):
        row = [str(layer)]
        if own is not None:
            row.append("removed" if layer in removed else _mask(own[layer]))
        for state in split.values():
            each = state.rows // layers
            counts = state.alive[layer * each : (layer + 1) * each]
            row.append(f"{_span(counts)} / {state.target:,}")
        rows.append(row)
    return (
        "<details><summary>Alive units of every layer</summary><p>Alive / target in each layer; a "
        "layer whose own mask is 0 is removed whole.</p>" + _table(header, rows) + "</details>"
    )


def _mask(value: float) -> str:
    return f"{value:.2f}" if value == 0 or value >= 0.005 else "< 0.01"


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _group(group: Group) -> str:
    legend = "".join(
        f'<li><span class="swatch {escape(kind)}"></span>{escape(text)}</li>'
        for kind, text in group.legend
    )
    return (
        f"<section><h2>{escape(group.title)}</h2><p>{escape(group.caption)}</p>"
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + f'<div class="pictures{" wide" if group.wide else ""}">'
        + "".join(_figure(picture) for picture in group.pictures)
        + "</div></section>"
    )


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    width, height = picture.size
    return (
        f"<figure><figcaption>{escape(picture.title)}</figcaption>"
        f'<img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}" '
        f'width="{width}" height="{height}"></figure>'
    )


def _configuration(run: Run) -> str:
    rows = []
    for name, value in run.identity.items():
        text = value if isinstance(value, str) else json.dumps(value, indent=1)
        rows.append(f"<tr><th scope='row'>{escape(name)}</th><td>{escape(text)}</td></tr>")
    return (
        f"<section><details><summary>Configuration of {escape(run.folder.name)} (run.json)"
        f'</summary><div class="scroll"><table class="settings"><tbody>{"".join(rows)}</tbody>'
        "</table></div></details></section>"
    )
