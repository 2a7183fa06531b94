"""`~` stands for the home folder wherever a path is given, and for nothing else."""

import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from data.cli import all_options, parse
from data.errors import InputError
from data.files import write_text
from data.options import ON_DISK, Positional
from data.paths import as_word, beside, home_expanded
from data.tokenizers import load_tokenizer
from launch.shorn.commands import COMMANDS
from trainer.models.sources import resolve_model

pytestmark = pytest.mark.usefixtures("clean")
NO_PATHS = {
    *("target", "targets", "domain_field", "text_field", "domains", "domain_weights"),
    *("reference_losses", "methods", "variant", "tasks", "params", "then"),
    "target_modules",
}
"""Options of text that name no file or folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A command."""

    runs: Annotated[tuple[str, ...], Positional("RUN ..."), ON_DISK] = ("runs/a",)
    output: Path = Path("runs/out")
    json: Annotated[str | None, ON_DISK] = None
    text_field: str = "text"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_every_option_that_is_a_path_is_marked() -> None:
    for command in COMMANDS.values():
        for option in all_options(command.load_config()):
            kinds = {option.type, *typing.get_args(option.type)}
            if option.name not in NO_PATHS and not kinds.isdisjoint((str, Path)):
                assert option.on_disk, f"{command.module}: {option.flag}"
            else:
                assert not option.on_disk, f"{command.module}: {option.flag}"


def test_home_is_written_out_wherever_the_path_comes_from(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = parse(
        Config, section="cpt", argv=["~/a", "./~/b", "--output=~/o", "--text-field", "~/t"]
    )
    assert flags.runs == (f"{home}/a", "./~/b")
    assert (flags.output, flags.json, flags.text_field) == (home / "o", None, "~/t")
    (home / "shorn.toml").parent.mkdir()
    (home / "shorn.toml").write_text("[cpt]\noutput = '~'\nruns = ['~/c', 'd~']\n")
    monkeypatch.setenv("SHORN_CONFIG", "~/shorn.toml")
    monkeypatch.setenv("SHORN_JSON", "~/j.json")
    elsewhere = parse(Config, section="cpt", argv=[])
    assert elsewhere.runs == (f"{home}/c", "d~")
    assert (elsewhere.output, elsewhere.json) == (home, f"{home}/j.json")


def test_what_only_starts_with_a_tilde_stays(tmp_path: Path) -> None:
    (tmp_path / "~nobody-of-that-name").mkdir()
    for text in ("~a.txt", "~$draft.txt", "~nobody-of-that-name/x", "a/~/b", ""):
        assert home_expanded(text, "--input") == text


def test_commands_to_come_name_the_same_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert beside(Path("runs/b"), "-cpt") == Path("runs/b-cpt")
    assert beside(Path(), "-cpt") == tmp_path / "a-cpt"
    assert beside(Path(".."), "-cpt") == Path(f"{tmp_path}-cpt")
    assert beside(Path("/"), "-cpt") == Path("/-cpt")
    assert [as_word(text) for text in ("-a", "~/a", "a-~", Path("/~"))] == [
        *("./-a", "./~/a", "a-~", "/~")
    ]


def test_libraries_get_no_path_that_is_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for load in (load_tokenizer, resolve_model):
        with pytest.raises(InputError, match=r"the path is not UTF-8.*or name it by a link"):
            load(folder)
    write_text(folder / "page.html", str(folder))
    assert (folder / "page.html").read_text().endswith("caf\\udce9")


def test_a_home_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match=r"^--output ~no-such-user/x: no-such-user's home folder"):
        parse(Config, section="cpt", argv=["--output", "~no-such-user/x"])


@pytest.mark.parametrize(
    "text", ["$SCRATCH/cpt", "/data/$user/x", "runs/${JOB}-cpt", "runs/a-$SLURM_JOB_ID"]
)
def test_a_variable_that_no_shell_wrote_out_is_no_folder(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shorn.toml").write_text(f"[cpt]\noutput = '{text}'\n")
    with pytest.raises(InputError, match=r"^--output .*: the variable \$.*write its value out"):
        parse(Config, section="cpt", argv=[])
    if not text.startswith("/"):
        Path(text).parent.mkdir(parents=True, exist_ok=True)
        Path(text).mkdir()
        assert parse(Config, section="cpt", argv=[]).output == Path(text)


@pytest.mark.parametrize("text", ["cost$", "a$b/c", "$1", "US$/x", "$Recycle.Bin"])
def test_other_dollars_stay(text: str) -> None:
    assert parse(Config, section="cpt", argv=["--output", text]).output == Path(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", ""], r"^RUN '': is empty"),
        (["--output", ""], r"^--output '': is empty"),
        (["--json", " "], r"^--json ' ': is empty"),
        (["--output", "s3://bucket/x"], r"^--output .*: is an address, and only files and folders"),
        (["--json", "https://a.b/x"], r"^--json https://a.b/x: is an address"),
        (["--output", "circle"], r"^--output circle: .* round in a circle"),
        (["circle/a"], r"^RUN circle/a: .* round in a circle"),
    ],
)
def test_names_that_would_stand_for_another_place_are_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty name is the working folder, and an address a folder in it."""
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    with pytest.raises(InputError, match=message):
        parse(Config, section="cpt", argv=words)


def test_a_folder_that_is_called_as_a_variable_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("$SCRATCH").mkdir()
    assert parse(Config, section="cpt", argv=["$SCRATCH/a"]).runs == ("$SCRATCH/a",)
