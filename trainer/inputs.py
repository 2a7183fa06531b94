"""What a run's options name, opened and checked: the model's folder, the tokenized data."""

from collections.abc import Callable
from pathlib import Path

from data.chat_templates import ChatTemplate
from data.errors import InputError, MissingInput
from data.hub import is_offline
from data.log import logger
from data.machine import available_cores
from data.manifest import FILE_NAME, HELD_OUT, Manifest, TokenizerRecord, why_no_tokens
from data.paths import quoted
from data.places import EMPTY_FOLDER, odd_name, what_is
from data.reader import Documents, TokenReader
from data.tokenizers import HuggingFaceTokenizer, Tokenizer, holds_tokenizer, load_tokenizer
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig

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
        text = f"model and data are both missing.\n1. {error}\n2. {missing}"
        raise (MissingInput if isinstance(error, MissingInput) else InputError)(text) from error


def missing_data(data: str, seq_len: int, tokenizer: Path | str) -> str | None:
    """How to make tokenized data in the folder `data`, or None where it is there."""
    folder = Path(data)
    if (folder / FILE_NAME).is_file():
        return None
    if what_is(folder) not in ("", EMPTY_FOLDER) or odd_name(data, patterns=False):
        return f"--data {data}: {why_no_tokens(folder)}"
    where = " on a machine that may use the network, copy it here" if is_offline() else ""
    return (
        f"--data {data}: no tokenized data there. Fetch text{where} and tokenize it:\n"
        "    hf download cerebras/SlimPajama-627B --repo-type dataset --include 'train/chunk1/*' "
        f"--local-dir {TEXT_FOLDER}\n"
        f"    python -m data.tokenize --input '{TEXT_FOLDER}/train/**/*.jsonl.zst' "
        f"--tokenizer {quoted(tokenizer)} --output {quoted(data)} --seq-len {seq_len} "
        f"--workers {available_cores()}\n"
        "  (or give data.tokenize text of your own: .jsonl, .txt or .parquet)"
    )


def open_data(
    data: str,
    config: TrainConfig,
    model: ModelConfig,
    source: Path,
    documents: Documents | None = "joined",
) -> tuple[TokenReader, TokenReader | None]:
    """Opens the training split, and the held-out split unless it is too short or not asked for;
    both read `documents` as TokenReader takes them.

    Raises InputError when there is no tokenized data, when it cannot feed `model` at
    `config.seq_len`, or when the tokenizer in the model folder `source` is not the one that made
    it.
    """
    folder = Path(data)
    missing = missing_data(data, config.seq_len, source)
    if missing is not None:
        raise MissingInput(missing)
    require_positions(config.seq_len, model)
    reader = TokenReader(folder, config.seq_len, documents=documents)
    check_tokenizer(reader, model, source, data)
    longest = max(reader.manifest.tokens(HELD_OUT).values(), default=0)
    if not config.eval_sequences or longest < config.seq_len:
        return reader, None
    return reader, TokenReader(folder, config.seq_len, split=HELD_OUT, documents=documents)


def warn_of_no_tokenizer(source: Path) -> None:
    """Says that the model in `source` comes without a tokenizer."""
    if not holds_tokenizer(source):
        logger.warning(
            f"{source} holds no tokenizer: the data is taken for its own, and the model that is "
            "written will hold none either; copy the tokenizer's files there to have the one "
            "checked and the other kept"
        )


def require_positions(seq_len: int, model: ModelConfig) -> None:
    """Raises InputError for sequences that are longer than `model` was made for."""
    most = model.max_position_embeddings
    if seq_len > most:
        raise InputError(
            f"--seq-len {seq_len} is longer than the model's {most} positions; use --seq-len "
            f"{most} or less"
        )


def check_tokenizer(reader: TokenReader, model: ModelConfig, source: Path, data: str) -> None:
    """Raises InputError when the tokens of `reader` are not those of the model in `source`."""
    used = reader.manifest.tokenizer
    own = load_tokenizer(source) if holds_tokenizer(source) else None
    if own is not None and own.probe() != used.probe:
        raise InputError(
            f"--data {data} was tokenized by another tokenizer than the model's: the same text "
            f"gives other ids; tokenize again with --tokenizer {source}"
        )
    _require_rows_at_ends(used, own, model.vocab_size, source, data)
    chat = reader.manifest.chat
    if own is not None and chat is not None:
        _check_chat(reader.manifest, own, source, data)
    elif own is not None:
        _warn_of_other_ends(used, own, model.vocab_size, source, data)
    if used.vocab_size <= model.vocab_size:
        return
    if chat is not None:
        raise InputError(
            f"--data {data} holds conversations, in which any special token may stand, and its "
            f"tokenizer has {used.vocab_size} ids, the model {model.vocab_size}: give the model "
            "rows for them (resize_token_embeddings of transformers, then save_pretrained), or "
            "remove the added tokens from the tokenizer and tokenize again"
        )
    # Special tokens that were added without a row for them do no harm: they are never in the data.
    if own is None or not _made(own, used) or own.largest_id >= model.vocab_size:
        raise InputError(
            f"--data {data} was tokenized with {used.vocab_size} ids, the model has "
            f"{model.vocab_size}; {_more_ids(own, used, model.vocab_size, source)}"
        )
    logger.warning(
        f"the tokenizer of {source} has {own.vocab_size} ids, the model {model.vocab_size}: the "
        "special ids beyond are never in the data, and the model cannot read them"
    )


