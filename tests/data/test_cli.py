"""Command lines: the order of sources, help, refusals and exit statuses, on several ranks too."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest

from data import log
from data.cli import parse
from data.errors import InputError
from data.log import logger
from data.options import Name, options_of
from data.overrides import SECTIONS
from tests.data.helpers import join

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("clean")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    """Inner options."""

    steps: int = 3
    """Number of steps."""
    lr: float = 1e-4
    """Peak learning rate."""
    renamed: Annotated[Literal["dynamic", "fixed"], Name("mixture")] = "dynamic"
    """A renamed option."""

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise InputError(f"--lr {self.lr} must be at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    """What the program does."""

    data: Path
    """Where it reads."""
    inputs: tuple[str, ...] = ()
    """Several values."""
    more_words: tuple[str, ...] = ()
    """Several others."""
    fast: bool = False
    """A switch."""
    limit: int | None = None
    """An optional number."""
    train: Inner = field(default_factory=lambda: Inner(steps=77))


def get(*arguments: str) -> Outer:
    return parse(Outer, section="prune", argv=list(arguments), examples="python -m x --data y")


def test_flags_and_nested_defaults() -> None:
    config = get("--data", "d", "--lr", "0.5", "--inputs", "a", "b", "--fast", "--mixture", "fixed")
    assert config == Outer(
        data=Path("d"),
        inputs=("a", "b"),
        fast=True,
        train=Inner(steps=77, lr=0.5, renamed="fixed"),
    )


def test_file_then_environment_then_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shorn.toml").write_text(
        '[prune]\ndata = "from-file"\nsteps = 1\nlr = 1\nlimit = 5\nfast = true\n'
        'inputs = ["-a", "b c"]\nmixture = "fixed"\n[other]\nanything = 1\n'
    )
    monkeypatch.setenv("SHORN_STEPS", "2")
    monkeypatch.setenv("SHORN_LR", "0.5")
    monkeypatch.setenv("SHORN_UNRELATED", "x")
    config = get("--lr", "0.25")
    assert config == Outer(
        data=Path("from-file"),
        inputs=("-a", "b c"),
        fast=True,
        limit=5,
        train=Inner(steps=2, lr=0.25, renamed="fixed"),
    )
    monkeypatch.setenv("SHORN_LIMIT", "None")
    monkeypatch.setenv("SHORN_INPUTS", "x 'y z'")
    monkeypatch.setenv("SHORN_MIXTURE", "dynamic")
    config = get("--no-fast")
    assert (config.limit, config.inputs, config.fast) == (None, ("x", "y z"), False)
    assert config.train.renamed == "dynamic"


def test_named_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text('[prune]\ndata = "x"\n')
    monkeypatch.setenv("SHORN_CONFIG", "mine.toml")
    assert get().data == Path("x")
    monkeypatch.setenv("SHORN_CONFIG", "none.toml")
    with pytest.raises(InputError, match=r"SHORN_CONFIG=none\.toml: no such file"):
        get()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[prune]\nstps = 1", "unknown key `stps`.*did you mean `steps`"),
        ("steps = 1", "outside a section"),
        ("[[prune]]\nsteps = 1", r"\[\[prune\]\] begins one of several tables; write \[prune\]"),
        ("[prun]\nsteps = 1", r"unknown section \[prun\]; did you mean \[prune\]"),
        ("[prune]\nsteps = 'many'", "steps = 'many' is not a valid value: expected INT"),
        ("[prune]\nmixture = 'x'", "not a valid value: expected dynamic|fixed"),
        ("[prune", "not valid TOML"),
        ("[prune]\nmore-words = ['a']\nmore_words = ['b']", "`more_words` in two spellings"),
        ("[prune]\ndata = {a = 1}", "is not a valid value: expected PATH"),
        ("[prune]\ninputs = ['a', ['b']]", "is not a valid value: expected TEXT"),
        ("[prune]\nlr = [1, 2]", "is not a valid value: expected FLOAT"),
    ],
)
def test_bad_configuration_file_is_refused(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "shorn.toml").write_text(content)
    with pytest.raises(InputError, match=named):
        get("--data", "d")


def test_a_configuration_file_as_editors_on_windows_write_it(tmp_path: Path) -> None:
    (tmp_path / "shorn.toml").write_text("[prune]\r\nsteps = 4\r\n", "utf-8-sig")
    assert get("--data", "d").train.steps == 4
    (tmp_path / "shorn.toml").write_text("[prune]\nsteps = 4\n", "utf-16")
    with pytest.raises(InputError, match=r"shorn\.toml: not UTF-8 text"):
        get("--data", "d")


def test_bad_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORN_LR", "fast")
    with pytest.raises(InputError, match="SHORN_LR = 'fast' is not a valid value: expected FLOAT"):
        get("--data", "d")


def test_the_configs_own_refusal_comes_through() -> None:
    with pytest.raises(InputError, match=r"^--lr -1\.0 must be at least 0$"):
        get("--data", "d", "--lr", "-1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What the program does."""

    output: str = "runs/here"
    """Where it writes."""


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_name_of_a_folder_is_not_the_working_folder(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"^--output '.*': is empty, perhaps by a variable"):
        parse(Place, section="prune", argv=["--output", text])
    monkeypatch.setenv("SHORN_OUTPUT", text)
    assert parse(Place, section="prune", argv=["--output", "d"]).output == "d"


@pytest.mark.parametrize("parser", ["tyro", "argparse"])
@pytest.mark.parametrize(
    "words",
    [
        "--inputs a --inputs b",
        "--inputs=a --inputs=b",
        "--inputs a --inputs=b",
        "--more-words a --more_words b",
    ],
)
def test_repeated_list_flag_is_refused(
    words: str, parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parser == "argparse":
        monkeypatch.setitem(sys.modules, "tyro", None)
    flag = words.partition("=")[0].split()[0]
    with pytest.raises(InputError, match=f"{flag} is given 2 times; give all values after one"):
        get("--data", "d", *words.split())


@pytest.mark.parametrize("parser", ["tyro", "argparse"])
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--data a.txt b.txt", "b.txt"),
        ("--data=a.txt b.txt c.txt --fast", "b.txt c.txt"),
        ("--data a b c d e f", "b c d and 2 more"),
        ("--limit 3 4 --data d", "4"),
    ],
)
def test_words_behind_the_one_value_of_an_option_are_refused(
    words: str, shown: str, parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parser == "argparse":
        monkeypatch.setitem(sys.modules, "tyro", None)
    flag = words.partition("=")[0].split()[0]
    with pytest.raises(InputError, match=f"^{flag} takes one value, and {shown} stood behind it"):
        get(*words.split())


def test_a_list_in_the_environment_is_replaced_by_the_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHORN_INPUTS", "a b")
    assert get("--data", "d").inputs == ("a", "b")
    assert capsys.readouterr().out == "--inputs a b  (from SHORN_INPUTS)\n"
    assert get("--data", "d", "--inputs=c").inputs == ("c",)
    assert capsys.readouterr().out == ""


def test_what_did_not_come_from_the_command_line_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shorn.toml").write_text(
        "[prune]\nsteps = 5\nlr = 0.5\nfast = true\ninputs = ['a', 'b']\n"
    )
    monkeypatch.setenv("SHORN_LR", "0.25")
    get("--data", "d", "--no-fast")
    assert capsys.readouterr().out.splitlines() == [
        "--steps 5  (from shorn.toml [prune] steps)",
        "--lr 0.25  (from SHORN_LR)",
        "--inputs a b  (from shorn.toml [prune] inputs)",
    ]


def test_what_no_command_reads_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shorn.toml").write_text("[shaer]\nsteps = 5\n[cpt]\nsteps = 1\n[zzz]\n")
    monkeypatch.setenv("SHORN_STPES", "2")
    monkeypatch.setenv("shorn_steps", "2")
    monkeypatch.setenv("SHORN_TARGET", "1.3b")
    monkeypatch.setenv("SHORN_EMPTY", "")
    get("--data", "d")
    printed = capsys.readouterr()
    warnings = printed.err.splitlines()
    assert warnings[0] == (
        "warning: shorn.toml: no command reads section [shaer]; did you mean [shear]?"
    )
    assert warnings[1].startswith("warning: shorn.toml: no command reads section [zzz]; known: ")
    names = "is set, but names no option of this command"
    assert warnings[2:] == [
        f"warning: SHORN_STPES {names}; did you mean SHORN_STEPS?",
        f"warning: shorn_steps {names}; did you mean SHORN_STEPS?",
    ]
    assert printed.out == f"SHORN_TARGET {names}\n"


