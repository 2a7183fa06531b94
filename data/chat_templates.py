"""Chat templates: how a model's own, a named one or a file writes conversations as text.

Templates are Jinja, as tokenizers carry them. Where answers stand in the text is found without
knowing the template: what it writes up to a turn must be how all of it begins.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from data.conversations import ASSISTANT, SYSTEM, USER, Turn, Unfit
from data.errors import InputError
from data.records import read_text

VICUNA = """\
{{ bos_token }}
{%- if messages and messages[0]['role'] == 'system' -%}
{{ messages[0]['content'] + ' ' }}
{%- else -%}
{{ 'A chat between a curious user and an artificial intelligence assistant. ' }}
{{- 'The assistant gives helpful, detailed, and polite answers to the user\\'s questions. ' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ 'USER: ' + message['content'] + ' ' }}
{%- elif message['role'] == 'assistant' -%}
{{ 'ASSISTANT: ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'ASSISTANT:' }}
{%- endif -%}
"""
CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
LLAMA3 = """\
{{ bos_token }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""
NAMED = {"vicuna": VICUNA, "chatml": CHATML, "llama3": LLAMA3}
NEEDED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""Tokens that a named template is made of, where it has some of its own."""
OWN = "tokenizer"
"""What a template is called that came with the tokenizer."""
OTHERS = f"give another with --chat-template {'|'.join(NAMED)} or a file"
_PROBE = tuple(
    Turn((USER, ASSISTANT)[number % 2], f"{word} said.")
    for number, word in enumerate(("first", "second", "third", "fourth"))
)


@dataclass(frozen=True)
class ChatTemplate:
    """A template with what it needs to know of the tokenizer; picklable."""

    name: str
    """One of NAMED, OWN, or the name of a file."""
    source: str
    """The template itself."""
    tokens: dict[str, str] = field(default_factory=dict)
    """The tokenizer's special tokens by their names in templates, such as bos_token."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("name", "source", "tokens")}

    @property
    def digest(self) -> str:
        """Tells the template from others in messages: its name, and the start of its sha256."""
        return f"{self.name} ({hashlib.sha256(self.source.encode()).hexdigest()[:12]})"

    def require_usable(self) -> str:
        """What ends an answer. Raises InputError where the template cannot be read, or where the
        answers cannot be told from the rest of its text."""
        try:
            written = self.write(_PROBE)
            with_system = (Turn(SYSTEM, "zeroth said."), *_PROBE)
            # Not all know of systems, which is for the conversations that have one to find out.
            if self._knows_systems(with_system):
                self.write(with_system)
        except Unfit as error:
            raise InputError(
                f"the chat template {self.name}: {error.detail} (in a conversation of four short "
                f"turns); {OTHERS}"
            ) from None
        start, end = written.answers[-1]
        return written.text[start:end].partition(_PROBE[-1].text)[2].strip()

    def write(self, turns: tuple[Turn, ...]) -> "Written":
        """A conversation as text, with the places of its answers.

        An answer's place begins where the text ends that asks for it, and includes what ends it,
        without the blanks behind that. Raises Unfit where the template refuses the turns, or where
        its text up to some turn is not how all of it begins.
        """
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        text = self._render(messages)
        answers, ends = [], []
        for index, turn in enumerate(turns):
            if turn.role != ASSISTANT:
                continue
            before = self._render(messages[:index], prompt=True)
            after = text if index + 1 == len(turns) else self._render(messages[: index + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise Unfit(
                    "a turn that the chat template writes otherwise in a longer conversation",
                    f"what it writes up to turn {index + 1} is not how the whole conversation "
                    "begins, so that its answers cannot be told from the rest",
                )
            answers.append((len(before), len(before) + _answer(after[len(before) :], turn.text)))
            ends.append(len(after))
        return Written(text, answers, ends)

    def _knows_systems(self, turns: tuple[Turn, ...]) -> bool:
        try:
            self._render([{"role": turn.role, "content": turn.text} for turn in turns])
        except Unfit:
            return False
        return True

    def _render(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
        try:
            return str(
                self._compiled.render(
                    messages=messages,
                    add_generation_prompt=prompt,
                    tools=None,
                    documents=None,
                    **self.tokens,
                )
            )
        # A template is a program: it can fail in any way.
        except Exception as error:
            raise Unfit(
                "a conversation that the chat template refuses",
                f"it refuses the turns ({' '.join(str(error).split())})",
            ) from None

    @cached_property
    def _compiled(self) -> Any:
        """Compiled as transformers does it, in a sandbox, but without the clock: the same
        conversations give the same tokens on any day."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _generation_tag()],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise InputError(
                f"the chat template {self.name} cannot be read: {error}; repair it, or {OTHERS}"
            ) from None


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation as a template writes it."""

    text: str
    answers: list[tuple[int, int]]
    """First character of each answer, and the one behind it."""
    ends: list[int]
    """Characters up to the end of each answer's turn."""


def _answer(written: str, said: str) -> int:
    """Characters of what a template writes of an answer, up to the end of what ends it."""
    said = said.strip()
    start = written.find(said)
    if start < 0:
        raise Unfit(
            "a turn that the chat template changes", "it does not write an answer as it was given"
        )
    behind = written[start + len(said) :]
    if not behind:
        raise Unfit(
            "an answer that the chat template does not end",
            "it writes nothing behind an answer, so that no model could learn to end one",
        )
    return start + len(said) + len(behind.rstrip() or behind)


def find_template(name: str | None, own: str | None, tokens: dict[str, str]) -> ChatTemplate:
    """The template called `name`, a file's, or without a name the tokenizer's `own`; `tokens` are
    its special tokens by name. Raises InputError where there is none."""
    if name in NAMED:
        return ChatTemplate(name, NAMED[name], tokens)
    if name is not None:
        path = Path(name)
        if not path.is_file():
            raise InputError(
                f"--chat-template {name}: no such file, and no template of that name; use one of "
                f"{', '.join(NAMED)}, or a file with a template in Jinja"
            )
        return ChatTemplate(path.name, read_text(path, "give a file with a template"), tokens)
    if own is None:
        raise InputError(
            "the tokenizer has no chat template, which says how conversations are written; "
            f"{OTHERS}"
        )
    return ChatTemplate(OWN, own, tokens)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _generation_tag() -> Any:
    """Jinja's extension for `{% generation %}`, in which some templates wrap answers: what is
    inside is written as it stands."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags: set[str] = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation
