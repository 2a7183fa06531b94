"""Conversations in records: who said what, read from the forms in which data sets keep them.

ShareGPT keeps `conversations` of `from` and `value`, OpenAI `messages` of `role` and `content`,
Alpaca an `instruction`, its `input` and the `output`. Each record tells its form by its fields.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from data.records import Ambiguous, word_for

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {
    "system": SYSTEM,
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "model": ASSISTANT,
}
"""What data sets call those who speak."""
FIELDS = ("conversations", "messages", "instruction", "input", "output", "system", "history")
"""Fields of a record that are read."""
TOOLS = ("tools", "functions")
"""Fields of a record without which its turns would be others."""
PARTS = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""Fields of a turn that are a part of what is said."""
WEIGHTS = ("weight", "train", "training", "train_on_turn", "loss", "loss_mask")
"""Fields of an answer that say how much it counts; what others say never does."""
FORMS = (
    "ShareGPT's `conversations` of `from` and `value`, OpenAI's `messages` of `role` and `content`,"
    " or Alpaca's `instruction`, `input` and `output`"
)


class Turn(NamedTuple):
    """What one of them says."""

    role: str
    """SYSTEM, USER or ASSISTANT."""
    text: str


class Unfit(Exception):
    """A record that cannot be trained on as a conversation."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        """What is wrong, in the same words for all such records: they are counted by it."""
        self.detail = detail
        """What is wrong here."""


def is_conversation(record: Mapping[str, Any]) -> bool:
    """Whether a record has the fields of a conversation."""
    return bool(_forms(record))


def turns_of(record: Mapping[str, Any], other_keys: Sequence[str] = ()) -> tuple[Turn, ...]:
    """The turns of a record: a system's perhaps, then a user's and an assistant's in turn.
    `other_keys` are those that it was read without.

    Raises Unfit where it has none of the forms, a turn is empty, no text, out of order or of an
    unknown role, and where the assistant never speaks.
    """
    forms = _forms(record)
    if not forms:
        names = ", ".join(map(str, (*record, *other_keys))) or "none"
        raise Unfit("no conversation", f"no conversation; keys present: {names}; wanted: {FORMS}")
    for name in TOOLS:
        if record.get(name):
            raise Unfit("tools", f"{name!r} says what the assistant may call, which is not read")
    (first, read), *others = forms.items()
    turns = read(record)
    for name, other in others:
        if other(record) != turns:
            raise Unfit("two conversations", f"{first!r} and {name!r} are not the same; keep one")
    if record.get("history") and "instruction" not in forms:
        raise Unfit("two conversations", f"'history' beside {first!r} is not read; remove it")
    if record.get("system"):
        system = _turn(SYSTEM, record["system"], "'system'")
        if turns[0].role == SYSTEM and turns[0] != system:
            raise Unfit(
                "two systems", f"'system' says something else than the first turn of {first!r}"
            )
        turns = turns if turns[0].role == SYSTEM else [system, *turns]
    _require_order(turns)
    if turns[-1].role != ASSISTANT and len(turns) < 3:
        raise Unfit("no answer", "no turn of an assistant, so nothing to train on")
    return tuple(turns)


def answered(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Without what a user says at the end, which nobody answers."""
    return turns if turns[-1].role == ASSISTANT else turns[:-1]


def as_text(turns: tuple[Turn, ...]) -> str:
    """One text that tells these turns from all others."""
    return json.dumps(turns, ensure_ascii=False, separators=(",", ":"))


def _forms(record: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Any]], list[Turn]]]:
    """What reads the turns of a record, by the field that holds them."""
    found: dict[str, Callable[[Mapping[str, Any]], list[Turn]]] = {}
    for name, speaker, said in (
        ("conversations", "from", "value"),
        ("messages", "role", "content"),
    ):
        if record.get(name) is not None:
            found[name] = partial(_listed, name=name, speaker=speaker, said=said)
    if record.get("instruction") is not None and record.get("output") is not None:
        found["instruction"] = _alpaca
    return found


def _listed(record: Mapping[str, Any], *, name: str, speaker: str, said: str) -> list[Turn]:
    entries = record[name]
    if not isinstance(entries, list) or not entries:
        what = "an empty list" if entries == [] else word_for(entries)
        raise Unfit("no conversation", f"{name!r} is {what}, not a list of turns")
    turns = []
    for number, entry in enumerate(entries, start=1):
        place = f"turn {number} of {name!r}"
        if not isinstance(entry, dict) or speaker not in entry or said not in entry:
            raise Unfit("no conversation", f"{place} has no {speaker!r} and {said!r}")
        _require_whole(entry, place)
        role = ROLES.get(entry[speaker]) if isinstance(entry[speaker], str) else None
        if role is None:
            known = ", ".join(ROLES)
            raise Unfit(
                "an unknown role", f"{place} is of {entry[speaker]!r}; roles known here: {known}"
            )
        for name in WEIGHTS if role == ASSISTANT else ():
            if entry.get(name) not in (None, 1):
                raise Unfit(
                    "an answer with a weight",
                    f"{place} has {name!r} {entry[name]!r}, and every answer counts as any other",
                )
        turns.append(_turn(role, entry[said], place))
    return turns


def _require_whole(entry: dict[str, Any], place: str) -> None:
    """Raises Unfit for a turn of which something would be lost."""
    if isinstance(entry, Ambiguous):
        name = min(entry.twice)
        raise Unfit(
            "a field given twice", f"{place} has {name!r} twice, with different values; remove one"
        )
    for name in PARTS:
        if entry.get(name):
            raise Unfit("a turn that is more than text", f"{place} has {name!r}, which is not read")


def _alpaca(record: Mapping[str, Any]) -> list[Turn]:
    turns: list[Turn] = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise Unfit("no conversation", f"'history' is {word_for(history)}, not a list of pairs")
    for number, pair in enumerate(history, start=1):
        place = f"pair {number} of 'history'"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Unfit("no conversation", f"{place} is not a question and an answer")
        turns += [_turn(USER, pair[0], place), _turn(ASSISTANT, pair[1], place)]
    question = _turn(USER, record["instruction"], "'instruction'")
    if record.get("input"):
        given = _turn(USER, record["input"], "'input'")
        question = Turn(USER, f"{question.text}\n\n{given.text}")
    return [*turns, question, _turn(ASSISTANT, record["output"], "'output'")]


def _turn(role: str, text: Any, place: str) -> Turn:
    if not isinstance(text, str):
        raise Unfit("a turn that is no text", f"{place} is {word_for(text)}, not text")
    if not text.strip():
        raise Unfit("an empty turn", f"{place} is empty")
    return Turn(role, text)


def _require_order(turns: list[Turn]) -> None:
    """Raises Unfit unless user and assistant speak in turn, the user first."""
    spoken = turns[1:] if turns[0].role == SYSTEM else turns
    for number, turn in enumerate(spoken):
        wanted = (USER, ASSISTANT)[number % 2]
        if turn.role != wanted:
            place = number + 1 + len(turns) - len(spoken)
            raise Unfit(
                "a turn out of order",
                f"turn {place} is of the {turn.role}, where the {wanted}'s is due",
            )
    if not spoken:
        raise Unfit("no answer", "no turn of an assistant, so nothing to train on")