def _check_chat(manifest: Manifest, own: Tokenizer, source: Path, data: str) -> None:
    """Raises InputError where the model's tokenizer would write conversations in other ids than it
    is trained on: where it lacks special tokens, or ends answers with another."""
    used, chat = manifest.tokenizer, manifest.chat
    assert chat is not None
    fix = (
        f"copy the files of the tokenizer that they were made with to {source}, or tokenize them "
        f"again with --tokenizer {source}"
    )
    if own.vocab_size < used.vocab_size or not isinstance(own, HuggingFaceTokenizer):
        raise InputError(
            f"--data {data} holds conversations, in which any special token may stand, and the "
            f"tokenizer of {source} has {own.vocab_size} ids, theirs {used.vocab_size}: {fix}"
        )
    template = ChatTemplate(chat.template_name, chat.template, dict(own.special_tokens))
    (end,) = own.encode_special([template.require_usable()])
    if chat.end_of_turn is not None and end.ids.tolist() != [chat.end_of_turn]:
        raise InputError(
            f"--data {data} holds conversations whose answers end with the id {chat.end_of_turn}, "
            f"and the tokenizer of {source} ends them with {end.ids.tolist()}: {fix}"
        )


def _made(own: Tokenizer, used: TokenizerRecord) -> bool:
    """Whether `own` has all the tokens that the data can hold, and tells which are special."""
    return own.fingerprint == used.fingerprint and own.vocab_size >= used.vocab_size


def _require_rows_at_ends(
    used: TokenizerRecord, own: Tokenizer | None, rows: int, source: Path, data: str
) -> None:
    """Raises InputError when documents begin or end with an id that the model has no row for."""
    ends = [
        ("end-of-sequence", "ends", "eos_token", used.eos_id, None if own is None else own.eos_id)
    ]
    if used.adds_bos and used.bos_id is not None:
        ends.append(("beginning-of-sequence", "begins", "bos_token", used.bos_id, _bos(own)))
    for name, verb, token, found, now in ends:
        if found < rows:
            continue
        fix = f"tokenize again with the model's own: --tokenizer {source}"
        if own is None:
            fix = f"fetch the model's own tokenizer (tokenizer.json) to {source}, and {fix}"
        elif now is not None and now >= rows:
            fix = f"{_set_token(token, source)} and tokenize again"
        raise InputError(
            f"--data {data} does not fit the model, which has rows for the ids below {rows}: "
            f"the {name} token, which {verb} every document, is id {found}: {fix}"
        )


def _bos(own: Tokenizer | None) -> int | None:
    """The id that a tokenizer begins documents with."""
    return own.bos_id if own is not None and own.adds_bos else None


def _set_token(token: str, source: Path) -> str:
    return f"set {token} in {source}/tokenizer_config.json to one that the model was trained with"


def _warn_of_other_ends(
    used: TokenizerRecord, own: Tokenizer, rows: int, source: Path, data: str
) -> None:
    """Says where the model's own tokenizer would begin or end documents otherwise."""
    if own.eos_id != used.eos_id:
        fix = f"Where it should be {own.eos_id}, tokenize again with --tokenizer {source}"
        if own.eos_id >= rows:
            fix = f"The model has no row for {own.eos_id}: {_set_token('eos_token', source)}"
        logger.warning(
            f"the documents of --data {data} end with id {used.eos_id}, and the tokenizer of "
            f"{source} ends with {own.eos_id}: what is trained on them learns to end with "
            f"{used.eos_id}. {fix}"
        )
    then, now = used.bos_id if used.adds_bos else None, _bos(own)
    if then != now:
        words = ["without BOS" if number is None else f"with id {number}" for number in (then, now)]
        fix = f"Where they should begin so, tokenize again with --tokenizer {source}"
        if now is not None and now >= rows:
            fix = f"The model has no row for {now}: {_set_token('bos_token', source)}"
        logger.warning(
            f"the documents of --data {data} begin {words[0]}, and the tokenizer of {source} "
            f"begins them {words[1]}. {fix}"
        )


def _more_ids(own: Tokenizer | None, used: TokenizerRecord, rows: int, source: Path) -> str:
    """What helps where a tokenizer makes ids that the model has no rows for."""
    if own is None:
        return (
            f"fetch the model's own tokenizer (tokenizer.json) to {source}, and tokenize again "
            f"with --tokenizer {source}"
        )
    if own.eos_id >= rows:
        return (
            f"the tokenizer of {source} ends documents with id {own.eos_id}: "
            f"{_set_token('eos_token', source)}"
        )
    if own.largest_id < rows:
        return f"tokenize again with the model's own: --tokenizer {source}"
    return (
        f"text can give ids up to {own.largest_id}. Remove the added tokens from "
        f"{source}/tokenizer.json and tokenize again, or give the model rows for them: "
        "resize_token_embeddings of transformers, then save_pretrained"
    )
