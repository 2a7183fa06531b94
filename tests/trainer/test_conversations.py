"""Continued pre-training on conversations, and on text whose documents are kept apart."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from data.errors import InputError
from data.manifest import Manifest
from launch.evaluate.__main__ import main as evaluate
from pruner.shear import main as shear
from tests.factories import CHATML, write_chat, write_model, write_tokenizer
from tests.trainer.test_cpt import stop_during
from tests.trainer.test_finetune import tune
from tests.trainer.tiny import losses, options, pretrain
from trainer.loop import Trainer


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tokenizer/, model/ (261 ids, no chat template) and chat/, of 128 tokens."""
    root = tmp_path_factory.mktemp("spoken")
    tokenizer = write_tokenizer(root / "tokenizer", *CHATML)
    write_model(root / "model", tokenizer, vocab_size=261)
    write_chat(root / "chat", tokenizer)
    return root


def run(folder: Path, output: Path, data: str = "chat", **changes: Any) -> Trainer | None:
    """Eight steps, saved after every second."""
    seq_len = 128 if data == "chat" else 64
    config = options(steps=8, save_interval=2, seq_len=changes.pop("seq_len", seq_len))
    return pretrain(config, model=folder / "model", data=folder / data, output=output, **changes)


def test_the_chat_template_goes_along_with_the_model(spoken: Path, tmp_path: Path) -> None:
    run(spoken, tmp_path)
    found = losses(tmp_path)
    assert found[-1] < found[0]
    record = Manifest.load(spoken / "chat").chat
    assert record is not None
    model = tmp_path / "model"
    assert AutoTokenizer.from_pretrained(str(spoken / "model")).chat_template is None
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    assert tokenizer.chat_template == record.template
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<|im_start|>user\nhi<|im_end|>\n"
    generation = GenerationConfig.from_pretrained(str(model))
    assert not generation._from_model_config
    ends = generation.eos_token_id
    assert ends == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    report = json.loads((tmp_path / "cpt.json").read_text())
    assert report["held_out_on"]["documents"] == "apart" and report["held_out"]["talks"]["tokens"]
    targets = [json.loads(line)["targets"] for line in (tmp_path / "metrics.jsonl").open()]
    assert all(0 < count < 8 * 127 for count in targets)


