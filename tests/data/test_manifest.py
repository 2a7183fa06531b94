"""The manifest of a token folder is read as written, or refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from data.manifest import Manifest, SourceRecord, dtype_for
from tests.data.helpers import random_documents, write_folder


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_folder(tmp_path, {"c4": [random_documents([50]), random_documents([20])]})


def test_save_and_load(tmp_path: Path, manifest: Manifest) -> None:
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest
    assert loaded.fingerprint == manifest.fingerprint
    assert loaded.domains("train") == ["c4"] and loaded.domains("held_out") == []
    assert loaded.tokens("train") == {"c4": 70}


def test_fingerprint_is_of_the_data_not_of_its_origin(manifest: Manifest) -> None:
    moved = replace(manifest, sources=[SourceRecord("x", 1, 1)], arguments={"a": 1})
    assert moved.fingerprint == manifest.fingerprint
    shards = manifest.splits["train"]["c4"]
    reordered = replace(manifest, splits={"train": {"c4": shards[::-1]}, "held_out": {}})
    other_tokenizer = replace(manifest, tokenizer=replace(manifest.tokenizer, eos_id=3))
    other_tokens = replace(
        manifest,
        splits={"train": {"c4": [replace(shards[0], crc_sha256="1"), shards[1]]}, "held_out": {}},
    )
    prints = {m.fingerprint for m in (manifest, reordered, other_tokenizer, other_tokens)}
    assert len(prints) == 4


def test_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"python -m data\.tokenize"):
        Manifest.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"dtype": "float64"},
        {"tokenizer": {"kind": "x"}},
        {"splits": {"test": {}}},
        {"splits": []},
        {"surprise": 1},
    ],
)
@pytest.mark.usefixtures("manifest")
def test_damaged_manifest_is_refused(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"manifest\.json"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_manifest_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="tokenize again"):
        Manifest.load(tmp_path)


@pytest.mark.usefixtures("manifest")
@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "train/../../x"])
def test_shard_outside_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    file = tmp_path / "manifest.json"
    content = json.loads(file.read_text())
    content["splits"]["train"]["c4"][0]["path"] = path
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="leaves the folder"):
        Manifest.load(tmp_path)


def test_dtype_is_the_narrowest_that_fits() -> None:
    assert dtype_for(32_000) == dtype_for(65_536) == "uint16"
    assert dtype_for(65_537) == dtype_for(1 << 31) == "int32"
    with pytest.raises(InputError, match="limit"):
        dtype_for((1 << 31) + 1)


SHARD: tuple[Any, ...] = ("splits", "train", "c4", 0)
REQUIRED: list[tuple[Any, ...]] = [
    *((name,) for name in ("dtype", "tokenizer", "splits", "sources", "arguments", "version")),
    *(("tokenizer", name) for name in ("kind", "vocab_size", "eos_id", "adds_bos", "probe")),
    *((*SHARD, name) for name in ("path", "tokens", "documents", "text_bytes", "idx_sha256")),
]


@pytest.mark.parametrize("path", [*REQUIRED, SHARD[:2], SHARD[:3], SHARD], ids=str)
def test_values_of_another_type_are_refused(
    tmp_path: Path, manifest: Manifest, path: tuple[Any, ...]
) -> None:
    file = tmp_path / "manifest.json"
    sound = file.read_text()
    for value in (..., None, "5", 5, 5.5, True, [5.5], {"a": [1]}):
        content = parent = json.loads(sound)
        for key in path[:-1]:
            parent = parent[key]
        if value is ...:
            if path not in REQUIRED:
                continue
            del parent[path[-1]]
        elif type(parent[path[-1]]) is type(value) and value not in ("5", [5.5]):
            continue  # merely another value
        elif path[-1] in ("kind", "path", "idx_sha256") and value == "5":
            continue
        else:
            parent[path[-1]] = value
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"manifest\.json.*again"):
            Manifest.load(tmp_path)
    file.write_text(sound)
    assert Manifest.load(tmp_path) == manifest


def test_a_folder_without_manifest_is_called_what_it_is(tmp_path: Path) -> None:
    megatron = tmp_path / "megatron"
    megatron.mkdir()
    (megatron / "text_document.idx").write_bytes(b"MMIDIDX")
    for directory in (megatron, megatron / "text_document"):
        with pytest.raises(InputError, match=r"holds Megatron's \.bin and \.idx .*data\.tokenize"):
            Manifest.load(directory)
    with pytest.raises(InputError, match="is a file; name the folder"):
        Manifest.load(megatron / "text_document.idx")
    for nameless in (Path(), Path("/")):
        with pytest.raises(InputError, match=f"no tokens at {nameless}: it is a folder of"):
            Manifest.load(nameless)
    (tmp_path / "job" / ".partial" / "tasks").mkdir(parents=True)
    with pytest.raises(InputError, match="not finished there; run the same command again"):
        Manifest.load(tmp_path / "job")
