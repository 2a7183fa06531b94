"""Documents of a comparison: the first of each domain measured, the next trained on."""

import io
import json
from pathlib import Path

import pytest
import zstandard

from data.errors import InputError
from launch.compare.text import content_of, split_documents


def write(path: Path, *domains: str) -> None:
    """One record per entry; a record's text is its domain and line number."""
    lines = [
        json.dumps({"text": f"{domain} {line}", "meta": {"redpajama_set_name": domain}})
        for line, domain in enumerate(domains)
    ]
    path.write_text("\n".join(lines) + "\n")


def texts(path: Path) -> list[str]:
    content = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes())).read()
    return [json.loads(line)["text"] for line in content.splitlines()]


def test_each_domain_is_split_in_the_order_of_the_input(tmp_path: Path) -> None:
    write(tmp_path / "0.jsonl", "a", "b", "other", "a", "a", "a", "b", "b")
    (tmp_path / "1.jsonl").write_text("this is not JSON, and need not be read\n")
    split_documents([str(tmp_path / "*.jsonl")], ["b", "a"], 1, 2, tmp_path)
    assert texts(tmp_path / "held_out.jsonl.zst") == ["b 1", "a 0"]
    assert texts(tmp_path / "train.jsonl.zst") == ["b 6", "b 7", "a 3", "a 4"]


def test_no_text_is_both_measured_and_trained_on(tmp_path: Path) -> None:
    content = [("a", "x"), ("b", "x"), ("a", "x"), ("a", "y"), ("b", "z"), ("b", "y"), ("b", "w")]
    lines = [
        json.dumps({"text": text, "meta": {"redpajama_set_name": name}}) for name, text in content
    ]
    (tmp_path / "0.jsonl").write_text("\n".join(lines))
    split_documents([str(tmp_path / "0.jsonl")], ["a", "b"], 1, 1, tmp_path)
    assert texts(tmp_path / "held_out.jsonl.zst") == ["x", "z"]
    assert texts(tmp_path / "train.jsonl.zst") == ["y", "w"]


def test_a_domain_without_documents_to_train_on_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.jsonl", "a", "a", "a", "b", "other")
    with pytest.raises(
        InputError, match=r"'b' has 1 .* with --domain-weights \(the input has \['a', 'b', 'other'"
    ):
        split_documents([str(tmp_path / "0.jsonl")], ["a", "b"], 1, 2, tmp_path)
    assert not list(tmp_path.glob("*.zst"))


def test_content_is_told_from_any_other(tmp_path: Path) -> None:
    def folder(**files: str) -> Path:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            file = path / name.replace("_", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return path

    first = folder(a="x", b_c="y")
    others = (folder(a="x"), folder(a="y", b_c="x"), folder(a="x", b="y"), folder(a="xy", b_c=""))
    assert content_of(first) == content_of(folder(b_c="y", a="x"))
    assert len({content_of(path) for path in (first, *others, first / "a", first / "b/c")}) == 7
    assert content_of(first / "a") == content_of(others[0] / "a")
