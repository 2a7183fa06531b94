"""Tokenizers behind one interface: sentencepiece models and Hugging Face folders.

Documents are encoded as plain text: "</s>" or "<|endoftext|>" inside a document gives the ids of
its characters, never the special token.
"""

import hashlib
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from data.errors import InputError, failure
from data.gguf import gguf_files, is_gguf, read_header
from data.hub import (
    cached_snapshot,
    id_of_page,
    is_hub_id,
    is_offline,
    may_be_hub_id,
    owner_of,
    pinned,
    split_revision,
)
from data.manifest import TokenizerRecord
from data.paths import require_utf8
from data.places import odd_name, what_is
from data.records import read_json, require_no_mark

# Runs of spaces, markup that looks like special tokens, several scripts, digits, a long word:
# where tokenizers that claim to be the same differ first.
PROBE_TEXT = (
    "The quick  brown   fox\njumps\tover 12,345.67 lazy dogs.\r\n\n  </s> <s> <unk> <|endoftext|> "
    "<|im_start|>user d\u00e9j\u00e0-vu stra\u00dfe \u03a9\u03bc\u03ad\u03b3\u03b1 "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u65e5\u672c\u8a9e \u0939\u093f\u0928\u094d\u0926\u0940 "
    "\U0001f642 \U0001f469\u200d\U0001f467 def f(x): return x**2 != 3\n"
    + "antidisestablishmentarianism" * 4
    + " "
)
HUB_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
)
# What holds a tokenizer, in the order in which it is looked for.
_JSON, _SENTENCEPIECE, _BPE = "tokenizer.json", "tokenizer.model", ("vocab.json", "merges.txt")
_RECORDS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TAKEN = (
    "give a sentencepiece .model file, a folder with tokenizer.json, or a name on the Hugging Face "
    "hub"
)
_FIX = "repair it or download it again"


class Placed(NamedTuple):
    """Ids of a text, each with its place there."""

    ids: np.ndarray
    """int64."""
    starts: np.ndarray
    """First character of each."""
    ends: np.ndarray
    """The character behind each."""


class Tokenizer(ABC):
    """Text to token ids and back."""

    kind: str
    """"sentencepiece" or "huggingface"."""
    vocab_size: int
    """Number of ids, special ones included."""
    bos_id: int | None
    eos_id: int
    largest_id: int
    """The largest id that a document can have: added special tokens never occur in text."""
    adds_bos: bool
    """Whether a document starts with BOS: what the tokenizer does by itself (as Llama's does)."""
    fingerprint: str
    """sha256 of the file that holds the vocabulary."""
    revision: str | None = None
    """ORG/NAME@COMMIT, where it was named by a hub id."""
    chat_template: str | None = None
    """How it writes conversations, in Jinja."""
    special_tokens: Mapping[str, str] = MappingProxyType({})
    """Special tokens by their names in chat templates, such as bos_token."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64, without special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""

    def probe(self) -> list[int]:
        """Ids of `PROBE_TEXT`; tokenizers that agree on it are taken to be the same."""
        return [int(token) for token in self.encode([PROBE_TEXT])[0]]

    def record(self) -> TokenizerRecord:
        """What a manifest keeps about this tokenizer."""
        return TokenizerRecord(
            kind=self.kind,
            fingerprint=self.fingerprint,
            vocab_size=self.vocab_size,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            adds_bos=self.adds_bos,
            probe=self.probe(),
        )


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; picklable.

    A converted tokenizer may differ from the model it came from (transformers 5 orders the merges
    of a lone tokenizer.model by id instead of score), so such files are read by sentencepiece
    itself.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, adds_bos: bool = True) -> None:
        import sentencepiece

        try:
            content = path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except OSError as error:
            raise InputError(f"{path}: {failure(error)}") from None
        except RuntimeError as error:
            raise InputError(
                f"{path} is not a sentencepiece model ({error}); give a .model file or a folder "
                "with tokenizer.json"
            ) from None
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size = int(self._processor.vocab_size())
        bos, eos = int(self._processor.bos_id()), int(self._processor.eos_id())
        self.bos_id = bos if bos >= 0 else None
        self.eos_id = _required_eos(eos if eos >= 0 else None, path)
        self.adds_bos = adds_bos and self.bos_id is not None
        self.largest_id = self.vocab_size - 1

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._processor.encode(list(texts), out_type=int, num_threads=1)
        return [np.asarray(ids, np.int64) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(token) for token in ids]))


class HuggingFaceTokenizer(Tokenizer):
    """A folder's tokenizer as transformers reads it; picklable, and needs only the `tokenizers`
    library once unpickled.

    Args:
        folder: holds tokenizer.json, or vocab.json and merges.txt, read by transformers'
            AutoTokenizer. Code that may lie there is never run.
        origin: what errors name in place of a folder that the user does not know.

    Raises:
        InputError: it cannot be read, has no end-of-sequence token, or gives other ids than the
            sentencepiece model in the same folder.
    """

    kind = "huggingface"

    def __init__(self, folder: Path, origin: Path | None = None) -> None:
        from transformers import AutoTokenizer

        for name in _RECORDS:
            if (folder / name).is_file():
                read_json(folder / name, _FIX)
        for name in (*_RECORDS, "config.json", _JSON, _BPE[0]):
            require_no_mark(folder / name)
        try:
            with _unsaid(folder):
                tokenizer = AutoTokenizer.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False
                )
            self._json = tokenizer.backend_tokenizer.to_str()
            self._load()
            self.chat_template = _usual(tokenizer.chat_template)
            named = tokenizer.special_tokens_map
            self.special_tokens = {n: t for n, t in named.items() if isinstance(t, str)}
            self.vocab_size = len(tokenizer)
            self.bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            with_special = tokenizer("a").input_ids
            self.probe()
        except Exception as error:  # transformers raises many types for a bad folder
            place = origin or folder
            raise InputError(f"no tokenizer can be read from {place}: {error}; {_FIX}") from None
        self.fingerprint = _fingerprint(folder)
        self.eos_id = _required_eos(eos_id, origin or folder)
        self.adds_bos = self.bos_id is not None and with_special[:1] == [self.bos_id]
        self.largest_id = self._largest_id()
        self._compare_with_sentencepiece(folder / _SENTENCEPIECE)

    def _largest_id(self) -> int:
        added = self._tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        usual = set(self._tokenizer.get_vocab().values()) - special
        first = self.bos_id if self.adds_bos and self.bos_id is not None else self.eos_id
        return max(usual | {self.eos_id, first})

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(entry.ids, np.int64) for entry in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(token) for token in ids]))

    def special_texts(self) -> list[str]:
        """What stands for special tokens in a text that `encode_special` takes."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return sorted(token.content for token in added if token.special)

    def encode_special(self, texts: Sequence[str]) -> list[Placed]:
        """Ids of texts in which special tokens stand for themselves, as chat templates write
        them."""
        self._tokenizer.encode_special_tokens = False
        try:
            encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        places = [np.asarray(entry.offsets, np.int64).reshape(-1, 2) for entry in encoded]
        return [
            Placed(np.asarray(entry.ids, np.int64), place[:, 0], place[:, 1])
            for entry, place in zip(encoded, places, strict=True)
        ]

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key != "_tokenizer"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._load()

    def _load(self) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(self._json)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def _compare_with_sentencepiece(self, path: Path) -> None:
        if not path.is_file():
            return
        try:
            original = SentencePieceTokenizer(path)
        except InputError:
            return  # some families give their own format the same file name
        if original.probe() != self.probe():
            raise InputError(
                f"{path.parent}: tokenizer.json and tokenizer.model give different ids for the "
                f"same text; choose one: --tokenizer {path}, or a folder with tokenizer.json alone"
            )


