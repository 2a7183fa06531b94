"""A model's tokenizer as GGUF keeps it: tokens with their kinds, merges or scores, special ids."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.log import logger
from data.records import is_kind, read_json
from data.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTE_LEVEL = "ByteLevel"
PRE_TOKENIZERS = {
    (("Split", _LLAMA_3), (_BYTE_LEVEL, "False")): "llama-bpe",
    (("Split", _QWEN_2), (_BYTE_LEVEL, "False")): "qwen2",
    (("Digits", "True"), (_BYTE_LEVEL, "True")): "smollm",
    ((_BYTE_LEVEL, "True"),): "gpt-2",
}
"""llama.cpp's name for each way of splitting text in front of byte-level BPE."""
UNUSED = "[PAD{}]"
"""The token of an id that the model has a row for and the tokenizer has not."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer of a model folder, read and checked."""

    folder: Path
    kind: str
    """llama.cpp's name of the algorithm: "gpt2", byte-level BPE; "llama", sentencepiece."""
    pre: str
    """Its name for how text is split before; "default" for sentencepiece."""
    tokens: list[bytes]
    types: list[int]
    scores: list[float] | None
    adds_bos: bool
    ends: list[int]
    """Ids at which generation stops, by generation_config.json."""
    adds_space: bool
    """A space goes in front of a text (sentencepiece)."""

    def add_to(self, writer: "GGUFWriter") -> None:
        """Writes it."""
        from gguf import SpecialVocab

        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.adds_space)
        logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
        special = SpecialVocab(
            self.folder, load_merges=self.kind == "gpt2", n_vocab=len(self.tokens)
        )
        special.add_special_token["bos"] = self.adds_bos
        # What else ends a text, such as the token that ends a turn.
        ends = [end for end in self.ends if end != special.special_token_ids.get("eos")]
        for name, end in zip(("eot", "eom"), ends, strict=False):
            special.special_token_ids.setdefault(name, end)
        special.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer of a model whose embedding has `rows`. Raises InputError for one that llama.cpp
    has no name for, and without one."""
    settings = read_json(folder / "tokenizer_config.json", "") if _has_settings(folder) else {}
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json", "fetch it again", keys={"model": dict})
        if content["model"].get("type") != "BPE":
            raise InputError(
                f"{folder / 'tokenizer.json'}: is of type {content['model'].get('type')}, and "
                "llama.cpp's BPE and sentencepiece are written; convert it with llama.cpp's own "
                "convert_hf_to_gguf.py"
            )
        return _from_json(folder, content, settings, rows)
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder, settings, rows)
    raise InputError(
        f"{folder} holds no tokenizer that GGUF can keep: copy tokenizer.json or tokenizer.model "
        "there, with tokenizer_config.json, from the model that it was made from"
    )


def _has_settings(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _ends(folder: Path) -> list[int]:
    file = folder / "generation_config.json"
    found = read_json(file, "correct it").get("eos_token_id") if file.is_file() else None
    ends = found if isinstance(found, list) else [found]
    return [int(end) for end in ends if end is not None and is_kind(end, int)]


def _from_json(
    folder: Path, content: dict[str, Any], settings: dict[str, Any], rows: int
) -> Vocabulary:
    from gguf import TokenType

    own = load_tokenizer(folder)
    pieces: dict[int, str] = {index: text for text, index in content["model"]["vocab"].items()}
    added = {one["id"]: one for one in content.get("added_tokens", [])}
    pieces |= {index: one["content"] for index, one in added.items()}
    fallback = bool(content["model"].get("byte_fallback"))
    unknown = settings.get("unk_token") or content["model"].get("unk_token")
    unknown = unknown.get("content") if isinstance(unknown, dict) else unknown
    _require_rows(folder, pieces, rows)
    strips = [
        one["content"]
        for one in added.values()
        if any(one.get(name) for name in ("lstrip", "rstrip", "single_word"))
    ]
    if strips:
        logger.warning(
            f"{folder / 'tokenizer.json'}: {', '.join(map(repr, strips[:4]))} take the blanks "
            "beside them in, or are whole words alone, and GGUF cannot say so: beside blanks "
            "llama.cpp gives other tokens there"
        )
    tokens, types = [], []
    for index in range(rows):
        text = pieces.get(index, UNUSED.format(index))
        kind = TokenType.NORMAL if index in pieces else TokenType.UNUSED
        if index in added:
            special = added[index].get("special")
            kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
            if fallback and text == unknown:
                kind = TokenType.UNKNOWN
        elif fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = TokenType.BYTE
        tokens.append(text.encode())
        types.append(int(kind))
    # Of sentencepiece's merges those with the lower id come first.
    scores = [-float(index) for index in range(rows)] if fallback else None
    return Vocabulary(
        folder=folder,
        kind="llama" if fallback else "gpt2",
        pre="default" if fallback else _pre_tokenizer(folder, content),
        tokens=tokens,
        types=types,
        scores=scores,
        adds_bos=own.adds_bos,
        ends=_ends(folder),
        adds_space=fallback and _prepends(content),
    )


def _prepends(content: dict[str, Any]) -> bool:
    """Whether a space goes in front of a text, by the tokenizer's normalizer or splitter."""
    steps = _steps(content.get("normalizer")) + _steps(content.get("pre_tokenizer"))
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _steps(part: Any) -> list[dict[str, Any]]:
    """The members of a part of tokenizer.json, which may be a sequence of them."""
    if not isinstance(part, dict):
        return []
    members = part.get("pretokenizers") or part.get("normalizers")
    return [one for member in members for one in _steps(member)] if members else [part]


