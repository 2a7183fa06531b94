"""An output folder keeps the first names of what its stages work on, and takes no other content."""

from pathlib import Path

import pytest

from data.errors import InputError
from launch.origin import first_names, model_fingerprint
from launch.stages import Stages
from tests.data.test_tokenizers import edit_json
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
    changed = model_fingerprint(model)
    assert changed.partition(":")[0] != found.partition(":")[0]
    # Another end of documents is not in that file.
    edit_json(model / "tokenizer_config.json", lambda content: content.update(eos_token="<s>"))
    assert model_fingerprint(model).partition(":")[0] == changed.partition(":")[0]
    assert model_fingerprint(model) != changed
    assert model_fingerprint(write_model(tmp_path / "other", hidden_size=48)) != found


def test_origins_of_before_the_tokenizers_settings_counted(tmp_path: Path) -> None:
    names = {"--source": "a"}
    first_names(tmp_path, names, {"--source": "1"})
    assert first_names(tmp_path, names, {"--source": "1:2"}) == names
    first_names(tmp_path / "new", names, {"--source": "1:2"})
    with pytest.raises(InputError, match="--source a: has changed since"):
        first_names(tmp_path / "new", names, {"--source": "1:3"})


def test_a_name_on_the_hub_that_moved_says_what_it_was(tmp_path: Path) -> None:
    names, then = {"--source": "acme/tiny"}, {"--source": "acme/tiny@a"}
    first_names(tmp_path, names, {"--source": "1"}, then)
    told = r"has changed since .* made; acme/tiny was revision a: give --source acme/tiny@a, or nam"
    with pytest.raises(InputError, match=told):
        first_names(tmp_path, names, {"--source": "2"}, {"--source": "acme/tiny@b"})
    assert first_names(tmp_path, then, {"--source": "1"}, then) == names
