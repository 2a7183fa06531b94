"""Which run started from which other's model, and which held-out losses may stand side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.report.run_folder import Run
from pruner.shapes import shape_of
from trainer.models.sources import weights_fingerprint

Text = tuple[Any, ...]
"""What tells one set of held-out sequences from another."""


@dataclass(frozen=True, slots=True)
class Line:
    """Runs of which each started from the model of the one before, at least one."""

    name: str
    """The folder of its last run."""
    runs: list[Run]
    after: Run | None
    """The run of another line whose model its first run started from too."""
    random: bool
    """Whether its first run started from random weights."""


def is_random(run: Run) -> bool:
    """Whether the run started from random weights."""
    return run.command == "cpt" and run.identity.get("init") == "random"


def lines_of(runs: Sequence[Run]) -> list[Line]:
    """`runs` in lines: the first run named that started from a run's model goes on in its line, the
    others begin lines of their own."""
    parents: list[int | None] = []
    for index in range(len(runs)):
        parent = _parent(runs, index)
        # A copied folder can seem to have made what it started from.
        round_again = parent is not None and index in (parent, *_ancestors(parents, parent))
        parents.append(None if round_again else parent)
    children: dict[int, list[int]] = {}
    for index, parent in enumerate(parents):
        if parent is not None:
            children.setdefault(parent, []).append(index)
    names = run_names(runs)
    lines = []
    order = sorted(range(len(runs)), key=lambda index: len(_ancestors(parents, index)))
    for index in order:
        parent = parents[index]
        if parent is not None and children[parent][0] == index:
            continue
        chain = [index]
        while chain[-1] in children:
            chain.append(children[chain[-1]][0])
        after = None if parent is None else runs[parent]
        name, own = names[chain[-1]], [runs[one] for one in chain]
        lines.append(Line(name, own, after, is_random(own[0])))
    # Lines come after those that they go on from, and baselines from random weights last.
    return sorted(lines, key=lambda line: line.random)


def _ancestors(parents: Sequence[int | None], index: int) -> list[int]:
    found: list[int] = []
    while index < len(parents) and (parent := parents[index]) is not None:
        found.append(parent)
        index = parent
    return found


def run_names(runs: Sequence[Run]) -> list[str]:
    """Names of the runs' folders, with as much of their paths as tells them apart."""
    short = [run.folder.name or str(run.folder) for run in runs]
    return [
        name if short.count(name) == 1 else str(run.folder)
        for name, run in zip(short, runs, strict=True)
    ]


def _parent(runs: Sequence[Run], index: int) -> int | None:
    """The run among `runs` whose model this one started from, if any."""
    run = runs[index]
    if is_random(run) or run.command == "shear":
        wanted = None if is_random(run) else run.identity.get("source")
    else:
        wanted = run.identity.get("initial_weights")
    if wanted is None:
        return None
    others = [other for other in range(len(runs)) if other != index]
    made = {other: _made(runs[other]) for other in others}
    for other in others:
        if made[other] == wanted:
            return other
    # Models that were moved or deleted leave the order in which the runs were named.
    if run.command == "shear":
        return None
    unknown = [o for o in others if o < index and made[o] is None and _fits(runs[o], run)]
    return unknown[-1] if unknown else None


def _made(run: Run) -> str | None:
    """Fingerprint of the model that a run has left behind; None where there is none."""
    folder = run.folder / "model"
    if not any(folder.glob("*.safetensors")):
        return None
    try:
        return weights_fingerprint(folder)
    except OSError:
        return None


def _fits(parent: Run, child: Run) -> bool:
    made = parent.target or shape_of(parent.model)
    return not is_random(parent) and made == shape_of(child.model)


def text_of(run: Run, held_out: dict[str, Any]) -> Text:
    """What the held-out losses {domain: {loss, tokens}} of a run were measured on."""
    tokens = sorted((domain, row["tokens"]) for domain, row in held_out.items())
    return run.identity.get("data"), run.identity.get("seq_len"), *tokens
