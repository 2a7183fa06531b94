"""The documents that are made from the code are up to date, and the site can be built."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from launch.shorn.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_files_is_up_to_date() -> None:
    files = load("make_files")
    same = (ROOT / "docs" / "files.md").read_text("utf-8") == files.page()
    assert same, "docs/files.md is stale: run `make docs`, or python docs/make_files.py"


def test_every_file_says_what_is_in_it() -> None:
    files = load("make_files")
    paths = [path for folder in files.folders() for path in files.files_in(folder)]
    assert len(paths) > 100
    silent = [str(path.relative_to(ROOT)) for path in paths if not files.first_sentence(path)]
    assert not silent, silent


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.py", '"""One thing, over\ntwo lines. Another."""\n', "One thing, over two lines."),
        ("a.py", '"""`.bin` files. b.py reads them."""\n', "`.bin` files."),
        ("a.py", "x = 1\n", ""),
        ("a.h", "// One. Two\n#include <b>\n// Three.\n", "One."),
        ("a.css", "/* A style. */\nbody {}\n", "A style."),
    ],
)
def test_first_sentences(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert load("make_files").first_sentence(path) == sentence


def test_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    table = readme.split("## Commands")[1].split("##")[0]
    for name, command in COMMANDS.items():
        module = command.module.removesuffix(".__main__")
        long_forms = (f"python -m {module}", f"python {module.replace('.', '/')}.py")
        rows = [row for row in table.splitlines() if row.startswith(f"| `shorn {name}` ")]
        assert len(rows) == 1, name
        assert any(f"`{long_form}`" in rows[0] for long_form in long_forms), rows[0]


def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: no broken link, no page without a place, a page with all options per command."""
    pytest.importorskip("material", reason="the site needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", ".mkdocs.yml"]
    subprocess.run([*command, "--site-dir", tmp_path], cwd=ROOT, check=True, timeout=120)
    for name in COMMANDS:
        page = (tmp_path / "commands" / f"{name}.html").read_text("utf-8")
        assert "--log-level" in page, name
    assert "--mask-draws" in (tmp_path / "commands" / "shear.html").read_text("utf-8")