def test_an_interrupted_run_goes_on_as_an_undisturbed_one(
    spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(spoken, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_during(3, patch)
        run(spoken, tmp_path / "parts")
    run(spoken, tmp_path / "parts", documents="apart")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert run(spoken, tmp_path / "parts") is None


def test_documents_belong_to_the_identity_of_a_run(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_during(3, patch)
        run(workspace, tmp_path, "tokens", documents="apart")
    for other in ("joined", None):
        with pytest.raises(InputError, match="--documents was 'apart', now 'joined'"):
            run(workspace, tmp_path, "tokens", documents=other)
    run(workspace, tmp_path, "tokens", documents="apart")
    assert (tmp_path / "cpt.json").exists()


def test_a_run_of_a_former_version_goes_on(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(workspace, tmp_path / "whole", "tokens")
    output = tmp_path / "parts"
    with monkeypatch.context() as patch:
        stop_during(3, patch)
        run(workspace, output, "tokens")
    # They noted nothing of documents, neither here nor in checkpoints.
    for path in (output / "run.json", *output.glob("checkpoints/*/*.json")):
        content = json.loads(path.read_text())
        for identity in (content, content.get("run")):
            if isinstance(identity, dict):
                identity.pop("documents", None)
        path.write_text(json.dumps(content))
    assert "documents" not in (output / "run.json").read_text()
    with pytest.raises(InputError, match="--documents was 'joined', now 'apart'"):
        run(workspace, output, "tokens", documents="apart")
    run(workspace, output, "tokens")
    assert losses(output) == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": "joined"}, "chat holds conversations.*cannot be read end to end"),
        ({"seq_len": 64}, "samples of 128 tokens, not 64: use --seq-len 128"),
    ],
)
def test_what_conversations_cannot_give_is_refused(
    spoken: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(spoken, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_model_without_rows_for_special_tokens_is_refused(spoken: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model", spoken / "tokenizer", vocab_size=259)
    (tmp_path / "chat").symlink_to(spoken / "chat")
    with pytest.raises(InputError, match=r"any special token may stand.*261 ids, the model 259"):
        run(tmp_path, tmp_path / "run")


def test_shearing_reads_no_conversations(spoken: Path, tmp_path: Path) -> None:
    """It would calibrate on padding, and on answers that nobody may learn from."""
    with pytest.raises(InputError, match=r"holds conversations.*shorn cpt"):
        shear(
            [
                *("--source", str(spoken / "model"), "--data", str(spoken / "chat")),
                *("--target", "layers=1", "--output", str(tmp_path), "--seq-len", "128"),
                *("--steps", "2", "--global-batch", "8"),
            ]
        )


def test_evaluation_measures_what_training_measured(spoken: Path, tmp_path: Path) -> None:
    run(spoken, tmp_path / "run", save_dtype="float32")
    words = ["--model", str(tmp_path / "run"), "--data", str(spoken / "chat"), "--seq-len", "128"]
    evaluate([*words, "--sequences", "4", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    report = json.loads((tmp_path / "run" / "cpt.json").read_text())
    assert found["documents"] == "apart"
    for domain, row in report["held_out"].items():
        assert found["domains"][domain]["tokens"] == row["tokens"]
        assert found["domains"][domain]["loss"] == pytest.approx(row["loss"], abs=1e-5)


def test_evaluation_can_keep_documents_of_text_apart(workspace: Path, tmp_path: Path) -> None:
    words = ["--model", str(workspace / "model"), "--data", str(workspace / "tokens")]
    tokens = {}
    for documents in ("joined", "apart"):
        path = tmp_path / f"{documents}.json"
        more = ["--seq-len", "64", "--documents", documents, "--json", str(path)]
        evaluate([*words, *more])
        content = json.loads(path.read_text())
        assert content["documents"] == documents
        tokens[documents] = content["overall"]["tokens"]
    assert tokens["apart"] < tokens["joined"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_is_tuned_on_conversations(
    method: str, spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters too: marks, documents and the chat template are those of continued pre-training."""
    if method == "lora":
        pytest.importorskip("peft")
    words: dict[str, Any] = {"data": str(spoken / "chat"), "seq_len": 128, "method": method}
    tune(spoken, tmp_path / "whole", **words)
    found = losses(tmp_path / "whole")
    assert found[-1] < found[0]
    template = AutoTokenizer.from_pretrained(str(tmp_path / "whole" / "model")).chat_template
    record = Manifest.load(spoken / "chat").chat
    assert record is not None and template == record.template
    targets = [json.loads(line)["targets"] for line in (tmp_path / "whole/metrics.jsonl").open()]
    assert all(0 < count < 8 * 127 for count in targets)
    with monkeypatch.context() as patch:
        stop_during(3, patch)
        tune(spoken, tmp_path / "parts", **words)
    tune(spoken, tmp_path / "parts", **words)
    assert losses(tmp_path / "parts") == found
    identity = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert identity["documents"] == "apart"


def test_a_tokenizer_without_the_special_tokens_is_refused(spoken: Path, tmp_path: Path) -> None:
    """The model has rows for them, but would write its prompts in other tokens."""
    plain = write_tokenizer(tmp_path / "plain")
    write_model(tmp_path / "model", plain, vocab_size=261)
    (tmp_path / "chat").symlink_to(spoken / "chat")
    with pytest.raises(InputError, match=r"tokenizer of .*model has 259 ids, theirs 261: copy"):
        run(tmp_path, tmp_path / "out")
    # The same tokens under other ids.
    write_tokenizer(tmp_path / "model", *reversed(CHATML))
    with pytest.raises(
        InputError, match=r"end with the id 260, and .*model ends them with \[259\]"
    ):
        run(tmp_path, tmp_path / "out")
    write_tokenizer(tmp_path / "model", *CHATML)
    run(tmp_path, tmp_path / "out")


def test_losses_of_joined_documents_are_no_measure_of_documents_apart(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--source", str(workspace / "model"), "--data", str(workspace / "tokens")]
    flags += ["--target", "layers=1", "--steps", "0", "--seq-len", "64", "--threads", "1"]
    flags += ["--output", str(tmp_path / "sheared"), "--calibration-sequences", "4"]
    shear([*flags, "--eval-sequences", "2", "--reference-sequences", "2"])
    (tmp_path / "tokens").symlink_to(workspace / "tokens")
    (tmp_path / "model").symlink_to(tmp_path / "sheared" / "model")
    for documents, said in (("joined", False), ("apart", True)):
        capsys.readouterr()
        run(tmp_path, tmp_path / documents, "tokens", documents=documents)
        assert ("of documents that see each other" in capsys.readouterr().err) is said
