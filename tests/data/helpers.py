"""Token folders written shard by shard, without a tokenizer."""

from pathlib import Path

import numpy as np

from data.manifest import HELD_OUT, TRAIN, Manifest, ShardRecord, TokenizerRecord, dtype_for
from data.shards import ShardWriter


def write_shard(root: Path, path: str, documents: list[np.ndarray], dtype: str) -> ShardRecord:
    writer = ShardWriter(root, path, dtype)
    for document in documents:
        writer.append(document, text_bytes=3 * len(document))
    return writer.commit()


def write_folder(root: Path, domains: dict[str, list[list[np.ndarray]]]) -> Manifest:
    """`domains[name][shard]` is the list of documents of one training shard."""
    tokenizer = TokenizerRecord(
        kind="sentencepiece",
        fingerprint="0" * 64,
        vocab_size=1000,
        bos_id=1,
        eos_id=2,
        adds_bos=True,
        probe=[5, 6, 7],
    )
    dtype = dtype_for(tokenizer.vocab_size)
    shards = {
        domain: [
            write_shard(root, f"{TRAIN}/{domain}/{index:05d}", documents, dtype)
            for index, documents in enumerate(groups)
        ]
        for domain, groups in domains.items()
    }
    manifest = Manifest(
        dtype=dtype,
        tokenizer=tokenizer,
        splits={TRAIN: shards, HELD_OUT: {}},
        sources=[],
        arguments={},
    )
    manifest.save(root / "manifest.json")
    return manifest


def random_documents(lengths: list[int], vocab_size: int = 1000, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, length) for length in lengths]
