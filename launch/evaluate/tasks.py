"""Accuracy on tasks: which are asked for, by name or as a paper's set, and what is kept of each."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.errors import InputError, failure, first_line
from data.files import require_writable, write_json
from data.log import logger
from data.records import fits, read_json
from data.tokenizers import holds_tokenizer, load_tokenizer
from launch.evaluate.candidates import Candidate
from launch.evaluate.config import EvaluateConfig
from launch.origin import files_fingerprint
from trainer.models.decoder import CausalLM
from trainer.parallel import DistributedContext

if TYPE_CHECKING:
    from launch.evaluate.harness import Loaded

SETS: dict[str, tuple[tuple[str, int, str], ...]] = {
    "sheared-llama": (
        ("sciq", 0, "acc"),
        ("piqa", 0, "acc"),
        ("winogrande", 0, "acc"),
        ("arc_easy", 0, "acc"),
        ("arc_challenge", 25, "acc_norm"),
        ("hellaswag", 10, "acc_norm"),
        ("logiqa", 0, "acc_norm"),
        ("boolq", 32, "acc"),
        ("lambada_openai", 0, "acc"),
        ("nq_open", 32, "exact_match"),
        ("mmlu", 5, "acc"),
    ),
    "shortened-llm": (
        ("boolq", 0, "acc"),
        ("piqa", 0, "acc"),
        ("hellaswag", 0, "acc_norm"),
        ("winogrande", 0, "acc"),
        ("arc_easy", 0, "acc"),
        ("arc_challenge", 0, "acc_norm"),
        ("openbookqa", 0, "acc_norm"),
    ),
}
"""Tasks of papers, each with its shots and its metric: table 2 of Sheared LLaMA (arXiv 2310.06694)
and the seven of Shortened LLaMA (arXiv 2402.02834). The former names no metrics; its row of
OPT-1.3B agrees with these in lm-eval's own results for that model, LogiQA's 26.9 with acc_norm."""
INSTALL = "pip install 'shorn[eval]' (or 'lm-eval>=0.4.13' and accelerate)"
_FACTS = {
    "n": (int, type(None)),
    "shots": (int, type(None)),
    "version": (int, float, str, type(None)),
}
"""What a result holds besides its metrics."""
_RESULTS = {"tasks": {"*": _FACTS}}


@dataclass(frozen=True, slots=True)
class Asked:
    """One task, or group of tasks."""

    name: str
    """As lm-eval calls it."""
    shots: int | None
    """Solved examples in front of each question; None: as many as the task says."""
    metric: str | None
    """The metric that counts; None: acc, or the task's first."""
    of: str | None
    """The set that names it."""


def asked_tasks(names: Sequence[str], shots: int | None) -> list[Asked]:
    """What `--tasks` names, with sets taken apart. Raises InputError for tasks named twice, and for
    shots beside a set, which has its own."""
    found: dict[str, Asked] = {}
    for name in names:
        if shots is not None and name in SETS:
            raise InputError(
                f"--shots {shots}: the set {name} has shots of its own; leave --shots out, or name "
                f"its tasks: {' '.join(task for task, _, _ in SETS[name])}"
            )
        members = [Asked(*task, name) for task in SETS.get(name, ())]
        for asked in members or [Asked(name, shots, None, None)]:
            if asked.name in found:
                first = found[asked.name].of
                where = f"{first} and {name}" if first else name
                raise InputError(
                    f"--tasks: {asked.name} is named twice ({where}); measure it in another call"
                )
            found[asked.name] = asked
    return list(found.values())


