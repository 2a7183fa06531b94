"""What a run's options name, opened and checked: the model's folder, the tokenized data."""

from collections.abc import Callable
from pathlib import Path

from data.errors import InputError
from data.machine import available_cores
from data.manifest import FILE_NAME, HELD_OUT
from data.reader import TokenReader
from data.tokenizers import load_tokenizer
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig
from trainer.models.sources import TOKENIZER_FILES

TEXT_FOLDER = "SlimPajama-627B"


def find_model_with_data(find: Callable[[], Path], data: str, seq_len: int, tokenizer: str) -> Path:
    """The model folder that `find` finds.

    Where that fails and there is no tokenized data in `data` either, one InputError says how to get
    both. `tokenizer` is the tokenizer to name then.
    """
    try:
        return find()
    except InputError as error:
        missing = missing_data(data, seq_len, tokenizer)
        if missing is None:
            raise
        raise InputError(f"model and data are both missing.\n1. {error}\n2. {missing}") from error


def missing_data(data: str, seq_len: int, tokenizer: Path | str) -> str | None:
    """How to make tokenized data in the folder `data`, or None where it is there."""
    if (Path(data) / FILE_NAME).is_file():
        return None
    return (
        f"--data {data}: no tokenized data there. Fetch text and tokenize it:\n"
        "    hf download cerebras/SlimPajama-627B --repo-type dataset --include 'train/chunk1/*' "
        f"--local-dir {TEXT_FOLDER}\n"
        f"    python -m data.tokenize --input '{TEXT_FOLDER}/train/**/*.jsonl.zst' "
        f"--tokenizer {tokenizer} --output {data} --seq-len {seq_len} "
        f"--workers {available_cores()}\n"
        "  (or give data.tokenize text of your own: .jsonl, .txt or .parquet)"
    )


def open_data(
    data: str, config: TrainConfig, model: ModelConfig, source: Path
) -> tuple[TokenReader, TokenReader | None]:
    """Opens the training split, and the held-out split unless it is too short or not asked for.

    Raises InputError when there is no tokenized data, when it cannot feed `model` at
    `config.seq_len`, or when the tokenizer in the model folder `source` is not the one that made
    it.
    """
    folder = Path(data)
    missing = missing_data(data, config.seq_len, source)
    if missing is not None:
        raise InputError(missing)
    if config.seq_len > model.max_position_embeddings:
        raise InputError(
            f"--seq-len {config.seq_len} is longer than the model's "
            f"{model.max_position_embeddings} positions; use --seq-len "
            f"{model.max_position_embeddings} or less"
        )
    reader = TokenReader(folder, config.seq_len)
    check_tokenizer(reader, model, source, data)
    longest = max(reader.manifest.tokens(HELD_OUT).values(), default=0)
    if not config.eval_sequences or longest < config.seq_len:
        return reader, None
    return reader, TokenReader(folder, config.seq_len, split=HELD_OUT)


def check_tokenizer(reader: TokenReader, model: ModelConfig, source: Path, data: str) -> None:
    """Raises InputError when the tokens of `reader` are not those of the model in `source`."""
    used = reader.manifest.tokenizer
    if used.vocab_size > model.vocab_size:
        raise InputError(
            f"--data {data} was tokenized with {used.vocab_size} ids, the model has "
            f"{model.vocab_size}; tokenize again with --tokenizer {source}"
        )
    if not any((source / name).exists() for name in TOKENIZER_FILES):
        return
    if load_tokenizer(source).probe() != used.probe:
        raise InputError(
            f"--data {data} was tokenized by another tokenizer than the model's: the same text "
            f"gives other ids; tokenize again with --tokenizer {source}"
        )
