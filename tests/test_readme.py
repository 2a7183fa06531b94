"""README tells the truth: complete file tree, commands that parse, CI runs its test command."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CODE = ("data", "trainer", "pruner", "launch")


def tree_entries() -> list[str]:
    """Paths of README's file tree: a `folder/` line opens a folder, indented lines lie in it."""
    block = README.split("## Files")[1].split("```")[1]
    entries: list[str] = []
    folders: list[str] = []
    for line in block.splitlines()[1:]:
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        assert len(line.split()) > 1, f"{name} has no clause"
        del folders[depth:]
        if name.endswith("/"):
            folders.append(name)
        entries.append("".join(folders) + ("" if name.endswith("/") else name))
    return entries


def test_every_listed_file_exists() -> None:
    missing = [entry for entry in tree_entries() if not (ROOT / entry).exists()]
    assert not missing, missing


def test_every_code_file_is_listed() -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for package in CODE
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert files, "no code found"
    assert files - set(tree_entries()) == set()


def test_linked_files_exist() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)", document.read_text("utf-8")):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_named_files_to_read_first_exist() -> None:
    section = README.split("## Read these five files first")[1].split("##")[0]
    names = re.findall(r"^\d\. `([^`]+)`", section, flags=re.MULTILINE)
    assert len(names) == 5
    assert all((ROOT / name).is_file() for name in names), names


def readme_commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [words for words in commands if words and words[0] in ("python", "torchrun")]


def program_and_flags(words: list[str]) -> tuple[str, list[str]]:
    """Module or script of a command and the flags given to it."""
    if words[0] == "torchrun":
        assert words[1] == "--nproc_per_node"
        words = words[2:]
    words = words[1:]
    if words[0] == "-m":
        words = words[1:]
    return words[0], [word for word in words[1:] if word.startswith("--")]


@pytest.mark.parametrize("words", readme_commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_have_the_flags_shown(words: list[str]) -> None:
    program, flags = program_and_flags(words)
    call = [program] if program.endswith(".py") else ["-m", program]
    result = subprocess.run(
        [sys.executable, *call, "--help-all"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert result.returncode == 0, result.stderr
    known = set(re.findall(r"--[a-z][a-z-]*", result.stdout))
    assert set(flags) <= known, set(flags) - known


def test_settings_example_names_real_options(tmp_path: Path) -> None:
    """Every section and key of README's shorn.toml is known to the command it is for."""
    example = README.split("```toml\n")[1].split("```")[0]
    (tmp_path / "shorn.toml").write_text(example)
    programs = {"tokenize": "data.tokenize", "shear": "pruner.shear", "cpt": "launch.cpt"}
    for section in re.findall(r"^\[(\w+)\]", example, flags=re.MULTILINE):
        result = subprocess.run(
            [sys.executable, "-m", programs[section], "--help"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        assert f"[{section}]" in result.stdout


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = re.findall(r"^(make [a-z-]+) +# run the tests", README, flags=re.MULTILINE)
    assert commands == ["make test"]
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert "# run the tests" in script
    assert "make checks" in script


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md", "docs/guide.md"):
        used = re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE)
        assert set(used) <= targets, document
