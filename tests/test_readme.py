"""README tells the truth: files and links exist, commands have their flags, CI runs its tests."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def test_linked_files_exist() -> None:
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#]+)", document.read_text("utf-8")):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_named_files_to_read_first_exist() -> None:
    section = README.split("## Read these five files first")[1].split("##")[0]
    names = re.findall(r"^\d\. `([^`]+)`", section, flags=re.MULTILINE)
    assert len(names) == 5
    assert all((ROOT / name).is_file() for name in names), names


def test_every_folder_is_listed() -> None:
    block = README.split("## Folders")[1].split("```")[1]
    listed = {line.split("/")[0] for line in block.splitlines() if "/ " in line}
    tracked = subprocess.run(
        ["git", "ls-files", "--", "*/*"], capture_output=True, text=True, cwd=ROOT
    )
    if tracked.returncode:
        pytest.skip("not a clone")
    folders = {path.split("/")[0] for path in tracked.stdout.splitlines()}
    assert listed == {name for name in folders if not name.startswith(".")}


def commands() -> list[list[str]]:
    """The words of every command of ours in README's and the guide's examples."""
    guide = (ROOT / "docs" / "guide.md").read_text("utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", README + guide, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words and words[0] in ("shorn", "python", "torchrun")]


def help_call(words: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of Python that show a command's help, and the flags that README gives it."""
    assert words[0] != "torchrun" or words[1] == "--nproc_per_node"
    words = words[3:] if words[0] == "torchrun" else words[1:] if words[0] == "python" else words
    if words[0] == "shorn":
        at = 3 if words[1] == "--ranks" else 1
        program, rest = ["-m", "launch.shorn", words[at]], words[at + 1 :]
    elif words[0] == "-m":
        program, rest = words[:2], words[2:]
    else:
        program, rest = words[:1], words[1:]
    return [*program, "--help-all"], [word for word in rest if word.startswith("--")]


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_have_the_flags_shown(words: list[str]) -> None:
    call, flags = help_call(words)
    result = subprocess.run(
        [sys.executable, *call], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert result.returncode == 0, result.stderr
    known = set(re.findall(r"--[a-z][a-z-]*", result.stdout))
    assert set(flags) <= known, set(flags) - known


def test_settings_example_names_real_options(tmp_path: Path) -> None:
    """Every section and key of README's shorn.toml is known to the command it is for."""
    example = README.split("```toml\n")[1].split("```")[0]
    (tmp_path / "shorn.toml").write_text(example)
    for section in re.findall(r"^\[(\w+)\]", example, flags=re.MULTILINE):
        result = subprocess.run(
            [sys.executable, "-m", "launch.shorn", section, "--help"],
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
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    assert "run: .ci/run" in workflow


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for document in DOCUMENTS:
        used = re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text("utf-8"), re.MULTILINE)
        assert set(used) <= targets, document
