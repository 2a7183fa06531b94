"""Templates write what transformers writes with them; those whose answers cannot be told from the
rest are refused."""

import pickle
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data.chat_templates import NAMED, NEEDED, ChatTemplate, find_template
from data.conversations import ASSISTANT, SYSTEM, USER, Turn, Unfit
from data.errors import InputError
from tests.factories import write_tokenizer

TURNS = (
    Turn(SYSTEM, "Be kind."),
    Turn(USER, " a 'question' "),
    Turn(ASSISTANT, "two\nlines"),
    Turn(USER, "b?"),
    Turn(ASSISTANT, "end"),
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TAGGED = """{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}
{% endgeneration %}{% else %}U:{{ m['content'] }}
{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"""  # noqa: E501
# Writes the last answer otherwise than those before it, as some models' thoughts are.
FORGETS = """{% for m in messages %}{% if m['role'] == 'user' %}U:{{ m['content'] }}
{% elif loop.last %}A:<think></think>{{ m['content'] }}!{% else %}A:{{ m['content'] }}!{% endif %}
{% endfor %}{% if add_generation_prompt %}A:{% endif %}"""


@pytest.mark.parametrize("source", [*NAMED.values(), TAGGED], ids=[*NAMED, "tagged"])
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:]], ids=["system", "plain"])
@pytest.mark.parametrize("length", [2, 3, 4])
def test_writes_what_transformers_writes(
    source: str, turns: tuple[Turn, ...], length: int, tmp_path: Path
) -> None:
    special = sorted({token for tokens in NEEDED.values() for token in tokens})
    reader = AutoTokenizer.from_pretrained(str(write_tokenizer(tmp_path, *special)))
    messages = [{"role": turn.role, "content": turn.text} for turn in turns[:length]]
    template = ChatTemplate("x", source, TOKENS)
    for prompt in (False, True):
        expected = reader.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
        )
        assert template._render(messages, prompt) == expected


@pytest.mark.parametrize(
    ("name", "answers", "end"),
    [
        ("vicuna", [" two\nlines</s>", " end</s>"], "</s>"),
        ("chatml", ["two\nlines<|im_end|>", "end<|im_end|>"], "<|im_end|>"),
        ("llama3", ["two\nlines<|eot_id|>", "end<|eot_id|>"], "<|eot_id|>"),
    ],
)
def test_answers_are_found_with_what_ends_them(name: str, answers: list[str], end: str) -> None:
    template = pickle.loads(pickle.dumps(find_template(name, None, TOKENS)))
    written = template.write(TURNS)
    assert [written.text[start:stop] for start, stop in written.answers] == answers
    assert template.require_usable() == end
    assert written.ends[-1] == len(written.text)


def test_blanks_that_end_an_answer_count_where_nothing_else_ends_it() -> None:
    template = ChatTemplate("x", TAGGED)
    written = template.write(TURNS[1:3])
    ((start, stop),) = written.answers
    assert written.text[start:stop] == "two\nlines\n" and template.require_usable() == ""


def test_published_texts() -> None:
    """The text that models of these templates were trained on."""
    plain = (Turn(USER, "Hi"), Turn(ASSISTANT, "Hello"), Turn(USER, "Bye"), Turn(ASSISTANT, "Ciao"))
    start = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
    )
    vicuna = "USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT: Ciao</s>"
    expected = {
        "vicuna": f"<s>{start}{vicuna}",
        "chatml": "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in plain),
        "llama3": "<s>"
        + "".join(
            f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"
            for role, text in plain
        ),
    }
    for name, text in expected.items():
        assert find_template(name, None, TOKENS).write(plain).text == text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FORGETS, "what it writes up to turn 2 is not how the whole conversation begins"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes nothing behind an"),
        ("{% for m in messages %}{{ m['content'] | upper }};{% endfor %}", "not write an answer"),
        ("{{ raise_exception('not today') }}", r"refuses the turns \(not today\)"),
        ("{{ strftime_now('%Y') }}", "refuses the turns .*strftime_now"),
        ("{{ messages[9].content }}", "refuses the turns"),
        ("{% for m in messages %}", "cannot be read: .*; repair it, or give another"),
    ],
)
def test_templates_that_hide_their_answers_are_refused(source: str, message: str) -> None:
    with pytest.raises(InputError, match=f"the chat template mine:? .*{message}.*--chat-template"):
        ChatTemplate("mine", source).require_usable()


def test_a_system_that_a_template_refuses_is_its_conversations_fault() -> None:
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m.content }};{% endfor %}"
    )
    template = ChatTemplate("mine", source)
    assert template.require_usable() == ";"
    with pytest.raises(Unfit, match="no system"):
        template.write(TURNS)


def test_a_file_and_the_tokenizers_own_are_taken(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("text")
    found = find_template(str(tmp_path / "mine.jinja"), "own", {})
    assert (found.name, found.source) == ("mine.jinja", "text")
    assert find_template(None, "own", {}).source == "own"
    with pytest.raises(InputError, match=r"has no chat template.*--chat-template vicuna\|chatml"):
        find_template(None, None, {})
    with pytest.raises(InputError, match=r"--chat-template vikuna: no such file, and no template"):
        find_template("vikuna", "own", {})