def test_the_sections_are_those_of_the_commands() -> None:
    from launch.shorn.commands import COMMANDS

    assert {name.replace("-", "_") for name in COMMANDS} == set(SECTIONS)


@pytest.mark.parametrize(
    "arguments", [[], ["--data", "d", "--bogus"], ["--data", "d", "--lr", "x"]]
)
def test_usage_errors_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        get(*arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert any(word in printed.err + printed.out for word in ("--data", "--bogus", "--lr"))


def test_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shorn.toml").write_text("[prune]\nsteps = 123\n")
    with pytest.raises(SystemExit) as stop:
        get("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "What the program does." in printed and "Peak learning rate." in printed
    assert "python -m x --data y" in printed
    assert "(default: 123)" in printed and "shorn.toml [prune] steps" in printed


def test_help_shows_the_essential_options_and_help_all_every_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Command(Outer):
        ESSENTIAL: ClassVar = "lr data"

    def shown(flag: str) -> str:
        with pytest.raises(SystemExit):
            parse(Command, section="prune", argv=[flag], examples="python -m x --data y")
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "60")
    short, full = shown("--help"), shown("--help-all")
    assert short.index("--lr FLOAT ") < short.index("--data PATH ") < short.index("\nexamples:")
    assert "--log-level debug|info" in short and "--inputs" not in short
    assert short.splitlines()[-1] == "--help-all shows the other 6 options."
    assert full.startswith(short.rpartition("\n--help-all")[0].rstrip())
    assert "\nInner options:\n  --steps INT " in full and "--inputs TEXT ..." in full
    assert max(map(len, full.splitlines())) <= 60
    for columns in ("1", "26"):  # too narrow for the texts of options
        monkeypatch.setenv("COLUMNS", columns)
        assert "--log-level" in shown("--help-all")


def test_settings_that_are_no_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shorn.toml").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"^shorn\.toml: not a regular file, .* or move it away"):
        get("--data", "d")
    (tmp_path / "shorn.toml").unlink()
    (tmp_path / "shorn.toml").mkdir()
    with pytest.raises(InputError, match=r"^shorn\.toml: not a regular file"):
        get("--data", "d")
    monkeypatch.setenv("SHORN_CONFIG", "/dev/null")
    with pytest.raises(InputError, match=r"^/dev/null: not a regular file, .* unset SHORN_CONFIG"):
        get("--data", "d")


def test_log_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        get("--data", "d")
        assert "SHORN_LOG_LEVEL" not in os.environ and log.level() == "info"
        (tmp_path / "shorn.toml").write_text('[prune]\nlog-level = "warning"\n')
        get("--data", "d")
        logger.info("not shown")
        logger.warning("shown")
        assert capsys.readouterr() == ("", "warning: shown\n")
        # Processes started later inherit it.
        assert os.environ["SHORN_LOG_LEVEL"] == "warning"
        get("--data", "d", "--log-level", "debug")
        assert log.level() == os.environ["SHORN_LOG_LEVEL"] == "debug"
    finally:
        log.set_level("info")
        del os.environ["SHORN_LOG_LEVEL"]


def test_two_options_of_one_name_are_a_programming_error() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Clash:
        steps: int = 1
        train: Inner = field(default_factory=Inner)

    with pytest.raises(AssertionError, match="two options named"):
        options_of(Clash)


def test_help_keeps_no_rank_waiting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    join(monkeypatch, 1)
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        get("--help")
    assert stop.value.code == 0 and time.monotonic() - start < 5
    assert capsys.readouterr().out == ""


def test_help_into_a_pipe_that_closes() -> None:
    """As in `--help-all | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-m", "pruner.shear", "--help-all"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_flag_that_turns_off_is_no_key(tmp_path: Path) -> None:
    for key in ("no-fast", "no_fast"):
        (tmp_path / "shorn.toml").write_text(f"[prune]\n{key} = true\n")
        with pytest.raises(InputError, match=f"`{key}` in .* write `fast = false`"):
            get("--data", "d")
    (tmp_path / "shorn.toml").write_text("[prune]\nno-steps = 1\n")
    with pytest.raises(InputError, match=r"unknown key `no-steps`.*did you mean `steps`"):
        get("--data", "d")


def test_a_list_with_an_odd_quote_says_how_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORN_INPUTS", "John's/*.txt")
    with pytest.raises(InputError, match=r"SHORN_INPUTS = .*quote what holds blanks or quotes"):
        get("--data", "d")
    monkeypatch.setenv("SHORN_INPUTS", "\"John's/*.txt\" 'my texts'")
    assert get("--data", "d").inputs == ("John's/*.txt", "my texts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """What the program does."""

    names: tuple[str, ...] = ()
    """Several texts."""
    copy: str | None = None
    """A text that may be left out."""


@pytest.mark.parametrize("option", ["names", "copy"])
@pytest.mark.parametrize("text", ["", "  "])
def test_empty_texts_are_refused_from_everywhere(
    option: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refusal = rf"^--{option} '{text}': is empty"
    for words in ([f"--{option}", text], [f"--{option}={text}"]):
        with pytest.raises(InputError, match=refusal):
            parse(Texts, section="prune", argv=words)
    (tmp_path / "shorn.toml").write_text(f'[prune]\n{option} = "{text}"\n')
    with pytest.raises(InputError, match=refusal):
        parse(Texts, section="prune", argv=[])


def test_an_empty_name_of_a_folder_in_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shorn.toml").write_text('[prune]\noutput = ""\n')
    with pytest.raises(InputError, match=r"^--output '': is empty"):
        parse(Place, section="prune", argv=[])


@pytest.mark.parametrize("words", [("--fast", "true"), ("--fast=true",), ("--fast", "0")])
def test_a_switch_takes_no_value(words: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"^--fast takes no value, .*: --fast turns it on, --no-"):
        get("--data", "d", *words)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (("--lr", "1", "--lr", "2"), "--lr"),
        (("--lr=1", "--lr=2"), "--lr"),
        (("--fast", "--no-fast"), "--fast"),
    ],
)
def test_the_last_of_repeated_options_counts_and_that_is_said(
    words: tuple[str, ...], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = get("--data", "d", *words)
    assert config.train.lr in (2, 1e-4)
    assert not config.fast
    assert f"note: {flag} is given 2 times, of which the last one counts" in capsys.readouterr().out


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """An option that takes names with values."""

    weights: str | None = None
    """Such as a=1,b=2."""


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("weights = {a = 0.6, b = 1}", r'expected one text, .* in it: "a=0\.6,b=1"$'),
        ("[prune.weights]\na = 0.6\nb = 1", r'expected one text, .* in it: "a=0\.6,b=1"$'),
        ("weights = ['a=1', 'b=2']", r'expected one text, .* in it: "a=1,b=2"$'),
        ("weights = {a = 'x'}", "is not a valid value: expected TEXT$"),
        ("weights = []", "is not a valid value: expected TEXT$"),
    ],
)
def test_a_table_of_pairs_is_told_as_the_option_takes_it(
    tmp_path: Path, content: str, named: str
) -> None:
    (tmp_path / "shorn.toml").write_text(f"[prune]\n{content}\n")
    with pytest.raises(InputError, match=named):
        parse(Pairs, section="prune", argv=[], examples="")


def test_words_without_a_flag_are_not_said_to_come_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.report.config import ReportConfig

    monkeypatch.chdir(tmp_path)
    (tmp_path / "shorn.toml").write_text('[report]\nruns = ["a", "b"]\n')
    assert parse(ReportConfig, section="report", argv=["c"]).runs == ("c",)
    assert "shorn.toml" not in capsys.readouterr().out
    assert parse(ReportConfig, section="report", argv=[]).runs == ("a", "b")
    assert "from shorn.toml" in capsys.readouterr().out
