"""Documents of text are told from each other by their ids, and conversations by their marks."""

from pathlib import Path

import numpy as np
import pytest

from data.batches import BatchStream
from data.errors import InputError
from data.reader import Documents, Samples, TokenReader, joined
from data.sampler import DomainSampler
from data.shards import ShardReader
from tests.data.helpers import random_documents, write_folder
from tests.factories import CHATML, write_chat, write_tokenizer

BOS, EOS = 1, 2


def framed(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Documents without BOS and EOS inside, between a BOS and an EOS."""
    inner = random_documents(lengths, seed=seed)
    return [np.concatenate([[BOS], 3 + ids % 900, [EOS]]) for ids in inner]


@pytest.fixture(scope="module")
def chat_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    return write_chat(root / "tokens", write_tokenizer(root / "tokenizer", *CHATML))


def bounds(folder: Path, domain: str) -> np.ndarray:
    """Number of the document of each token of a domain, by the index files."""
    reader = TokenReader(folder, 10)
    numbers: list[np.ndarray] = []
    for record in reader.manifest.splits["train"][domain]:
        starts = ShardReader(folder, record, reader.manifest.dtype, "never").documents()
        own = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        numbers.append(own + (numbers[-1][-1] + 1 if numbers else 0))
    return np.concatenate(numbers)


def test_ids_of_text_tell_what_its_index_says(tmp_path: Path) -> None:
    groups = [framed([1, 30, 2, 7, 1], 1), framed([12, 3, 40, 1, 1, 1], 2)]
    write_folder(tmp_path, {"c4": groups})
    reader = TokenReader(tmp_path, 10, documents="apart")
    expected = bounds(tmp_path, "c4")
    read = reader.samples("c4", np.arange(reader.sizes["c4"]))
    assert read.documents is not None and read.valid is None
    assert read.documents.dtype == np.int32
    whole = expected[: read.ids.size].reshape(-1, 10)
    assert np.array_equal(read.documents, whole - whole[:, :1])
    assert len(np.unique(expected)) == 11


def test_joined_documents_are_not_looked_for(tmp_path: Path) -> None:
    write_folder(tmp_path, {"c4": [framed([30, 30])]})
    choices: tuple[Documents | None, ...] = ("joined", None)
    for documents in choices:
        reader = TokenReader(tmp_path, 10, documents=documents)
        read = reader.samples("c4", np.arange(3))
        assert read.documents is None and read.valid is None
        assert np.array_equal(read.ids, reader.read("c4", np.arange(3)))


def test_ids_that_do_not_tell_are_refused(tmp_path: Path) -> None:
    """A text that spells the end and, behind it, the beginning of a document."""
    documents = [*framed([20, 20]), np.array([BOS, 5, EOS, BOS, 6, EOS])]
    write_folder(tmp_path, {"a": [framed([50])], "c4": [documents]})
    TokenReader(tmp_path, 10)
    with pytest.raises(InputError, match=r"documents of c4 hold the id that ends them \(2\)"):
        TokenReader(tmp_path, 10, documents="apart")


def test_an_end_inside_a_document_is_none_where_no_beginning_follows(tmp_path: Path) -> None:
    write_folder(tmp_path, {"c4": [[np.array([BOS, 5, EOS, 7, 6, EOS]), *framed([20])]]})
    read = TokenReader(tmp_path, 10, documents="apart").samples("c4", np.arange(1))
    assert read.documents is not None
    assert read.documents[0].tolist() == [0] * 6 + [1] * 4


def test_conversations_cannot_be_joined_or_read_in_another_length(chat_tokens: Path) -> None:
    with pytest.raises(InputError, match=r"holds conversations.*cannot be read end to end"):
        TokenReader(chat_tokens, 128)
    with pytest.raises(InputError, match=r"samples of 128 tokens, not 64: use --seq-len 128, or"):
        TokenReader(chat_tokens, 64, documents="apart")
    assert TokenReader(chat_tokens, 128, documents=None).documents == "apart"


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_read_the_documents_that_one_reads(chat_tokens: Path, world: int) -> None:
    def batches(world: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        streams = []
        for rank in range(world):
            reader = TokenReader(chat_tokens, 128, documents=None)
            sampler = DomainSampler(reader.sizes, {"talks": 1.0}, 3, reader.fingerprint)
            streams.append(BatchStream(reader, sampler, 8, rank, world))
        found = []
        for _ in range(6):
            parts = [stream.next() for stream in streams]
            assert all(part.documents is not None and part.valid is not None for part in parts)
            whole = joined([Samples(part.ids, part.documents, part.valid) for part in parts])
            assert whole.documents is not None and whole.valid is not None
            found.append((whole.ids, whole.documents, whole.valid))
        return found

    for mine, others in zip(batches(world), batches(1), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, others, strict=True))
        ids, documents, valid = mine
        reader = TokenReader(chat_tokens, 128, documents=None)
        every = reader.samples("talks", np.arange(reader.sizes["talks"]))
        assert every.documents is not None and every.valid is not None
        for row, number, counts in zip(ids, documents, valid, strict=True):
            (place,) = np.flatnonzero((every.ids == row).all(1))
            assert np.array_equal(every.documents[place], number)
            assert np.array_equal(every.valid[place], counts)


def test_parts_are_joined(chat_tokens: Path) -> None:
    reader = TokenReader(chat_tokens, 128, documents=None)
    one = joined([reader.samples("talks", np.array([index])) for index in range(3)])
    other = reader.samples("talks", np.arange(3))
    for name in ("ids", "documents", "valid"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
