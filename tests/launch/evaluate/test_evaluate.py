"""`python -m launch.evaluate`: its numbers are transformers' own; what it cannot do it refuses."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import InputError
from data.reader import TokenReader
from launch.evaluate import run as run_module
from launch.evaluate.__main__ import main
from launch.evaluate.texts import TEXT_SETS
from pruner.timing import Timing
from tests.factories import write_model, write_tokens


def transformers_loss(folder: Path, ids: torch.Tensor) -> tuple[float, int]:
    """Mean next-token loss over all positions of ids [n, L], and the number of targets."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids).logits.double()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return loss.item(), ids[:, 1:].numel()


def test_held_out_losses_equal_transformers(
    tmp_path: Path, tiny_model: Path, tiny_tokens: Path
) -> None:
    result_file = tmp_path / "out" / "result.json"
    arguments = ["--model", str(tiny_model), "--data", str(tiny_tokens), "--seq-len", "32"]
    main([*arguments, "--sequences", "3", "--batch", "2", "--json", str(result_file)])
    result = json.loads(result_file.read_text())
    reader = TokenReader(tiny_tokens, 32, split="held_out")
    assert sorted(result["domains"]) == ["alpha", "beta"]
    total, count = 0.0, 0
    for domain, row in result["domains"].items():
        rows = torch.arange(min(3, reader.sizes[domain])).numpy()
        loss, targets = transformers_loss(tiny_model, torch.from_numpy(reader.read(domain, rows)))
        assert row["tokens"] == targets
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        total, count = total + loss * targets, count + targets
    assert result["overall"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["overall"]["tokens"] == count


def test_document_is_scored_with_the_stated_window_and_bos(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "the shape of a model is a contract. ähnlich! " * 3
    file = tmp_path / "document.txt"
    file.write_text(text, encoding="utf-8")
    result_file = tmp_path / "result.json"
    arguments = ["--model", str(tiny_model), "--text", str(file), "--window", "64"]
    main([*arguments, "--bos", "every", "--json", str(result_file)])
    score = json.loads(result_file.read_text())["text"]
    # The byte-level tokenizer has one id per byte.
    tokens = len(text.encode())
    assert score["tokens"] == score["targets"] == score["bytes"] == tokens
    assert (score["window"], score["stride"], score["bos"]) == (64, None, "every")
    assert score["perplexity"] == pytest.approx(math.exp(score["nll"] / tokens))
    assert score["bits_per_byte"] == pytest.approx(score["nll"] / tokens / math.log(2))
    shown = capsys.readouterr().out
    assert "one in front of every window" in shown
    assert "windows of 64 side by side" in shown


def test_published_sets_are_taken_from_the_cache(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [" = A title = \n", "", "words of a page " * 9, "more of them " * 7]
    file = cached_set(tmp_path / "hub", "wikitext2", {"text": rows})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "own.txt").write_text("\n\n".join(rows))
    arguments = ["--model", str(tiny_model), str(tiny_model), "--window", "32", "--json"]
    texts = ["--text", "wikitext2", str(tmp_path / "own.txt")]
    main([*arguments, str(tmp_path / "out.json"), *texts])
    scores = json.loads((tmp_path / "out.json").read_text())["models"][0]["texts"]
    published, own = scores["wikitext2"], scores[texts[2]]
    # One id per byte; the last, shorter window of a published set does not count.
    assert own["tokens"] == own["bytes"] == len("\n\n".join(rows))
    assert published["tokens"] == own["tokens"] // 32 * 32 == published["bytes"]
    assert published["whole_windows"] and published["bos"] == "no"
    assert "perplexity of wikitext2" in capsys.readouterr().out

    with pytest.raises(InputError, match=r"--text ptb: is not in the local .*HF_HUB_OFFLINE"):
        main([*arguments, str(tmp_path / "out.json"), "--text", "ptb"])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"cannot be read .*Salesforce/wikitext fetched again"):
        main([*arguments, str(tmp_path / "out.json"), "--text", "wikitext2"])
    # A file here comes before a set of its name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ptb").write_text("a text of one's own")
    main([*arguments, "out.json", "--text", "ptb"])
    found = json.loads((tmp_path / "out.json").read_text())["models"][1]["text"]
    assert found["bytes"] == 19 and "set" not in found


def test_perplexities_of_other_tokens_do_not_stand_side_by_side(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where both tokenizers make as many of a text."""
    other = shutil.copytree(tiny_model, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "text.txt").write_text("a text about tokens " * 4)
    arguments = ["--text", str(tmp_path / "text.txt"), "--window", "32", "--model"]
    for second, shown in ((tiny_model, True), (other, False)):
        main([*arguments, str(tiny_model), str(second)])
        printed = capsys.readouterr().out
        assert ("perplexity of" in printed) is shown and "bits per byte of" in printed


def cached_set(cache: Path, name: str, columns: dict[str, list[str]]) -> Path:
    """The file of a set as the hub's library keeps it."""
    known = TEXT_SETS[name]
    folder = cache / f"datasets--{known.repository.replace('/', '--')}"
    file = folder / "snapshots" / "abc" / known.files.replace("*", "0")
    file.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / known.revision).write_text("abc")
    parquet.write_table(pa.table(columns), file)
    return file


def test_several_models_stand_side_by_side(
    tmp_path: Path,
    tiny_model: Path,
    tiny_tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the same sequences; each one's numbers are those it has alone."""
    monkeypatch.setattr("pruner.latency.ROUNDS", 2)
    other = write_model(tmp_path / "other", num_hidden_layers=1)
    text = tmp_path / "text.txt"
    text.write_text("\ufeffsome text to score", encoding="utf-8")
    models = [str(tiny_model), str(other), str(tiny_model)]
    arguments = ["--data", str(tiny_tokens), "--seq-len", "32", "--sequences", "3"]
    arguments += ["--text", str(text), "--window", "64", "--threads", "1"]
    found = tmp_path / "several.json"
    main(["--model", *models, *arguments, "--speed", "--json", str(found)])
    several = json.loads(found.read_text())["models"]
    shown = capsys.readouterr().out
    main(["--model", str(other), *arguments, "--json", str(found)])
    alone = json.loads(found.read_text())
    decoding = [result.pop("decoding") for result in several]
    assert several[1] == alone and several[0] == several[2]
    assert alone["text"]["bytes"] == len("some text to score")
    assert all(one["rounds"] == 2 and one["seconds"] > 0 and "spread" in one for one in decoding)
    for words in (
        "overall",
        "above the first",
        "+0.0000",
        "bits per byte",
        "ms per token",
        "speed",
    ):
        assert words in shown, words
    assert f"{several[1]['overall']['loss']:.4f}" in shown


def test_a_damaged_model_is_named_and_its_json_is_json(
    tmp_path: Path, tiny_model: Path, tiny_tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = write_model(tmp_path / "diverged")
    state = load_file(damaged / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][1, 2] = math.nan
    save_file(state, damaged / "model.safetensors", {"format": "pt"})
    text, found = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("some text to score")
    arguments = ["--data", str(tiny_tokens), "--seq-len", "32", "--sequences", "2"]
    arguments += ["--text", str(text), "--window", "64", "--json", str(found)]
    main(["--model", str(tiny_model), str(damaged), *arguments])
    shown = capsys.readouterr().err
    assert f"the loss of {damaged} is not finite: its weights are damaged" in shown
    assert f"the loss of {tiny_model}" not in shown
    sound, broken = json.loads(found.read_text(), parse_constant=pytest.fail)["models"]
    assert broken["overall"]["loss"] is broken["text"]["perplexity"] is None
    assert sound["overall"]["loss"] > 0 and sound["text"]["perplexity"] > 0
    main(["--model", str(damaged), "--text", str(text), "--window", "64"])
    assert re.search(r"perplexity\s+│ nan", capsys.readouterr().out)


def test_speed_alone(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", str(tiny_model), "--speed", "--threads", "1"])
    assert re.search(r"decoding: .* ms per token, greedy at batch 1", capsys.readouterr().out)


def test_equal_models_of_unequal_speed_show_a_busy_machine(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timer(configs: Any) -> list[Timing]:
        return [Timing((1.0 + index,)) for index, _ in enumerate(configs)]

    monkeypatch.setattr(run_module, "decode_timer", lambda *_: timer)
    main(["--model", str(tiny_model), str(tiny_model), "--speed"])
    assert re.search("too busy to time: .* of one shape, differ by 100%", capsys.readouterr().err)


def test_domains_without_held_out_text_are_named(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = write_tokens(tmp_path / "tokens", tiny_model)
    manifest = json.loads((tokens / "manifest.json").read_text())
    del manifest["splits"]["held_out"]["beta"]
    (tokens / "manifest.json").write_text(json.dumps(manifest))
    main(["--model", str(tiny_model), "--data", str(tokens), "--seq-len", "32"])
    assert "no held_out text to measure: beta" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data TOKENS, --text FILE"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--data", "TOKENS", "--seq-len", "512"], "512"),
        (["--data", "TOKENS", "--seq-len", "1"], "--seq-len 1"),
        (["--text", "TEXT", "--window", "512"], "at most 256 positions"),
        (["--text", "TEXT", "--window", "64", "--bos", "yes", "--stride", "64"], "--stride 64"),
        (["--text", "SHORT", "--window", "64"], r"--text .*short\.txt: .*nothing to predict"),
        (["--text", "RECORDS"], r"a\.JSONL: is JSON Lines by its name.* into a \.txt file"),
        (["--text", "PACKED"], r"text\.txt\.gz: is compressed; unpack it"),
        (["--data", "TOKENS", "--seq-len", "32", "--json", "FOLDER"], "is a folder"),
        (["--data", "DAMAGED", "--seq-len", "32"], "alpha"),
    ],
)
def test_impossible_requests_are_refused_before_weights_load(
    tmp_path: Path, tiny_model: Path, tiny_tokens: Path, arguments: list[str], message: str
) -> None:
    text, short = tmp_path / "text.txt", tmp_path / "short.txt"
    text.write_text("some text that is long enough to score " * 5)
    short.write_text("a")
    known = {"TOKENS": tiny_tokens, "TEXT": text, "SHORT": short, "FOLDER": tmp_path}
    for word, name in (("RECORDS", "a.JSONL"), ("PACKED", "text.txt.gz")):
        known[word] = tmp_path / name
        known[word].write_text('{"text": "some text"}')
    if "DAMAGED" in arguments:
        damage(tiny_tokens, "alpha")
        known["DAMAGED"] = tiny_tokens
    (tiny_model / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=message):
        main(["--model", str(tiny_model), *(str(known.get(word, word)) for word in arguments)])


def test_a_bos_the_tokenizer_lacks_is_refused_before_weights_load(
    tmp_path: Path, tiny_model: Path
) -> None:
    settings = tiny_model / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": None}))
    (tiny_model / "model.safetensors").write_bytes(b"not weights")
    text = tmp_path / "text.txt"
    text.write_text("some text")
    with pytest.raises(InputError, match="no BOS token; use --bos no"):
        main(["--model", str(tiny_model), "--text", str(text), "--bos", "yes", "--window", "64"])


@pytest.mark.parametrize("kind", ["special", "word"])
def test_ids_of_a_text_beyond_the_model_are_refused_before_weights_load(
    kind: str, tmp_path: Path, tiny_model: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    if kind == "word":
        tokenizer.add_tokens(["fox"])
    else:
        tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.save_pretrained(tiny_model)
    (tiny_model / "model.safetensors").write_bytes(b"not weights")
    text = tmp_path / "text.txt"
    text.write_text("a quick fox jumps " * 8)
    arguments = ["--model", str(tiny_model), "--text", str(text), "--window", "64"]
    with pytest.raises(InputError, match=r"--text .* gives id 259, for which the model has no row"):
        main([*arguments, "--bos", "yes"])


def test_a_model_without_a_tokenizer_is_told_what_to_bring(
    tmp_path: Path, tiny_model: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text that is long enough")
    kept = tiny_model / "tokenizer.json", tmp_path / "tokenizer.json"
    kept[0].rename(kept[1])
    words = ["--model", str(tiny_model), "--text", str(text), "--window", "16"]
    with pytest.raises(InputError, match=r"own tokenizer, and .* holds none: copy tokenizer\.json"):
        main(words)
    kept[1].rename(kept[0])
    main(words)


def damage(tokens: Path, domain: str) -> None:
    """Flip one byte in the held-out shard of `domain`."""
    file = next(
        path for path in tokens.rglob("*.bin") if "held" in str(path) and domain in str(path)
    )
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)


def test_tokens_of_a_larger_vocabulary_are_refused(tmp_path: Path, tiny_tokenizer: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", tiny_tokenizer)
    model = write_model(tmp_path / "small", vocab_size=100)
    with pytest.raises(InputError, match="100"):
        main(["--model", str(model), "--data", str(tokens), "--seq-len", "32"])


def test_models_of_two_tokenizers_are_not_compared_on_tokens(
    tmp_path: Path, tiny_model: Path, tiny_tokens: Path
) -> None:
    """Tokens of either are not the other's, so to tokenize again leads nowhere."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["T"], vocabulary["h"] = vocabulary["h"], vocabulary["T"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    data = ["--data", str(tiny_tokens), "--seq-len", "32"]
    for models in ((tiny_model, other), (other, tiny_model)):
        first, second = (str(model) for model in models)
        with pytest.raises(InputError, match=f"{first} and {second} have different tokenizers"):
            main(["--model", first, second, *data])
    text = tmp_path / "text.txt"
    text.write_text("The text of both. " * 20)
    main(["--model", str(tiny_model), str(other), "--text", str(text), "--window", "64"])
