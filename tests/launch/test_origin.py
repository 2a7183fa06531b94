"""An output folder keeps the first names of what its stages work on, and takes no other content."""

from pathlib import Path

import pytest

from data.errors import InputError
from launch.origin import first_names, model_fingerprint
from launch.stages import Stages
from tests.factories import write_model


def test_the_first_names_stay_and_the_content_counts(tmp_path: Path) -> None:
    names = {"--source": "a", "--output": "out"}
    assert first_names(tmp_path, names, {"--source": "1"}) == names
    assert first_names(tmp_path, {"--source": "b", "--output": "x"}, {"--source": "1"}) == names
    with pytest.raises(InputError, match="--source b: is not a, of which the results in --output"):
        first_names(tmp_path, names | {"--source": "b"}, {"--source": "2"})
    with pytest.raises(InputError, match="--source a: has changed since the results in --output"):
        first_names(tmp_path, names, {"--source": "2"})
    (tmp_path / ".stages" / "origin.json").write_text("5")
    with pytest.raises(InputError, match=r"origin\.json: .*delete it, if .* the same --source"):
        first_names(tmp_path, names, {"--source": "1"})


def test_stages_are_known_by_the_first_names(tmp_path: Path) -> None:
    calls: list[str] = []

    def go(place: str, renamed: list[tuple[str, str]], value: int = 1) -> None:
        settings = {"--data": f"{place}/tokens", "flags": ["--teacher", place, value]}
        Stages(tmp_path, number=1, renamed=renamed).run(
            "a", settings=settings, folder=tmp_path / "a", action=lambda: calls.append(place)
        )

    go("old", [])
    go("new", [("new", "old")])
    assert calls == ["old"]
    go("new", [("new", "old")], value=2)
    go("newer", [("new", "old")], value=2)
    assert calls == ["old", "new", "newer"]


def test_a_models_weights_and_tokenizer_make_its_fingerprint(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    found = model_fingerprint(model)
    (tmp_path / "link").symlink_to(model)
    assert model_fingerprint(tmp_path / "link") == found
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert model_fingerprint(model) != found
    assert model_fingerprint(write_model(tmp_path / "other", hidden_size=48)) != found
