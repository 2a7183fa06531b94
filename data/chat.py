"""Conversations to tokens, each with whether its loss counts: those of answers and of what ends
them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data.chat_templates import NEEDED, ChatTemplate, Written, find_template
from data.conversations import Turn, Unfit, answered
from data.errors import InputError
from data.log import logger
from data.manifest import ChatRecord
from data.tokenizers import HuggingFaceTokenizer, Placed, Tokenizer

TOO_LONG = "a first answer that no sample has room for"
"""The kind of a conversation that --seq-len leaves out."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation in tokens."""

    ids: np.ndarray
    """int64."""
    counts: np.ndarray
    """Which of them are of an answer, or end one: bool."""
    answers: int
    """Number of its answers."""
    cut: int
    """Answers at its end that a sample has no room for, and that are left out."""
    unanswered: bool
    """Whether the user spoke last, which is left out."""


@dataclass(frozen=True)
class Chat:
    """How a job turns conversations into samples; picklable."""

    template: ChatTemplate
    tokenizer: HuggingFaceTokenizer
    seq_len: int
    """Tokens per sample."""
    end_of_turn: int | None
    """The special token that ends an answer; None where none does."""

    def __getstate__(self) -> dict[str, Any]:
        names = ("template", "tokenizer", "seq_len", "end_of_turn")
        return {name: getattr(self, name) for name in names}

    def arguments(self) -> dict[str, Any]:
        """What determines the output, as a manifest keeps it."""
        template = self.template.digest
        return {"conversations": True, "chat_template": template, "seq_len": self.seq_len}

    def record(self) -> ChatRecord:
        """What a manifest keeps of it."""
        template = self.template
        return ChatRecord(template.source, template.name, self.end_of_turn, self.seq_len)

    def encode(self, conversations: Sequence[tuple[Turn, ...]]) -> list[Encoded | Unfit]:
        """Each conversation in tokens, or why it cannot be trained on."""
        written = [self._write(turns) for turns in conversations]
        texts = [one.text for one in written if isinstance(one, Written)]
        placed = iter(self.tokenizer.encode_special(texts))
        found: list[Encoded | Unfit] = []
        for turns, one in zip(conversations, written, strict=True):
            if isinstance(one, Written):
                found.append(self._mark(turns, one, next(placed)))
            else:
                found.append(one)
        return found

    def _write(self, turns: tuple[Turn, ...]) -> Written | Unfit:
        for number, turn in enumerate(turns, start=1):
            match = self._special.search(turn.text)
            if match:
                return Unfit(
                    "a turn that spells a special token",
                    f"turn {number} spells {match[0]!r}, which the chat template would take for "
                    "the special token; spell it otherwise",
                )
        try:
            return self.template.write(answered(turns))
        except Unfit as error:
            return error

    def _mark(self, turns: tuple[Turn, ...], written: Written, placed: Placed) -> Encoded | Unfit:
        ids, starts, ends = placed
        # Tokens that hold any part of an answer: where one begins in what stands before, the model
        # has to say it all the same. A token may stand for no character.
        counts = np.zeros(len(ids), np.bool_)
        for first, last in written.answers:
            counts |= (starts < last) & ((ends > first) | (starts >= first))
        sizes = [int((ends <= end).sum()) for end in written.ends]
        sizes[-1] = len(ids)
        kept = sum(size <= self.seq_len for size in sizes)
        if not kept:
            detail = f"its first answer ends at token {sizes[0]:,}"
            return Unfit(TOO_LONG, f"{detail}, and a sample has {self.seq_len:,}; raise --seq-len")
        size = sizes[kept - 1]
        rest = len(sizes) - kept
        return Encoded(ids[:size], counts[:size], kept, rest, answered(turns) != turns)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        texts = sorted(self.tokenizer.special_texts(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")


def open_chat(name: str | None, tokenizer: Tokenizer, called: str, seq_len: int) -> Chat:
    """Conversations in the template `name` (None: the tokenizer's own).

    `called` is what the user calls the tokenizer. Raises InputError where there is no template,
    where it does not fit the tokenizer, and where answers cannot be told in what it writes.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise InputError(
            f"--tokenizer {called} is a sentencepiece model alone, which knows no special tokens "
            "in a text; for conversations give a folder with tokenizer.json"
        )
    template = find_template(name, tokenizer.chat_template, dict(tokenizer.special_tokens))
    known = set(tokenizer.special_texts())
    missing = [token for token in NEEDED.get(template.name, ()) if token not in known]
    if missing:
        raise InputError(
            f"--chat-template {template.name} is made of {', '.join(NEEDED[template.name])}, and "
            f"--tokenizer {called} has no special token {missing[0]}; use --chat-template vicuna, "
            "which needs none, or a file with a template of the tokenizer's own tokens"
        )
    ended = template.require_usable()
    if ended not in known:
        logger.warning(
            f"the chat template {template.name} ends answers with {ended!r}, which is no special "
            f"token of --tokenizer {called}: a model cannot be told to stop there, for the same "
            "may stand within an answer; whoever generates has to (stop strings)"
        )
        return Chat(template, tokenizer, seq_len, None)
    (end,) = tokenizer.encode_special([ended])
    return Chat(template, tokenizer, seq_len, int(end.ids[0]))