class Tasks:
    """The tasks of one call: found before any model is, loaded before weights are."""

    def __init__(self, config: EvaluateConfig) -> None:
        """Raises InputError without lm-eval, and for tasks that it does not know."""
        require_harness()
        try:
            from launch.evaluate.harness import Harness
        except ImportError as error:
            raise InputError(
                f"--tasks: lm-eval cannot be imported ({first_line(error)}): {INSTALL}"
            ) from None

        self.config = config
        self.asked = asked_tasks(config.tasks, config.shots)
        files = None if config.task_files is None else Path(config.task_files)
        self.harness = Harness([asked.name for asked in self.asked], files)
        owners: dict[str, str] = {}
        for asked in self.asked:
            for leaf in self.harness.leaves(asked.name):
                if leaf in owners:
                    raise InputError(
                        f"--tasks {owners[leaf]} {asked.name}: both hold {leaf}; measure one of "
                        "them in another call"
                    )
                owners[leaf] = asked.name
        self.folder = results_folder(config)
        if self.folder is not None:
            option = "--json" if config.task_results is None else "--task-results"
            require_writable(self.folder / "task.json", option)
        self.loaded: dict[str, Loaded] = {}

    def prepare(
        self, models: Sequence[Candidate], dtype: torch.dtype, on: DistributedContext
    ) -> None:
        """Loads the tasks that are not finished for all models. Raises InputError for data that
        cannot be had, and for a model without a tokenizer."""
        for folder in dict.fromkeys(one.folder for one in models):
            if not holds_tokenizer(folder):
                raise InputError(
                    f"--tasks needs the model's own tokenizer, and {folder} holds none: copy "
                    "tokenizer.json and tokenizer_config.json (or tokenizer.model) there from the "
                    "model that it was made from"
                )
            load_tokenizer(folder)
        finished = [self.finished(one, dtype, on) for one in models]
        # The first rank fetches data, and the others find it.
        with on.rank_zero_first():
            self.load(lambda asked: not all(asked.name in kept for kept in finished))

    def load(self, wanted: Callable[[Asked], bool] = lambda asked: True) -> None:
        """Loads the `wanted` ones. Raises InputError for data that cannot be had."""
        for asked in filter(wanted, self.asked):
            self.loaded[asked.name] = self.harness.load(asked.name, asked.shots)

    def finished(
        self, model: Candidate, dtype: torch.dtype, on: DistributedContext
    ) -> dict[str, dict[str, Any]]:
        """Results that are kept from earlier, by the name of what was asked for; on every rank."""
        found = {}
        for asked in self.asked if on.is_main else ():
            kept = self._read(self._file(asked, model, dtype))
            if kept is not None:
                found[asked.name] = kept
        everywhere: dict[str, dict[str, Any]] = on.broadcast(found)
        return everywhere

    def are_finished(self, model: Candidate, dtype: torch.dtype, on: DistributedContext) -> bool:
        """Whether the results of all tasks are kept for a model."""
        return len(self.finished(model, dtype, on)) == len(self.asked)

    def measure(
        self,
        measured: Candidate,
        model: CausalLM | None,
        dtype: torch.dtype,
        on: DistributedContext,
    ) -> dict[str, Any]:
        """Results of all tasks for one model, on every rank; each is kept as soon as it is there.
        `model` may be None where all of them are."""
        finished, name = self.finished(measured, dtype, on), measured.name
        rows: dict[str, dict[str, Any]] = {}
        shown = None
        for asked in self.asked:
            if asked.name in finished:
                if on.is_main:
                    logger.info(f"{asked.name} of {name}: measured before, kept in {self.folder}")
                rows |= completed(finished[asked.name], asked)
                continue
            assert model is not None
            from launch.evaluate.harness import TaskModel, measure

            if shown is None:
                options: dict[str, Any] = {"dtype": dtype, "batch": self.config.batch}
                options["saved"] = measured.saved is not None
                shown = TaskModel(measured.folder, model, context=on, **options)
            shown.description, shown.has_nan = f"{asked.name} of {name}", False
            found = measure(shown, self.loaded[asked.name], self.config.limit)
            rows |= completed(found, asked, sound=not shown.has_nan)
            if on.is_main and not shown.has_nan:
                self._write(self._file(asked, measured, dtype), asked, found)
        return {"tasks": rows} | averages(self.asked, rows)

    def _file(self, asked: Asked, model: Candidate, dtype: torch.dtype) -> Path | None:
        """Where the result of a task for a model is kept: its name holds all that it depends on."""
        if self.folder is None:
            return None
        identity = {
            "weights": model.weights,
            "files": files_fingerprint(model.folder),
            "precision": str(dtype),
            "task": [asked.name, asked.shots, self.config.limit],
            **self.harness.identity(asked.name),
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        plain = "".join(letter if letter.isalnum() else "_" for letter in asked.name)
        return self.folder / f"{plain}-{digest[:16]}.json"

    def _read(self, path: Path | None) -> dict[str, Any] | None:
        if path is None or not path.exists():
            return None
        try:
            content = read_json(path, "the task is measured again")
        except InputError as error:
            logger.warning(str(error))
            return None
        if not fits(content, _RESULTS) or not all(map(metrics_of, content["tasks"].values())):
            logger.warning(f"{path}: holds no results of a task; it is measured again")
            return None
        rows: dict[str, Any] = content["tasks"]
        return rows

    def _write(self, path: Path | None, asked: Asked, rows: dict[str, Any]) -> None:
        if path is None:
            return
        try:
            write_json(path, {"asked": asked.name, "tasks": rows})
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written: {failure(error, 'name another --task-results')}"
            ) from None


