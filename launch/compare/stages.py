"""The stages of a comparison as commands: text, tokens, pruning, training, measuring."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.records import fits, read_json
from launch.commands import ROOT, command, python
from launch.compare.config import WARMUP_RATIO, CompareConfig, Method
from launch.compare.text import content_of, split_documents
from launch.origin import model_fingerprint
from launch.stages import Task
from pruner.config import calibration_sequences
from trainer.models.sources import resolve_model

REFIT_SEQUENCES, REFIT_HELD_OUT = 256, 32
"""At most as many sequences are refitted on, and held out of that."""
EVALUATION = "evaluation.json"
"""File of held-out losses in the folder of a measuring stage."""
TASK_RESULTS = ".tasks"
"""Folder of results of tasks in the output folder."""


def read_result(task: Task, name: str, form: dict[str, Any]) -> dict[str, Any]:
    """The file `name` that a finished stage has left, which must have `form` (`data.records.fits`).

    Raises InputError, saying how to have it made again.
    """
    path = task.folder / name
    fix = f"delete {task.folder} and run this again"
    content: dict[str, Any] = read_json(path, fix)
    if not fits(content, form):
        raise InputError(f"{path}: holds other results than those of this version; {fix}")
    return content


class StageMaker:
    """Makes the tasks of a comparison; a task's name is its folder below the output folder.

    Settings leave out where outputs lie and how many threads work, so that neither makes a finished
    stage run again.
    """

    def __init__(self, config: CompareConfig, of_tasks: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.of_tasks = of_tasks or {}
        """What the results of tasks depend on besides models."""
        self.output = Path(config.output)
        self.running: set[subprocess.Popen[bytes]] = set()
        """Processes of the stages that are at work."""
        self.threads: list[object] = []
        if config.threads is not None or config.jobs > 1:
            self.threads = ["--threads", config.threads or 1]

    def inputs(self) -> list[Task]:
        """Text, split by document, and its tokens."""
        config = self.config
        documents = (config.held_out_documents, config.train_documents)
        text = self._task(
            "text",
            settings={"input": config.input, "domains": config.domains, "documents": documents},
            action=lambda: split_documents(
                config.input, config.domains, *documents, self.output / "text"
            ),
        )
        tokens = self._task(
            "tokens",
            settings={"seq_len": config.seq_len, "source": config.source},
            after=("text",),
            action=self._tokenize,
        )
        return [text, tokens]

    def measure(self, name: str, model: Task | str, kind: str, *, window: int = 0) -> Task:
        """Held-out losses of a finished run or of a model; with a `window` also what --text and
        --tasks name, if they do."""
        config = self.config
        folder, after, known = self._model(model)
        flags = ["--split", "train", "--seq-len", config.seq_len, "--sequences", config.sequences]
        flags += ["--precision", config.precision]
        # What is measured on, by its content: another text at the same path is another one.
        read: dict[str, object] = dict(known)
        if window and config.text is not None:
            flags += ["--text", config.text, "--window", window]
            path = Path(config.text)
            read["--text"] = content_of(path) if path.exists() else config.text
        kept: list[object] = []
        if window and config.tasks:
            flags += ["--tasks", *config.tasks]
            read["--tasks"] = self.of_tasks
            if config.task_files is not None:
                flags += ["--task-files", config.task_files]
            flags += [] if config.limit is None else ["--limit", config.limit]
            # Outlives the stage's folder, which begins empty where tasks are added.
            kept = ["--task-results", self.output / TASK_RESULTS]
        named = [flag for flag in flags if flag not in (config.text, config.task_files)]
        words = ["-m", "launch.evaluate", "--model", folder, *flags, *kept]
        words += ["--data", self.output / "tokens" / "held_out"]
        words += ["--json", self.output / name / EVALUATION]
        return self._task(
            name,
            kind=kind,
            settings={"flags": named} | read,
            after=("tokens", *after),
            action=lambda: self._command(name, words, EVALUATION),
        )

    def shear(self, name: str, target: str, method: Method, seed: int, kind: str) -> Task:
        """A run of pruner.shear to the shape `target`."""
        config = self.config
        flags = ["--target", target, "--steps", method.shear_steps, "--lr", config.shear_lr]
        # A fixed mixture steers towards no losses, so measuring them would be lost time.
        flags += [*self._training_flags(seed, WARMUP_RATIO), "--reference-sequences", 1]
        flags += ["--no-activation-checkpointing", *self._text_flags(method)]
        flags += [word.replace("{seed}", str(seed)) for word in method.shear_flags]
        words = ["-m", "pruner.shear", "--source", config.source, *flags]
        return self._training_task(name, words, flags, ("tokens",), "shear.json", kind)

    def shorten(self, name: str, removed: int | None, method: Method, seed: int, kind: str) -> Task:
        """A run of pruner.shorten, which removes as many blocks; None: what its flags say."""
        config = self.config
        assert method.shorten_flags is not None
        flags: list[object] = [] if removed is None else ["--remove", removed]
        flags += ["--seq-len", config.seq_len, "--precision", config.precision]
        flags += ["--domain-weights", config.domain_weights, "--eval-sequences", 0, "--seed", seed]
        flags += [*self._text_flags(method, "--sequences"), *method.shorten_flags]
        words = ["-m", "pruner.shorten", "--source", config.source, *flags]
        return self._training_task(name, words, flags, ("tokens",), "shear.json", kind)

    def _text_flags(self, method: Method, option: str = "--calibration-sequences") -> list[object]:
        """Calibration, whose sequences are the `option`, and a refit may read only what is trained
        on as well, or a method would have more tokens than the others."""
        config, flags = self.config, method.shear_flags
        found: list[object] = []
        if config.steps * config.batch < calibration_sequences(config.seq_len):
            found += [option, config.steps * config.batch]
        if "--no-refit" in flags or (method.shear_steps and "--freeze-weights" not in flags):
            return found
        sequences = (config.steps - method.shear_steps) * config.batch
        held_out = max(1, min(REFIT_HELD_OUT, sequences // 8))
        fitted = max(1, min(REFIT_SEQUENCES, sequences - held_out))
        return [*found, "--refit-sequences", fitted, "--refit-held-out", held_out]

    def train(self, name: str, pruned: Task | str, method: Method, seed: int, kind: str) -> Task:
        """Continued pre-training of a pruned model, or from scratch in its shape."""
        config = self.config
        rate = config.random_lr if method.random else config.cpt_lr
        flags = ["--steps", config.steps - method.shear_steps, "--lr", rate]
        flags += self._training_flags(seed, method.warmup)
        flags += ["--init", "random"] if method.random else []
        flags += [word.replace("{seed}", str(seed)) for word in method.cpt_flags]
        folder, after, known = self._model(pruned)
        words = [ROOT / "launch" / "cpt.py", "--model", folder, *flags]
        return self._training_task(
            name, words, flags, after or ("tokens",), "cpt.json", kind, known
        )

    def _model(self, model: Task | str) -> tuple[Path | str, tuple[str, ...], dict[str, object]]:
        """Where a model is, the stage that makes it, and what a stage that reads it has to know of
        one that no stage makes: the source is known to the comparison."""
        if isinstance(model, Task):
            return model.folder, (model.name,), {}
        if model == self.config.source:
            return model, (), {}
        return model, (), {"model": model_fingerprint(model, "--pruned")}

    def _training_task(
        self,
        name: str,
        words: Sequence[object],
        flags: Sequence[object],
        after: tuple[str, ...],
        report: str,
        kind: str,
        known: Mapping[str, object] | None = None,
    ) -> Task:
        words = [*words, "--data", self.output / "tokens" / "train"]
        words += ["--output", self.output / name]
        return self._task(
            name,
            kind=kind,
            settings={"flags": flags} | dict(known or {}),
            after=after,
            action=lambda: self._command(name, words, report),
        )

    def _task(
        self,
        name: str,
        *,
        settings: Mapping[str, Any],
        action: Callable[[], None],
        after: tuple[str, ...] = (),
        kind: str = "",
    ) -> Task:
        return Task(name, kind or name, settings, after, self.output / name, action)

    def _training_flags(self, seed: int, warmup: float | None) -> list[object]:
        config = self.config
        return [
            *("--seq-len", config.seq_len, "--global-batch", config.batch),
            *("--micro-batch", config.batch),
            *(() if warmup is None else ("--warmup-ratio", warmup)),
            *("--precision", config.precision, "--mixture", "fixed"),
            *("--domain-weights", config.domain_weights, "--eval-sequences", 0, "--seed", seed),
        ]

    def _tokenize(self) -> None:
        source = resolve_model(self.config.source, weights=False, option="--source")
        for part in ("train", "held_out"):
            words: list[object] = ["-m", "data.tokenize", "--tokenizer", source]
            words += ["--input", self.output / "text" / f"{part}.jsonl.zst"]
            words += ["--output", self.output / "tokens" / part]
            words += ["--seq-len", self.config.seq_len]
            words += ["--domain-field", "meta.domain", "--held-out", 0]
            self._command("tokens", words, f"{part}/manifest.json", threads=False)

    def _command(
        self, name: str, words: Sequence[object], makes: str, *, threads: bool = True
    ) -> None:
        """Runs a stage's command without the user's own settings, which would change the numbers;
        `makes` is a file in the stage's folder."""
        command(
            [python(), *words, *(self.threads if threads else ())],
            makes=self.output / name / makes,
            settings_file=self.output / "shorn.toml",
            log=self.output / "logs" / f"{name.replace('/', '-')}.log",
            running=self.running,
        )
