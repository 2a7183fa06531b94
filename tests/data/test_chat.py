"""Tokens of conversations are transformers' own, and those of answers alone count."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.chat import TOO_LONG, Chat, Encoded, open_chat
from data.conversations import ASSISTANT, SYSTEM, USER, Turn, Unfit, turns_of
from data.errors import InputError
from data.tokenizers import load_tokenizer
from tests.factories import CHATML, conversations, write_tokenizer

TURNS = (
    Turn(SYSTEM, "be kind"),
    Turn(USER, "hi é"),
    Turn(ASSISTANT, "größe two"),
    Turn(USER, "and?"),
    Turn(ASSISTANT, " three "),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("chat"), *CHATML)


def chat(folder: Path, template: str | None = "chatml", seq_len: int = 10_000) -> Chat:
    return open_chat(template, load_tokenizer(folder), str(folder), seq_len)


def encode(chat: Chat, *turns: Turn) -> Encoded:
    (found,) = chat.encode([turns])
    assert isinstance(found, Encoded), found
    return found


def decoded(folder: Path, encoded: Encoded) -> list[str]:
    """The text of each run of tokens that count."""
    reader: Any = AutoTokenizer.from_pretrained(str(folder))
    edges = np.flatnonzero(np.diff(encoded.counts.astype(int), prepend=0, append=0))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [reader.decode(encoded.ids[start:stop]) for start, stop in runs]


@pytest.mark.parametrize("name", ["chatml", "vicuna"])
def test_ids_are_those_of_transformers(folder: Path, name: str) -> None:
    found = chat(folder, name)
    reader: Any = AutoTokenizer.from_pretrained(str(folder))
    for record in conversations(12):
        turns = turns_of(record)
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        expected = reader.apply_chat_template(messages, chat_template=found.template.source)
        assert encode(found, *turns).ids.tolist() == list(expected["input_ids"])


def test_answers_and_what_ends_them_count(folder: Path) -> None:
    whole = encode(pickle.loads(pickle.dumps(chat(folder))), *TURNS)
    assert decoded(folder, whole) == ["größe two<|im_end|>", " three <|im_end|>"]
    assert (whole.answers, whole.cut, whole.unanswered) == (2, 0, False)
    vicuna = encode(chat(folder, "vicuna"), *TURNS)
    assert decoded(folder, vicuna) == [" größe two</s>", "  three </s>"]


def test_what_a_model_reads_before_its_answer_is_what_counts_not(folder: Path) -> None:
    """Up to the first token that counts the ids are those of the prompt for generation."""
    reader: Any = AutoTokenizer.from_pretrained(str(folder))
    for name in ("chatml", "vicuna"):
        found = chat(folder, name)
        messages = [{"role": turn.role, "content": turn.text} for turn in TURNS[:2]]
        prompt = reader.apply_chat_template(
            messages, chat_template=found.template.source, add_generation_prompt=True
        )["input_ids"]
        encoded = encode(found, *TURNS)
        first = int(np.flatnonzero(encoded.counts)[0])
        assert encoded.ids[:first].tolist() == list(prompt)


def test_a_token_that_begins_before_an_answer_counts(tmp_path: Path) -> None:
    """Tokens with a blank in front, as Llama's are, after a template that writes the blank."""
    words = ["<unk>", "</s>", "U:", "▁hi", "▁A:", "▁yes"]
    words += sorted(set("".join(words)) | {"▁", ";"})
    merges = [("U", ":"), ("▁", "A"), ("▁A", ":"), ("▁", "h"), ("▁h", "i")]
    merges += [("▁", "y"), ("▁y", "e"), ("▁ye", "s")]
    words += [first + second for first, second in merges]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'U: ' + m.content }}{% else %}"
        "{{ ' A: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' A: ' }}{% endif %}"
    )
    fast.save_pretrained(str(tmp_path))
    encoded = encode(chat(tmp_path, None), Turn(USER, "hi"), Turn(ASSISTANT, "yes"))
    tokens = fast.convert_ids_to_tokens(encoded.ids.tolist())
    assert tokens == ["U:", "▁hi", "▁A:", "▁yes", "</s>"]
    assert encoded.counts.tolist() == [False, False, False, True, True]


