"""Conversations are read from the three forms, and what is none is refused by kind."""

import re
from typing import Any

import pytest

from data.conversations import ASSISTANT, SYSTEM, USER, Turn, Unfit, answered, as_text, turns_of

SAID = (Turn(USER, "why?"), Turn(ASSISTANT, "because"))
SHARE = {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]}
OPEN = {
    "messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
}


def share(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def said(**more: Any) -> dict[str, Any]:
    """OPEN, with more in its answer."""
    question, answer = OPEN["messages"]
    return {"messages": [question, answer | more]}


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        (SHARE, SAID),
        (OPEN, SAID),
        ({"instruction": "why?", "input": "", "output": "because"}, SAID),
        ({"instruction": "why?", "output": "because", "text": "..."}, SAID),
        # Parquet gives all columns, those of other forms as null.
        ({"messages": None, **SHARE, "instruction": None}, SAID),
        ({"instruction": "add", "input": "1 2", "output": "3"},
         (Turn(USER, "add\n\n1 2"), Turn(ASSISTANT, "3"))),
        ({"instruction": "c", "output": "d", "history": [["a", "b"]]},
         (Turn(USER, "a"), Turn(ASSISTANT, "b"), Turn(USER, "c"), Turn(ASSISTANT, "d"))),
        (OPEN | {"system": "be kind"}, (Turn(SYSTEM, "be kind"), *SAID)),
        (OPEN | {"system": "", "tools": []}, SAID),
        (OPEN | SHARE, SAID),
        # What is not trained on anyway may say so.
        ({"messages": [OPEN["messages"][0] | {"weight": 0, "train": False, "loss": False},
                       OPEN["messages"][1] | {"loss": True}]}, SAID),
        (share(("system", "s"), ("user", "why?"), ("gpt", "because")) | {"system": "s"},
         (Turn(SYSTEM, "s"), *SAID)),
        (said(weight=1, train=True, tool_calls=None, id=7), SAID),
        (share(("system", "s"), ("user", "why?"), ("chatgpt", "because")),
         (Turn(SYSTEM, "s"), *SAID)),
    ],
)  # fmt: skip
def test_each_form_gives_its_turns(record: dict[str, Any], turns: tuple[Turn, ...]) -> None:
    assert turns_of(record) == turns


@pytest.mark.parametrize(
    ("record", "kind", "detail"),
    [
        ({"text": "a"}, "no conversation", "keys present: text; wanted: ShareGPT's"),
        (
            SHARE | {"instruction": "a", "output": "b"},
            "two conversations",
            "'conversations' and 'instruction' are not the same; keep one",
        ),
        (OPEN | {"history": [["a", "b"]]}, "two conversations", "'history' beside 'messages'"),
        (
            {"instruction": "a", "output": "b", "history": 5},
            "no conversation",
            "'history' is a whole number, not a list of pairs",
        ),
        (
            share(("system", "s"), ("user", "a"), ("gpt", "b")) | {"system": "t"},
            "two systems",
            "'system' says something else than the first turn of 'conversations'",
        ),
        ({"instruction": "a"}, "no conversation", "keys present: instruction"),
        ({"messages": []}, "no conversation", "'messages' is an empty list"),
        ({"messages": "a"}, "no conversation", "'messages' is text, not a list of turns"),
        ({"messages": [{"from": "user", "value": "a"}]}, "no conversation", "no 'role' and"),
        (share(("narrator", "a")), "an unknown role", "turn 1 of 'conversations' is of 'narrator'"),
        (share((3, "a")), "an unknown role", "is of 3; roles known here: system, user"),
        (share(("human", "a"), ("gpt", " \n")), "an empty turn", "turn 2 of 'conversations'"),
        (share(("human", "a"), ("gpt", None)), "a turn that is no text", "turn 2 .* is null"),
        ({"instruction": "a", "output": ""}, "an empty turn", "'output' is empty"),
        (share(("human", "a"), ("human", "b")), "a turn out of order", "turn 2 is of the user"),
        (share(("gpt", "a")), "a turn out of order", "turn 1 is of the assistant"),
        (share(("system", "s"), ("gpt", "a")), "a turn out of order", "turn 2 is of the assistant"),
        (share(("human", "a"), ("system", "s")), "a turn out of order", "turn 2 is of the system"),
        (share(("human", "a")), "no answer", "nothing to train on"),
        (share(("system", "s"), ("human", "a")), "no answer", "nothing to train on"),
        (share(("system", "s")), "no answer", "nothing to train on"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "no conversation", "pair 1 of"),
        (OPEN | {"tools": [{"name": "f"}]}, "tools", "'tools' says what the assistant may call"),
        (said(tool_calls=[1]), "a turn that is more than text", "turn 2 .* has 'tool_calls'"),
        (
            said(weight=0),
            "an answer with a weight",
            "turn 2 of 'messages' has 'weight' 0, and every",
        ),
        (
            said(train=False),
            "an answer with a weight",
            "turn 2 of 'messages' has 'train' False, and",
        ),
        (said(loss=False), "an answer with a weight", "turn 2 of 'messages' has 'loss' False, and"),
    ],
)
def test_what_cannot_be_trained_on_is_told_apart(
    record: dict[str, Any], kind: str, detail: str
) -> None:
    with pytest.raises(Unfit) as caught:
        turns_of(record)
    assert caught.value.kind == kind
    assert re.search(detail, caught.value.detail), caught.value.detail


def test_what_nobody_answers_is_left_out() -> None:
    assert answered((*SAID, Turn(USER, "and?"))) == SAID
    assert answered(SAID) == SAID


def test_other_turns_have_another_text() -> None:
    same = as_text(turns_of(SHARE))
    assert same == as_text(turns_of(OPEN))
    parted = (Turn(USER, 'why?","because'), Turn(ASSISTANT, "b"))
    assert len({same, as_text(parted), as_text(SAID[:1])}) == 3
