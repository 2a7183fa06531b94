"""lm-eval, EleutherAI's harness: its tasks, and our forward pass behind its interface."""

import difflib
import glob
import hashlib
import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from lm_eval import evaluator
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from data.errors import InputError, first_line
from data.progress import Progress
from data.records import read_text
from trainer.models.decoder import CausalLM
from trainer.models.hf import save_model
from trainer.parallel import DistributedContext

FIRST_SEED, SEED = 0, 1234
"""lm-eval's own: of `random`, and of numpy, PyTorch and the choice of examples."""
Loaded = Any
"""Tasks as lm-eval loads them: {"tasks": {name: task}, "groups": ...}."""


class Harness:
    """The tasks that lm-eval knows, its own and those of a folder of task files."""

    def __init__(self, names: Sequence[str], files: Path | None) -> None:
        """Finds `names`, of tasks, groups and tags. Raises InputError for those that nobody knows,
        and for task files that cannot be read; lm-eval passes over them."""
        self.version = version("lm_eval")
        if not hasattr(TaskManager, "task_index"):
            raise InputError(f"--tasks: lm-eval {self.version} is too old: upgrade it to 0.4.13")
        self.files = files
        self.digest = "" if files is None else read_task_files(files)
        # Its own 14,000 take a quarter of a minute to list.
        self.manager = TaskManager(include_path=files, include_defaults=files is None)
        if files is not None and not all(map(self._is_known, names)):
            self.manager = TaskManager(include_path=files)
        for name in names:
            if name not in self.manager.task_index:
                raise InputError(_unknown(name, self.manager.all_tasks, files))

    def _is_known(self, name: str) -> bool:
        """Whether a task is there, and all that a group names."""
        entry = self.manager.task_index.get(name)
        return entry is not None and all(
            self._is_known(member)
            for member in map(_name_of, _members(entry))
            if isinstance(member, str)
        )

    def leaves(self, name: str) -> dict[str, dict[str, Any]]:
        """The tasks that `name` stands for, each with its settings."""
        entry = self.manager.task_index.get(name)
        members = () if entry is None else _members(entry)
        config = dict((entry and entry.cfg) or {})
        return self._leaves_of(members) if members else {name: config}

    def _leaves_of(self, members: Sequence[Any]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for member in members:
            own = {} if isinstance(member, str) else member
            name, inner = _name_of(member), own.get("task")
            if name is not None:
                leaves = self.leaves(name)
            else:
                leaves = self._leaves_of(inner) if isinstance(inner, list) else {str(inner): {}}
            found |= {leaf: config | own for leaf, config in leaves.items()}
        return found

    def identity(self, name: str) -> dict[str, Any]:
        """What a task's result depends on besides the model, as far as files tell."""
        data: dict[str, list[Any]] = {}
        for config in self.leaves(name).values():
            kwargs = config.get("dataset_kwargs") or {}
            named = [kwargs.get("data_files"), kwargs.get("data_dir"), config.get("dataset_path")]
            for text in itertools.chain.from_iterable(map(_texts, named)):
                for file in _files_of(text):
                    stat = file.stat()
                    data[str(file)] = [stat.st_size, stat.st_mtime_ns]
        return {"lm_eval": self.version, "task_files": self.digest, "data": data}

    def load(self, name: str, shots: int | None) -> Loaded:
        """A task or group with its data and `shots` examples; None: as many as it says.

        Raises InputError where its data cannot be had, and for what it cannot be used for here.
        """
        for leaf, config in self.leaves(name).items():
            _refuse_unusable(name, leaf, config, shots)
        _seed()
        try:
            loaded = self.manager.load([name])
        except OSError as error:
            raise InputError(
                f"--tasks {name}: its data cannot be read ({first_line(error)}). Fetch it with a "
                "network, where any run of the task leaves it in the folder HF_HOME; or name a "
                "task of --task-files whose data is on disk (paths count from the working folder)"
            ) from None
        except Exception as error:  # whatever a task file and what it calls may raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            place = f"mend its file in {self.files}" if self.files else "name another task"
            raise InputError(
                f"--tasks {name}: lm-eval cannot make it ({reason}); {place}"
            ) from None
        if not loaded["tasks"]:
            raise InputError(f"--tasks {name}: holds no task; name another")
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if shots is not None or own is None:
                task.set_config(key="num_fewshot", value=shots or 0)
        for leaf, task in loaded["tasks"].items():
            _require_examples(name, leaf, task)
        return loaded


class TaskModel(HFLM):
    """Our forward pass behind lm-eval's handling of tokens, batches, truncation and scores.

    The same requests are made on every rank, which answers its share of them. Text is generated by
    plain transformers, which has a cache of keys and values; its model is loaded once it is needed.
    """

    _model: Any

    def __init__(
        self,
        folder: Path,
        model: CausalLM,
        *,
        dtype: torch.dtype,
        batch: int,
        context: DistributedContext,
        saved: bool = False,
    ) -> None:
        """`folder` holds the tokenizer and, unless the model is a `saved` step, its weights."""
        self.ours, self.saved = model, saved
        self.folder, self.dtype, self.context = folder, dtype, context
        self.description = ""
        """Of the work at hand, beside its progress."""
        self.has_nan = False
        """Whether a score was no number."""
        known = SimpleNamespace(device=context.device, config=AutoConfig.from_pretrained(folder))
        with _unsaid():
            super().__init__(known, tokenizer=str(folder), batch_size=batch)

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits [B, S, V] of ids [B, S]; padding lies on the right, where nothing sees it."""
        assert attn_mask is None and labels is None
        with torch.no_grad():
            logits = self.ours(inps)
        assert isinstance(logits, Tensor)
        return logits

    def _model_generate(self, *arguments: Any, **options: Any) -> Tensor:
        if isinstance(self._model, SimpleNamespace):
            self._model = self._plain().to(self.context.device).eval()
        with torch.no_grad():
            generated: Tensor = super()._model_generate(*arguments, **options)
        return generated

    def _plain(self) -> Any:
        """The model in plain transformers, which generates with a cache."""
        if not self.saved:
            return AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)
        # The folder holds the tokenizer of a run, and other weights than those of its steps.
        state = {name: value.detach() for name, value in self.ours.named_parameters()}
        with TemporaryDirectory() as place:
            path = Path(place) / "model"
            save_model(self.ours.config, state, path, tokenizer_from=self.folder, dtype=self.dtype)
            return AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype)

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
        return super()._loglikelihood_tokens(requests, **(options | {"disable_tqdm": True}))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        answers = self._shared(super().loglikelihood, requests)
        self.has_nan |= any(score != score for score, _ in answers)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        answers = self._shared(super().loglikelihood_rolling, requests)
        self.has_nan |= any(score != score for score in answers)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._shared(super().generate_until, requests)

    def _shared(self, method: Any, requests: list[Any]) -> list[Any]:
        """What `method` answers to all requests, on every rank."""
        rank, world = self.context.rank, self.context.world
        mine = requests[rank::world]
        with Progress(self.description, total=len(mine), unit="request", transient=True) as bar:
            self.set_cache_hook(_Advance(bar))
            parts = self.context.gather(method(mine, disable_tqdm=True) if mine else [])
        answers: list[Any] = [None] * len(requests)
        for index, part in enumerate(parts):
            answers[index::world] = part
        return answers


class _Advance(CacheHook):
    """Told of every answer, it shows progress."""

    def __init__(self, bar: Progress) -> None:
        super().__init__(None)
        self.bar = bar

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.bar.update()


def measure(model: TaskModel, loaded: Loaded, limit: int | None) -> dict[str, dict[str, Any]]:
    """Results of loaded tasks and their groups by name: {metric: value, metric_stderr, n, shots,
    version}, as lm-eval's command gives them. On every rank."""
    _seed()
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)
    found: Any = evaluator.evaluate(model, loaded, limit=limit, log_samples=False)
    rows = {}
    for name, values in found["results"].items():
        numbers = _numbers(values)
        if numbers:
            rows[name] = numbers | {
                "n": values.get("sample_len"),
                "shots": found["n-shot"].get(name),
                "version": found["versions"].get(name),
            }
    return rows