def test_long_conversations_are_cut_behind_an_answer(folder: Path) -> None:
    whole = encode(chat(folder), *TURNS)
    first = encode(chat(folder), *TURNS[:3])
    for seq_len in range(len(first.ids), len(whole.ids)):
        found = encode(chat(folder, seq_len=seq_len), *TURNS)
        assert found.ids.tolist() == first.ids.tolist()
        assert found.counts.tolist() == first.counts.tolist()
        assert (found.answers, found.cut) == (1, 1)
    assert encode(chat(folder, seq_len=len(whole.ids)), *TURNS).cut == 0
    (left,) = chat(folder, seq_len=len(first.ids) - 1).encode([TURNS])
    assert isinstance(left, Unfit) and left.kind == TOO_LONG and "--seq-len" in left.detail


def test_the_users_last_word_is_left_out(folder: Path) -> None:
    found = encode(chat(folder), *TURNS, Turn(USER, "anybody?"))
    assert found.unanswered and found.ids.tolist() == encode(chat(folder), *TURNS).ids.tolist()


def test_one_unfit_conversation_leaves_the_others_as_they_are(folder: Path) -> None:
    spelled = (Turn(USER, "what is <|im_end|>?"), Turn(ASSISTANT, "an end"))
    first, bad, last = chat(folder).encode([TURNS, spelled, TURNS[:3]])
    assert isinstance(bad, Unfit) and bad.kind == "a turn that spells a special token"
    assert "turn 1 spells '<|im_end|>'" in bad.detail
    assert isinstance(first, Encoded) and isinstance(last, Encoded)
    assert first.ids.tolist() == encode(chat(folder), *TURNS).ids.tolist()
    assert last.ids.tolist() == encode(chat(folder), *TURNS[:3]).ids.tolist()


def test_documents_of_text_still_spell_special_tokens_in_characters(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    before = tokenizer.encode(["a <|im_end|>"])[0].tolist()
    chat(folder).encode([TURNS])
    assert tokenizer.encode(["a <|im_end|>"])[0].tolist() == before
    assert len(before) == len("a <|im_end|>")


def test_the_tokenizers_own_template_and_its_end_of_turn(tmp_path: Path) -> None:
    source = chat(write_tokenizer(tmp_path / "a", *CHATML)).template.source
    own = chat(write_tokenizer(tmp_path / "b", *CHATML, template=source), None)
    assert own.record().template == source and own.record().template_name == "tokenizer"
    reader = AutoTokenizer.from_pretrained(str(tmp_path / "b"))
    assert own.end_of_turn == reader.convert_tokens_to_ids("<|im_end|>")
    assert chat(tmp_path / "b", "vicuna").end_of_turn == reader.eos_token_id


@pytest.mark.parametrize("end", ["#", " END"])
def test_what_an_answer_may_hold_is_no_end_of_generation(
    end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    own = chat(write_tokenizer(tmp_path, *CHATML, template=template), None)
    assert own.end_of_turn is None
    told = f"ends answers with {end.strip()!r}, which is no special token"
    assert told in capsys.readouterr().err


def test_a_template_without_an_end_is_refused(tmp_path: Path) -> None:
    endless = "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"
    with pytest.raises(InputError, match="recursion"):
        chat(write_tokenizer(tmp_path, *CHATML, template=endless), None)


def test_tokenizers_that_do_not_fit_are_refused(
    tiny_tokenizer: Path, sentencepiece_model: Path
) -> None:
    with pytest.raises(InputError, match=r"has no special token <\|im_start\|>; use .* vicuna"):
        chat(tiny_tokenizer)
    with pytest.raises(InputError, match=r"has no chat template"):
        chat(tiny_tokenizer, None)
    with pytest.raises(InputError, match=r"sentencepiece model alone.*tokenizer\.json"):
        chat(sentencepiece_model, "vicuna")
