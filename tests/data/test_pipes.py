"""Pipes in a file's place, which one process can read, and once."""

import os
from pathlib import Path

import pytest

from data import pipes
from data.errors import InputError
from data.places import odd_name


def pipe_with(text: str) -> Path:
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    return Path(f"/dev/fd/{reading}")


def test_a_pipe_is_read_once_and_kept(tmp_path: Path) -> None:
    path = pipe_with("text")
    assert [pipes.read_again(path) for _ in range(2)] == ["text", "text"]
    # A file may change in between.
    file = tmp_path / "a"
    for text in ("one", "two"):
        file.write_text(text)
        assert pipes.read_again(file) == text


def test_several_ranks_are_told_to_use_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(InputError, match=r"is a pipe, and each of 2 ranks .* into a file"):
        pipes.read_again(pipe_with("text"))


def test_pipes_of_a_shell_are_told_by_their_name() -> None:
    assert pipes.is_of_a_shell("/dev/fd/63") and pipes.is_of_a_shell("/proc/self/fd/11")
    # Standard input is handed on.
    assert not any(map(pipes.is_of_a_shell, ("/dev/fd/0", "/dev/stdin", "dev/fd/63", "/dev/fd")))
    assert odd_name("/dev/fd/63").startswith("it is a pipe that a shell opened")
