"""Tiny deterministic inputs for tests: a tokenizer, documents, token folders, random models."""

import json
import random
from pathlib import Path
from typing import Any

BYTES = 256
WORDS = (
    "the shape of a model is a contract and the mask keeps what the count allows while loss falls"
).split()


def write_tokenizer(path: Path, *special: str, template: str | None = None) -> Path:
    """Folder with a byte-level BPE tokenizer without merges: 256 bytes, <unk>, <s>, </s>, and
    further `special` tokens. `template` is its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {symbol: len(vocabulary) + index for index, symbol in enumerate(alphabet)}
    assert len(vocabulary) == BYTES + 3
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if special:
        fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.chat_template = template
    fast.save_pretrained(str(path))
    return path


def documents(domain: str, number: int, seed: int) -> list[dict[str, Any]]:
    """SlimPajama-style records of one domain: {"text", "meta": {"redpajama_set_name"}}."""
    generator = random.Random(f"{domain}-{seed}")
    return [
        {
            "text": f"{domain} {index} " + " ".join(generator.choices(WORDS, k=60)),
            "meta": {"redpajama_set_name": domain},
        }
        for index in range(number)
    ]


def write_documents(path: Path, number: int = 60, seed: int = 0) -> Path:
    """One .jsonl file with the documents of the domains alpha and beta interleaved."""
    records = [documents(domain, number, seed) for domain in ("alpha", "beta")]
    lines = [json.dumps(record) for group in zip(*records, strict=True) for record in group]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_tokens(
    path: Path, tokenizer: Path, *, number: int = 60, seq_len: int = 64, held_out: float = 0.1
) -> Path:
    """Token folder made by the real `data.tokenize` command from `write_documents`."""
    from data.tokenize import main

    source = write_documents(path.parent / f"{path.name}-text" / "documents.jsonl", number)
    main(
        [
            *("--input", str(source)),
            *("--tokenizer", str(tokenizer)),
            *("--output", str(path)),
            *("--seq-len", str(seq_len)),
            *("--held-out", str(held_out)),
            *("--workers", "1"),
        ]
    )
    return path


CHATML = ("<|im_start|>", "<|im_end|>")
"""Tokens of the chat template chatml."""


def conversations(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records of conversations in the three forms in turn, of one to three answers."""
    generator = random.Random(f"conversations-{seed}")

    def say() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randrange(1, 6)))

    records: list[dict[str, Any]] = []
    for index in range(number):
        said = [(f"{index} {say()}?", f"{say()}.") for _ in range(generator.randrange(1, 4))]
        speakers = ("user", "assistant") if index % 3 else ("human", "gpt")
        turns = [turn for pair in said for turn in zip(speakers, pair, strict=True)]
        if index % 3 == 0:
            listed = [{"from": role, "value": text} for role, text in turns]
            records.append({"id": index, "conversations": listed})
        elif index % 3 == 1:
            system = [("system", say())] if index % 2 else []
            listed = [{"role": role, "content": text} for role, text in [*system, *turns]]
            records.append({"messages": listed})
        else:
            *history, (question, answer) = said
            records.append({"instruction": question, "output": answer, "history": history})
    return records


def write_chat(
    path: Path,
    tokenizer: Path,
    *more: str,
    number: int = 60,
    seq_len: int = 128,
    held_out: float = 0.2,
    template: str = "chatml",
) -> Path:
    """Token folder of `conversations` in the domain "talks", made by the real command; `more`
    arguments are passed on."""
    from data.tokenize import main

    source = path.parent / f"{path.name}-text" / "talks" / "talks.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) for record in conversations(number)]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    main(
        [
            *("--input", str(source.parent), "--conversations", "--chat-template", template),
            *("--tokenizer", str(tokenizer), "--output", str(path), "--seq-len", str(seq_len)),
            *("--held-out", str(held_out), "--workers", "1", *more),
        ]
    )
    return path


def write_model(path: Path, tokenizer: Path | None = None, **overrides: Any) -> Path:
    """Hugging Face folder of a random fp32 Llama: 2 layers, hidden 32, 4 heads, 2 KV, ffn 48.

    `overrides` are LlamaConfig fields. `tokenizer` is a folder whose tokenizer files are copied; a
    byte-level one is written when None.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": BYTES + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(fields | overrides))).save_pretrained(str(path))
    if tokenizer is None:
        write_tokenizer(path)
    else:
        for file in tokenizer.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens")):
                (path / file.name).write_bytes(file.read_bytes())
    return path


def write_hub_model(cache: Path, *states: Path) -> list[str]:
    """The model acme/tiny in a cache as huggingface_hub makes them, with a commit for each of the
    folders `states`; returns the commits. `main` is the first."""
    import shutil

    commits = [f"{index:x}" * 40 for index in range(10, 10 + len(states))]
    for commit, state in zip(commits, states, strict=True):
        shutil.copytree(state, cache / "models--acme--tiny" / "snapshots" / commit)
    move_hub_model(cache, commits[0])
    return commits


def move_hub_model(cache: Path, commit: str) -> None:
    """Makes `commit` the newest state of acme/tiny in `cache`."""
    main = cache / "models--acme--tiny" / "refs" / "main"
    main.parent.mkdir(exist_ok=True)
    main.write_text(commit)
