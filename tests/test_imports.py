"""House rules checked on the source: who may import whom, length of files and functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("csrc", "data", "trainer", "pruner", "launch", "tests")
MAY_IMPORT = {
    "csrc": set(),
    "data": set(),
    "trainer": {"data"},
    "pruner": {"data", "trainer"},
    "launch": {"data", "trainer", "pruner"},
    "tests": {"data", "trainer", "pruner", "launch"},
}
FILE_LINES = 500
FUNCTION_LINES = 60
LOOP_FUNCTION_LINES = 100
ENTRY_LINES = 80


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def is_entry(tree: ast.Module) -> bool:
    """Whether a file is a command: it has a `if __name__ == "__main__":` block."""
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in tree.body
    )


def imported_packages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level name) of every absolute import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]


def forbidden_imports(package: str, tree: ast.AST) -> list[tuple[int, str]]:
    allowed = MAY_IMPORT[package] | {package}
    return [
        (line, name)
        for line, name in imported_packages(tree)
        if name in PACKAGES and name not in allowed
    ]


def long_functions(tree: ast.AST, limit: int) -> list[tuple[str, int]]:
    return [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > limit
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(package)
        for line, name in forbidden_imports(package, ast.parse(path.read_text("utf-8")))
    ]
    assert not wrong, "\n".join(wrong)


def imported_files(path: Path, files: dict[str, Path]) -> set[Path]:
    """Files of ours that `path` imports anywhere: at its top, in functions, for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is imported may be a module of the package, or a name inside a module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in files else node.module for name in names]
        found |= {files[name] for name in names if name in files}
    return found - {path}


def circles(graph: dict[Path, set[Path]]) -> list[set[Path]]:
    """Groups of files each of which reaches, by imports, all others of its group and itself."""

    def reached(start: Path) -> set[Path]:
        seen: set[Path] = set()
        waiting = [start]
        while waiting:
            for file in graph[waiting.pop()] - seen:
                seen.add(file)
                waiting.append(file)
        return seen

    reach = {file: reached(file) for file in graph}
    groups = [{other for other in reach[file] if file in reach[other]} for file in graph]
    return [group for index, group in enumerate(groups) if group and group not in groups[:index]]


def test_no_file_imports_itself_in_a_circle() -> None:
    paths = sources("data", "trainer", "pruner", "launch")
    files = {module_name(path): path for path in paths}
    graph = {path: imported_files(path, files) for path in paths}
    names = [sorted(module_name(path) for path in group) for group in circles(graph)]
    assert not names, names


def test_the_rule_sees_circles() -> None:
    a, b, c = Path("a"), Path("b"), Path("c")
    assert circles({a: {b}, b: {c}, c: set()}) == []
    assert circles({a: {b}, b: {a}, c: {a}}) == [{a, b}]


def test_nothing_imports_a_command() -> None:
    """`launch.shorn` starts commands by name; only tests import their entries."""
    wrong = [
        f"{path.relative_to(ROOT)}: {node.module}"
        for path in sources("data", "trainer", "pruner", "launch")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("__main__")
    ]
    assert not wrong, wrong


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_relative_imports() -> None:
    """Imports name their package: `python launch/cpt.py` and `-m launch.cpt` must both work."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rule_sees_hidden_imports() -> None:
    tree = ast.parse("def f():\n    import launch.cpt\n    from trainer.loop import Trainer\n")
    assert forbidden_imports("data", tree) == [(2, "launch"), (3, "trainer")]
    assert forbidden_imports("pruner", tree) == [(2, "launch")]
    assert forbidden_imports("launch", tree) == []


def test_files_stay_short() -> None:
    entries, wrong = set(), []
    for path in sources(*PACKAGES):
        text, name = path.read_text("utf-8"), path.relative_to(ROOT).as_posix()
        entry = is_entry(ast.parse(text))
        limit, lines = ENTRY_LINES if entry else FILE_LINES, len(text.splitlines())
        if entry:
            entries.add(name)
        if lines > limit:
            wrong.append(f"{name}: {lines} lines, at most {limit}")
    assert not wrong, "\n".join(wrong)
    assert {"data/tokenize.py", "pruner/shear.py", "launch/cpt.py"} <= entries


def test_functions_stay_short() -> None:
    wrong = []
    for path in sources("data", "trainer", "pruner", "launch"):
        name = str(path.relative_to(ROOT))
        limit = LOOP_FUNCTION_LINES if name == "trainer/loop.py" else FUNCTION_LINES
        tree = ast.parse(path.read_text("utf-8"))
        wrong += [f"{name} {function}: {n}" for function, n in long_functions(tree, limit)]
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_code_is_a_package() -> None:
    """A folder without __init__.py is left out of a regular (not editable) install."""
    folders = {path.parent for path in sources(*PACKAGES)}
    missing = [
        str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()
    ]
    assert not missing, missing
