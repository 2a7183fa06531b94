"""The options of a command: the fields of its config dataclass, nested dataclasses flattened."""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from data.paths import home_expanded

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Name:
    """Marks a field, in `Annotated`, whose flag is not called like it: Name("distill-weight")."""

    name: str


@dataclass(frozen=True, slots=True)
class Positional:
    """Marks a field, in `Annotated`, that takes the words of a command line without a flag."""

    metavar: str


@dataclass(frozen=True, slots=True)
class OnDisk:
    """Marks a field, in `Annotated`, whose text is or may be a path."""


ON_DISK = OnDisk()


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a command."""

    name: str
    """With underscores."""
    type: Any
    """bool, int, float, str, Path, a Literal, one of these or None, or a tuple of any length."""
    default: Any
    """MISSING where the option is required."""
    text: str
    """The field's docstring."""
    section: str = ""
    """What the nested dataclass around it is about; "" in the command's own."""
    metavar: str = ""
    """How help names the words of a positional option; "" where the option has a flag."""
    on_disk: bool = False
    """Whether its values are or may be paths."""

    @property
    def flag(self) -> str:
        """How a command line names it."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def place(self) -> str:
        """How messages name it, which has no flag where it is positional."""
        return self.metavar.partition(" ")[0] or self.flag

    @property
    def takes_several(self) -> bool:
        """Whether any number of values follow the flag."""
        return typing.get_origin(self.type) is tuple

    def home_expanded(self, value: Any) -> Any:
        """`value` with `~` written out where it is a path; raises InputError as that does."""
        if not self.on_disk or value is None:
            return value
        if self.takes_several:
            return tuple(home_expanded(entry, self.place) for entry in value)
        return type(value)(home_expanded(value, self.place))


def options_of(config: type, base: Any = None, section: str = "") -> list[Option]:
    """The options of the dataclass `config` in the order of its fields.

    Args:
        config: dataclass type.
        base: instance whose values are the defaults; None takes those of `config`.
        section: passed on to the options of `config` itself.
    """
    texts = _docstrings(config)
    found: list[Option] = []
    for field, kind, markers in _fields(config):
        default = getattr(base, field.name) if base is not None else _default(field)
        if dataclasses.is_dataclass(kind):
            inner = None if default is MISSING else default
            topic = summary(typing.cast(type, kind)).partition("\n")[0].rstrip(".")
            found += options_of(typing.cast(type, kind), inner, topic)
            continue
        metavar = next((mark.metavar for mark in markers if isinstance(mark, Positional)), "")
        text = texts.get(field.name, "")
        on_disk = kind is Path or ON_DISK in markers
        found.append(Option(_name(field, markers), kind, default, text, section, metavar, on_disk))
    names = [option.name for option in found]
    clash = {name for name in names if names.count(name) > 1}
    assert not clash, f"{config.__name__} has two options named {sorted(clash)}"
    return found


def summary(config: type) -> str:
    """What the docstring of the dataclass `config` says, which PYTHONOPTIMIZE=2 takes away."""
    tree = _tree(config)
    return (ast.get_docstring(tree) if tree is not None else config.__doc__) or ""


def build(config: type[T], values: dict[str, Any]) -> T:
    """An instance of `config` from the values of its options by name; it validates itself."""
    arguments = {
        field.name: build(typing.cast(type, kind), values)
        if dataclasses.is_dataclass(kind)
        else values[_name(field, markers)]
        for field, kind, markers in _fields(config)
    }
    return config(**arguments)


def convert(words: list[str], kind: Any) -> Any:
    """The value of type `kind` that `words` stand for. Raises ValueError where they stand for none.

    The types are those of `Option.type`.
    """
    if typing.get_origin(kind) is tuple:
        return tuple(convert([word], typing.get_args(kind)[0]) for word in words)
    (word,) = words
    if _is_union(kind):
        if word.lower() == "none":
            return None
        (kind,) = set(typing.get_args(kind)) - {types.NoneType}
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
    elif kind is bool:
        word, choices = word.lower(), {"true": True, "1": True, "false": False, "0": False}
    else:
        return kind(word)
    if word not in choices:
        raise ValueError(word)
    return choices[word]


def without_commas(words: Sequence[str], kind: Any) -> str:
    """`words` of an option that takes several numbers, where commas stand between them, as they
    have to be written; empty for others."""
    values = [value for word in words for value in word.replace(",", " ").split()]
    if values == list(words) or typing.get_args(kind)[:1] not in ((int,), (float,)):
        return ""
    try:
        convert(values, kind)
    except ValueError:
        return ""
    return " ".join(values)


def describe(kind: Any) -> str:
    """The type `kind` as help and errors name it, such as "INT" or "auto|bf16|fp32"."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, arguments))
    if typing.get_origin(kind) is tuple:
        return f"{describe(arguments[0])} ..."
    if _is_union(kind):
        return describe(*(set(arguments) - {types.NoneType}))
    return {bool: "true|false", str: "TEXT"}.get(kind, kind.__name__.upper())


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _fields(config: type) -> Iterator[tuple[dataclasses.Field[Any], Any, tuple[Any, ...]]]:
    """Each field that takes a value, its type, and the markers in its `Annotated`."""
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        if field.init:
            hint = hints[field.name]
            markers = getattr(hint, "__metadata__", ())
            yield field, typing.get_args(hint)[0] if markers else hint, markers


def _name(field: dataclasses.Field[Any], markers: tuple[Any, ...]) -> str:
    given = (mark.name for mark in markers if isinstance(mark, Name))
    return next(given, field.name).replace("-", "_")


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _tree(config: type) -> ast.ClassDef | None:
    """The source of `config`; None in an installation without sources."""
    try:
        source = inspect.getsource(config)
    except OSError:
        return None
    (tree,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(tree, ast.ClassDef)
    return tree


def _docstrings(config: type) -> dict[str, str]:
    """The string below each field in the source of `config`."""
    tree = _tree(config)
    if tree is None:
        return {}
    texts = {}
    for field, below in pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant)
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts
