"""Model, text and tokens for disturbed runs, and finished runs whose files are damaged."""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from data.log import LEVEL_VARIABLE, set_level
from tests.factories import documents, write_model, write_tokenizer, write_tokens

FILES = 6
TRAINING = (
    *("--seq-len", "32", "--global-batch", "4", "--micro-batch", "2", "--threads", "1"),
    *("--eval-sequences", "2", "--lr", "3e-3"),
)
TARGET = ("--target", "layers=1,heads=2,kv-heads=1,ffn=24")
MEASURING = ("--calibration-sequences", "4", "--reference-sequences", "2")


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder with text/, tokenizer/, model/ and tokens/; runs/ where they were asked for."""

    root: Path

    @property
    def text(self) -> Path:
        return self.root / "text"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def tokens(self) -> Path:
        return self.root / "tokens"

    @property
    def sheared(self) -> Path:
        """Output folder of a finished shearing run of 6 steps."""
        return self.root / "runs" / "sheared"

    @property
    def trained(self) -> Path:
        """Output folder of a finished run of continued pre-training of 6 steps."""
        return self.root / "runs" / "trained"

    def tokenize_words(self, output: Path) -> list[str]:
        """Arguments of data.tokenize for `text`."""
        return [
            *("--input", str(self.text), "--tokenizer", str(self.tokenizer)),
            *("--output", str(output), "--seq-len", "32", "--held-out", "0.1"),
        ]

    def shear_words(self, output: Path, steps: int, save_interval: int) -> list[str]:
        """Arguments of pruner.shear."""
        words = ["--source", str(self.model), *TARGET, *MEASURING]
        return [*words, *self._training(output, steps, save_interval)]

    def cpt_words(self, output: Path, steps: int, save_interval: int) -> list[str]:
        """Arguments of launch/cpt.py."""
        return ["--model", str(self.model), *self._training(output, steps, save_interval)]

    def finetune_words(self, output: Path, steps: int, save_interval: int) -> list[str]:
        """Arguments of launch/finetune.py: adapters, or the last block where peft is missing."""
        method = "lora" if find_spec("peft") else "last-blocks"
        words = ["--model", str(self.model), "--method", method, "--last-blocks", "1"]
        return [*words, *self._training(output, steps, save_interval)]

    def _training(self, output: Path, steps: int, save_interval: int) -> list[str]:
        return [
            *("--data", str(self.tokens), "--output", str(output), "--steps", str(steps)),
            *("--save-interval", str(save_interval), *TRAINING),
        ]


def make_inputs(root: Path) -> Workspace:
    """Text in several files, tokenizer, model and tokens."""
    made = Workspace(root)
    made.text.mkdir(parents=True)
    for number in range(FILES):
        records = [
            record for domain in ("alpha", "beta") for record in documents(domain, 40, seed=number)
        ]
        lines = "\n".join(json.dumps(record) for record in records)
        (made.text / f"{number}.jsonl").write_text(lines + "\n", encoding="utf-8")
    write_tokenizer(made.tokenizer)
    write_model(made.model, made.tokenizer)
    with contextlib.redirect_stdout(io.StringIO()):
        write_tokens(made.tokens, made.tokenizer, seq_len=32)
    return made


def make_workspace(root: Path) -> Workspace:
    """The inputs, and a finished run of each command that trains, made in this process."""
    from launch.cpt import main as cpt
    from pruner.shear import main as shear

    made = make_inputs(root)
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        shear(made.shear_words(made.sheared, 6, 2))
        cpt(made.cpt_words(made.trained, 6, 2))
    return made


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Shows errors only while the block runs."""
    set_level("error")
    try:
        yield
    finally:
        set_level("info")
        del os.environ[LEVEL_VARIABLE]
