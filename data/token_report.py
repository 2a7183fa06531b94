"""What a token folder holds, as a table."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.log import logger
from data.manifest import HELD_OUT, TRAIN, Manifest


def print_report(manifest: Manifest, output: Path, seq_len: int, worked: bool) -> None:
    """Prints tokens and samples per domain, and warns of domains that cannot serve.

    Args:
        manifest: of the folder `output`.
        output: named in the closing line.
        seq_len: tokens per sample.
        worked: False if the folder was there already.
    """
    table = Table()
    table.add_column("domain", no_wrap=True)
    for title in ("documents", "tokens", "bytes/token", f"samples of {seq_len}", "held-out tokens"):
        table.add_column(title, justify="right")
    train, held_out = manifest.tokens(TRAIN), manifest.tokens(HELD_OUT)
    for domain in sorted(train.keys() | held_out.keys()):
        shards = [shard for split in manifest.splits.values() for shard in split.get(domain, [])]
        tokens = sum(shard.tokens for shard in shards)
        table.add_row(
            domain,
            f"{sum(shard.documents for shard in shards):,}",
            f"{tokens:,}",
            f"{sum(shard.text_bytes for shard in shards) / tokens:.2f}",
            f"{train.get(domain, 0) // seq_len:,}",
            f"{held_out.get(domain, 0):,}",
        )
    Console().print(table)
    without = [domain for domain in train if domain not in held_out]
    if without:
        logger.warning(
            f"no held-out documents in {', '.join(without)}; evaluation leaves these domains out "
            "(raise --held-out or add documents)"
        )
    only = [domain for domain in held_out if domain not in train]
    if only:
        logger.warning(
            f"only held-out documents in {', '.join(only)}; training leaves these domains out"
        )
    short = [domain for domain, tokens in train.items() if tokens < seq_len]
    if short:
        logger.warning(f"less than one sample of {seq_len:,} training tokens in {', '.join(short)}")
    state = "tokens in" if worked else "already tokenized with these arguments, nothing to do:"
    print(f"{state} {output}")
