"""The learning curve of a run: its saved steps are measured as models are."""

import json
from pathlib import Path

import pytest

from data.errors import InputError
from launch.evaluate.__main__ import main
from tests.trainer.tiny import options, pretrain


@pytest.fixture
def run(tiny_model: Path, tiny_tokens: Path, tmp_path: Path) -> Path:
    train = options(steps=5, save_interval=2, keep_all_checkpoints=True, precision="fp32")
    pretrain(train, model=tiny_model, data=tiny_tokens, output=tmp_path / "run")
    return tmp_path / "run"


def test_saved_steps_follow_the_models(
    run: Path,
    tiny_model: Path,
    tiny_tokens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text("a text of a few words, " * 5)
    arguments = ["--checkpoints", str(run), "--data", str(tiny_tokens), "--seq-len", "32"]
    arguments += ["--text", str(tmp_path / "text.txt"), "--window", "32"]
    arguments += ["--json", str(tmp_path / "out.json")]
    main(["--model", str(tiny_model), str(run), *arguments])
    models = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [one.get("step") for one in models] == [None, None, 2, 4, 5]
    assert [one.get("tokens") for one in models[2:]] == [step * 8 * 16 for step in (2, 4, 5)]
    last, final = models[-1], models[1]
    assert last["overall"] == final["overall"] and last["text"] == final["text"]
    assert len({one["overall"]["loss"] for one in models}) == 4
    printed = capsys.readouterr().out
    for one in models[2:]:
        line = next(text for text in printed.splitlines() if f"step {one['step']} " in text)
        assert f"{one['overall']['loss']:.4f}" in line and f"{one['tokens']:,}" in line
    # Of a run alone, its steps.
    main(arguments)
    alone = json.loads((tmp_path / "out.json").read_text())["models"]
    assert alone == models[2:]


def test_a_run_without_steps_or_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text of a few words, " * 5)
    arguments = ["--text", str(tmp_path / "text.txt"), "--window", "32", "--checkpoints"]
    with pytest.raises(InputError, match=r"--checkpoints .*nowhere: no such folder. Name the out"):
        main([*arguments, str(tmp_path / "nowhere")])
    (run / "model" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"hold no tokenizer, .*started from with --model"):
        main([*arguments, str(run)])
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"finished, and removed its own.*--keep-all-checkpoints"):
        main([*arguments, str(run)])
    with pytest.raises(InputError, match=r"--speed beside --checkpoints"):
        main(["--speed", "--checkpoints", str(run)])