def holds_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` finds files of a tokenizer in `folder`."""
    single = any((folder / name).is_file() for name in (_JSON, _SENTENCEPIECE))
    return single or all((folder / name).is_file() for name in _BPE)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        path: a sentencepiece .model file; a .gguf file, or a folder with exactly one; a Hugging
            Face folder with tokenizer.json, with
            tokenizer.model alone, or with vocab.json and merges.txt; the output folder of a run,
            whose model holds one of these; or a name on the Hugging Face
            hub (from the local cache, else downloaded), with @ and a branch, tag or commit for
            another than its newest state.

    Raises:
        InputError: there is no tokenizer, or it has no end-of-sequence token.
    """
    require_utf8(path)
    place = Path(path)
    if place.exists():
        return _from_place(place, path)
    place = _from_hub(str(path))
    tokenizer = _from_place(place, path)
    tokenizer.revision = pinned(path, place)
    return tokenizer


def _from_place(place: Path, path: Path | str) -> Tokenizer:
    """The tokenizer in the file or folder `place`, which the user named `path`."""
    if place.name in (_JSON, *_BPE):
        place = place.parent
    if not holds_tokenizer(place) and holds_tokenizer(place / "model"):
        place = place / "model"
    if is_gguf(place):
        return _from_gguf(place)
    if place.is_file():
        _require_no_other_file(place)
        return SentencePieceTokenizer(place)
    if not place.is_dir():
        raise InputError(f"{path} is a pipe or a device; {_TAKEN}")
    if (place / _JSON).is_file():
        return HuggingFaceTokenizer(place)
    if (place / _SENTENCEPIECE).is_file():
        return SentencePieceTokenizer(place / _SENTENCEPIECE, _configured_bos(place))
    if holds_tokenizer(place):
        return HuggingFaceTokenizer(place)
    files = gguf_files(place)
    if len(files) == 1:
        return _from_gguf(files[0])
    cached = cached_snapshot(place)
    if cached is not None:
        raise InputError(f"{path} is a folder of the hub's cache: name the model in it, {cached}")
    if files:
        raise InputError(f"{path} holds {len(files)} GGUF files; name one of them")
    raise InputError(
        f"{path} holds neither tokenizer.json nor tokenizer.model, nor vocab.json with merges.txt"
        f"{_instead(place)}; give a folder with one of them or a sentencepiece .model file"
    )


def _require_no_other_file(path: Path) -> None:
    """Raises InputError for a file that is known to be no sentencepiece model."""
    found = what_is(path)
    if path.suffix != ".model" and found != "a file":
        raise InputError(f"{path} is {found}, and no tokenizer{_instead(path.parent)}; {_TAKEN}")


def _instead(folder: Path) -> str:
    """What a folder without a tokenizer is, and where in it there are some."""
    if holds_tokenizer(folder):
        return f" (that is in {folder})"
    inner = [place.parent for name in (_JSON, _SENTENCEPIECE) for place in folder.glob(f"*/{name}")]
    if inner:
        return f" ({min(inner)} does)"
    found = what_is(folder)
    return f" (it is {found})" if found else ""


def _from_gguf(path: Path) -> Tokenizer:
    """The tokenizer inside a GGUF file, as the folder has it that the file is converted to."""
    if find_spec("gguf") is None:
        raise InputError(f"reading {path} needs gguf: pip install gguf")
    read_header(path, {})
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        try:
            AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False
            ).save_pretrained(folder)
        except Exception as error:  # transformers raises many types for a file it cannot read
            raise InputError(
                f"no tokenizer can be read from {path}: {error or type(error).__name__}; give a "
                "folder with tokenizer.json"
            ) from None
        return HuggingFaceTokenizer(Path(folder), path)


def _usual(template: object) -> str | None:
    """The template for conversations without tools, where a tokenizer has several by name."""
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _fingerprint(folder: Path) -> str:
    """sha256 of tokenizer.json, or of vocab.json and merges.txt where there is none."""
    names = (_JSON,) if (folder / _JSON).is_file() else _BPE
    digest = hashlib.sha256()
    for name in names:
        try:
            digest.update((folder / name).read_bytes())
        except OSError as error:
            raise InputError(f"{folder / name}: {failure(error)}") from None
    return digest.hexdigest()


def _configured_bos(folder: Path) -> bool:
    """Whether tokenizer_config.json lets BOS be added, the default where it does not say."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return True
    return bool(read_json(path, _FIX).get("add_bos_token", True))


@contextmanager
def _unsaid(folder: Path) -> Iterator[None]:
    """Keeps transformers from warning of a model's class that it does not know, where the folder
    brings its own: tokenizers have nothing to do with it."""
    from transformers.utils import logging

    config = folder / "config.json"
    if not config.is_file() or "auto_map" not in read_json(config, _FIX):
        yield
        return
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _required_eos(eos_id: int | None, path: Path) -> int:
    if eos_id is None:
        which = "its tokenizer_config.json, to a token that the model was trained with"
        fix = f"set eos_token in {which}"
        if path.is_file():
            fix = f"give a folder with tokenizer.json, and eos_token in {which}"
        raise InputError(
            f"the tokenizer {path} has no end-of-sequence token, which separates documents; {fix}"
        )
    return int(eos_id)


def _from_hub(name: str) -> Path:
    page = id_of_page(name)
    if page is not None:
        raise InputError(
            f"{name} is the address of a page; name the tokenizer by its hub id: {page}"
        )
    bare, revision = split_revision(name)
    owner = owner_of(name)
    of_others = may_be_hub_id(name) and owner.is_dir() and not (owner / "run.json").exists()
    if not is_hub_id(name) and not of_others:
        found, advice = what_is(Path(name)), odd_name(name, patterns=False)
        raise InputError(
            f"no tokenizer at {name}: {f'it is {found}' if found else 'no such file or folder'}; "
            f"{advice or _TAKEN}"
        )
    from huggingface_hub import snapshot_download

    offline = is_offline()
    for local_only in (True, False):
        if not local_only and offline:
            break
        try:
            folder = Path(
                snapshot_download(
                    bare,
                    revision=revision,
                    allow_patterns=list(HUB_FILES),
                    local_files_only=local_only,
                )
            )
        except Exception as error:  # the hub client raises many types
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if holds_tokenizer(folder):
            return folder
        reason = "no tokenizer files in it"
    which = f"{bare} --revision {revision}" if revision else bare
    command = (
        f"hf download {which} --include 'tokenizer*' --include config.json --include vocab.json "
        "--include merges.txt --local-dir tokenizer"
    )
    if offline:
        raise InputError(
            f"no tokenizer {name}: not a local path, not in the local Hugging Face cache, and "
            "HF_HUB_OFFLINE forbids to ask the hub. Unset it; or, on a machine that may use the "
            f"network: {command}, then copy that folder here and use --tokenizer tokenizer"
        )
    raise InputError(
        f"no tokenizer {name}: not a local path, and the Hugging Face hub could not provide it "
        f"({reason}); download it first: {command}, then use --tokenizer tokenizer. A gated model "
        "needs `hf auth login` once"
    )