def require_harness() -> None:
    """Raises InputError where lm-eval cannot be imported."""
    missing = [name for name in ("lm_eval", "accelerate") if find_spec(name) is None]
    if missing:
        raise InputError(f"--tasks needs {' and '.join(missing)}: {INSTALL}")


def results_folder(config: EvaluateConfig) -> Path | None:
    """Where finished tasks are kept; None: nowhere."""
    if config.task_results is not None:
        return Path(config.task_results)
    return None if config.json is None else Path(config.json).with_suffix(".tasks")


def completed(
    found: dict[str, dict[str, Any]], asked: Asked, *, sound: bool = True
) -> dict[str, dict[str, Any]]:
    """Results of one task or group, each with its `metric` that counts, the `set` that names it and
    the group it is `of`. Where scores were no numbers (not `sound`), these are none either."""
    rows = {}
    for name, row in found.items():
        metrics = metrics_of(row)
        chosen = asked.metric if asked.metric in metrics else None
        chosen = chosen or ("acc" if "acc" in metrics else metrics[0])
        values = row
        if not sound:
            lost = {key for metric in metrics for key in (metric, f"{metric}_stderr")}
            values = {key: None if key in lost else value for key, value in row.items()}
        rows[name] = values | {"metric": chosen}
        if asked.of is not None:
            rows[name]["set"] = asked.of
        if name != asked.name and asked.name in found:
            rows[name]["of"] = asked.name
    return rows


def metrics_of(row: dict[str, Any]) -> list[str]:
    """Names of the metrics of a task, in its order."""
    others = (*_FACTS, "metric", "set", "of")
    return [key for key in row if key not in others and not key.endswith("_stderr")]


def averages(asked: Sequence[Asked], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For every set that was asked for, the plain mean over its tasks of the metric that counts,
    as the papers print it, and the standard error of that."""
    found = {}
    for name in dict.fromkeys(one.of for one in asked if one.of is not None):
        chosen = [rows[one.name] for one in asked if one.of == name]
        values: list[Any] = [row[row["metric"]] for row in chosen]
        errors: list[Any] = [row.get(f"{row['metric']}_stderr") for row in chosen]
        error = None if None in errors else sum(e**2 for e in errors) ** 0.5 / len(errors)
        found[name] = {
            "average": None if None in values else sum(values) / len(values),
            "average_stderr": error,
            "tasks": len(chosen),
        }
    return {"task_sets": found} if found else {}