def _pre_tokenizer(folder: Path, content: dict[str, Any]) -> str:
    found = []
    for step in _steps(content.get("pre_tokenizer")):
        kind = step.get("type")
        value = {
            "Split": step.get("pattern", {}).get("Regex"),
            "Digits": step.get("individual_digits"),
            _BYTE_LEVEL: step.get("use_regex", True),
        }.get(str(kind))
        found.append((str(kind), str(value)))
    name = PRE_TOKENIZERS.get(tuple(found))
    if name is None:
        raise InputError(
            f"{folder / 'tokenizer.json'}: splits text by {', '.join(kind for kind, _ in found)} "
            "in a way that is none of those whose names in llama.cpp are known here "
            f"({', '.join(PRE_TOKENIZERS.values())}): under another name it would give other "
            "tokens. Convert it with llama.cpp's own convert_hf_to_gguf.py"
        )
    return name


def _from_sentencepiece(folder: Path, settings: dict[str, Any], rows: int) -> Vocabulary:
    import sentencepiece
    from gguf import TokenType

    own = load_tokenizer(folder)
    processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    pieces = {index: processor.id_to_piece(index) for index in range(processor.vocab_size())}
    scores = [processor.get_score(index) for index in pieces]
    added = {int(index): one for index, one in settings.get("added_tokens_decoder", {}).items()}
    extra = {index: one["content"] for index, one in added.items() if index not in pieces}
    _require_rows(folder, pieces | extra, rows)
    types = [
        int(
            TokenType.UNKNOWN
            if processor.is_unknown(index)
            else TokenType.CONTROL
            if processor.is_control(index)
            else TokenType.BYTE
            if processor.is_byte(index)
            else TokenType.UNUSED
            if processor.is_unused(index)
            else TokenType.NORMAL
        )
        for index in pieces
    ]
    for index in range(len(pieces), rows):
        kind = TokenType.UNUSED
        if index in extra:
            kind = TokenType.CONTROL if added[index].get("special") else TokenType.USER_DEFINED
        types.append(int(kind))
        scores.append(-1000.0)
    tokens = [(pieces | extra).get(index, UNUSED.format(index)).encode() for index in range(rows)]
    return Vocabulary(
        folder=folder,
        kind="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        adds_bos=own.adds_bos,
        ends=_ends(folder),
        adds_space=bool(settings.get("add_prefix_space", True)),
    )


def _require_rows(folder: Path, pieces: dict[int, str], rows: int) -> None:
    """llama.cpp reads as many tokens as the embedding has rows."""
    beyond = sorted(index for index in pieces if index >= rows)
    if beyond:
        raise InputError(
            f"the tokenizer of {folder} has the id {beyond[0]} ({pieces[beyond[0]]!r}), for which "
            f"the model has no row: it has {rows}; fetch the tokenizer that it was trained with, "
            "or remove the tokens that were added"
        )
