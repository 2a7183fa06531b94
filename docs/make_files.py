"""Writes docs/files.md: one line per file of the repository, from the files' own first sentences.

`make docs` runs it; a test fails while the page differs from what it writes.
"""

import ast
import re
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "files.md"
FOLDERS = ("csrc", "data", "trainer", "pruner", "launch", "tests", "docs")
SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h", ".css"}
INTRODUCTION = """# Files

One line per file: the first sentence of its docstring or of the comment at its head. `make docs`
writes this page. Test files are left out: `tests/` mirrors the tree, and each says in its first
line which property it holds.
"""


def page() -> str:
    """The text of docs/files.md."""
    parts = [INTRODUCTION]
    for folder in folders():
        name = folder.relative_to(ROOT).as_posix()
        start = folder / "__init__.py"
        parts.append(f"## {name}/\n")
        if start.is_file() and (about := first_sentence(start)):
            parts.append(f"{about}\n")
        rows = [f"| `{path.name}` | {_cell(first_sentence(path))} |" for path in files_in(folder)]
        parts.append("\n".join(["| file | what is in it |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def folders() -> list[Path]:
    """Folders that hold files to list, parents before what is in them."""
    nested = [[ROOT / top, *sorted((ROOT / top).rglob("*/"))] for top in FOLDERS]
    return [folder for group in nested for folder in group if files_in(folder)]


def files_in(folder: Path) -> list[Path]:
    """The files of a folder that have a line of their own."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in SUFFIXES
        and path.name != "__init__.py"
        and not path.name.startswith("test_")
    ]


def first_sentence(path: Path) -> str:
    """The first sentence of a file's docstring, or of the comment at its head; "" without one."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = takewhile(lambda line: line.startswith(("//", "/*")), text.splitlines())
        text = "\n".join(line.strip("/* ") for line in comment)
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[\w)`\"]\.) ", paragraph)[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