def read_task_files(folder: Path) -> str:
    """Hash of the task files in a folder and of the Python files beside them.

    Raises InputError where there are none, or one cannot be read.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise InputError(f"--task-files {folder}: {found}; name a folder with .yaml files")
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".py"))
    if not any(path.suffix == ".yaml" for path in paths):
        raise InputError(f"--task-files {folder}: holds no .yaml file; name a folder of task files")
    digest = hashlib.sha256()
    for path in paths:
        try:
            text = read_text(path, "mend it, or move it elsewhere")
            if path.suffix == ".yaml":
                _parse(path, text)
        except InputError as error:
            raise InputError(f"--task-files {error}") from None
        digest.update(f"{path.relative_to(folder)} {len(text)} {text}".encode())
    return digest.hexdigest()[:16]


class _TaskFile(yaml.SafeLoader):
    """YAML with lm-eval's tags, such as !function, which stay text."""


_TaskFile.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


def _parse(path: Path, text: str) -> None:
    try:
        content = yaml.load(text, _TaskFile)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no settings of a task; write `task: NAME` and the others")
    for name in _texts(content.get("include")):
        if not (path.parent / name).is_file():
            raise InputError(f"{path}: includes {name}, which is not there; bring it along")


def _members(entry: Any) -> Sequence[Any]:
    """What a group or tag consists of: names, or settings with a name."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else ()
    return members if isinstance(members, list) else ()


def _name_of(member: Any) -> str | None:
    """The task or group that a group refers to; None where it describes one itself."""
    if isinstance(member, str):
        return member
    name = member.get("task", member.get("group"))
    return name if isinstance(name, str) and "dataset_path" not in member else None


def _files_of(text: str) -> list[Path]:
    """The files that a task's settings name by `text`: one, those of a folder, or of a pattern;
    none for a name on the hub."""
    path = Path(text)
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(text, recursive=True))  # noqa: PTH207 - a whole path
    return sorted(file for file in found if file.is_file())


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _unknown(name: str, known: Sequence[str], files: Path | None) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    advice = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
    place = f", nor is it in {files}" if files else ""
    own = "" if files else " Tasks of your own are found with --task-files"
    return f"--tasks {name}: lm-eval {version('lm_eval')} knows no such task{place}; {advice}{own}"


def _refuse_unusable(name: str, leaf: str, config: dict[str, Any], shots: int | None) -> None:
    if config.get("unsafe_code"):
        raise InputError(
            f"--tasks {name}: {leaf} runs code that the model writes; leave it out here, and run "
            "it with lm-eval's own command on the model's folder, in a closed environment"
        )
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise InputError(f"--tasks {name}: {leaf} needs images or sound; name tasks of text")
    if shots and config.get("num_fewshot") == 0:
        raise InputError(
            f"--shots {shots}: {leaf} has no examples by definition; leave out --shots or the task"
        )


def _require_examples(name: str, leaf: str, task: Any) -> None:
    """Raises InputError where a task has fewer solved examples than are to stand in front of a
    question."""
    shots = task.get_config("num_fewshot") or 0
    if not shots:
        return
    found = task.fewshot_docs()
    found = len(found) if hasattr(found, "__len__") else sum(1 for _ in found)
    # Where they are drawn from the questions themselves, the one that is asked is left out.
    own = task.get_config("fewshot_split") in (None, task.get_config("test_split"))
    usable = found - (own and not task.has_training_docs() and not task.has_validation_docs())
    if shots > usable:
        raise InputError(
            f"--tasks {name}: {leaf} has {usable} solved examples, and {shots} are to stand in "
            f"front of each question; use --shots {max(0, usable)} or fewer"
        )


def _numbers(values: dict[str, Any]) -> dict[str, float | None]:
    """Metrics and their standard errors. One that was taken behind several filters has the
    filter's name in brackets."""
    keys = [key.split(",", 1) for key in values if "," in key]
    filters = Counter(metric for metric, _ in keys)
    numbers: dict[str, float | None] = {}
    for metric, chosen in keys:
        bare = metric.removesuffix("_stderr")
        name = bare if filters[metric] == 1 else f"{bare} ({chosen})"
        value = values[f"{metric},{chosen}"]
        number = float(value) if isinstance(value, int | float | np.number) else None
        numbers[name + metric[len(bare) :]] = number
    return numbers


@contextmanager
def _unsaid() -> Iterator[None]:
    """Keeps lm-eval from warning of a model that it did not load itself."""
    log = logging.getLogger(HFLM.__module__)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _seed() -> None:
    """As lm-eval's command does before it loads tasks, so that no task depends on others."""
    random.seed(FIRST_SEED)
    np.random.seed(SEED)  # noqa: NPY002
    torch.manual_seed(SEED)
