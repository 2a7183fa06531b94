"""What a token folder holds, as a table."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from data.chat_templates import OWN
from data.log import logger
from data.manifest import HELD_OUT, TRAIN, Manifest, left_out
from data.tables import print_table

NAMED = 20
"""How many files or domains a message names."""


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
    text = manifest.chat is None
    documents = "documents" if text else "conversations"
    for title in (documents, "tokens", "bytes/token", f"samples of {seq_len}", "held-out tokens"):
        table.add_column(title, justify="right")
    train, held_out = manifest.tokens(TRAIN), manifest.tokens(HELD_OUT)
    for domain in sorted(train.keys() | held_out.keys()):
        shards = [shard for split in manifest.splits.values() for shard in split.get(domain, [])]
        tokens = sum(shard.tokens for shard in shards)
        table.add_row(
            domain,
            f"{sum(shard.documents for shard in shards):,}",
            f"{tokens:,}",
            # Of conversations, tokens are of what a template wrote, and some are padding.
            f"{sum(shard.text_bytes for shard in shards) / tokens:.2f}" if text else "-",
            f"{train.get(domain, 0) // seq_len:,}",
            f"{held_out.get(domain, 0):,}",
        )
    print_table(table)
    if manifest.chat is not None:
        print(_conversations(manifest))
    for warning in _warnings(manifest, seq_len):
        logger.warning(warning)
    state = "tokens in" if worked else "already tokenized with these arguments, nothing to do:"
    print(f"{state} {output}")


def _conversations(manifest: Manifest) -> str:
    """What conversations became, in words."""
    counts, chat = manifest.counts, manifest.chat
    assert chat is not None
    tokens = max(1, sum(sum(manifest.tokens(split).values()) for split in (TRAIN, HELD_OUT)))
    told = [
        f"{counts.get('conversations', 0):,} conversations in the chat template of "
        f"{'the tokenizer' if chat.template_name == OWN else chat.template_name}: "
        f"{counts.get('answers', 0):,} answers with {counts.get('counting', 0) / tokens:.1%} of all"
        f" tokens, whose loss counts; {counts.get('padding', 0) / tokens:.1%} are padding"
    ]
    if counts.get("cut"):
        answers = counts.get("cut answers", 0)
        told.append(
            f"{counts['cut']:,} lack their last answers ({answers:,}), for which samples of "
            f"{chat.seq_len:,} have no room"
        )
    if counts.get("unanswered"):
        told.append(f"{counts['unanswered']:,} end with a user's turn, which is left out")
    return "; ".join(told)


def _warnings(manifest: Manifest, seq_len: int) -> Iterator[str]:
    """What of the input is not in the tokens, and which domains cannot serve."""
    incomplete = [source for source in manifest.sources if source.incomplete]
    if manifest.examples:
        yield f"left out records: {'; '.join(left_out(manifest.counts, manifest.examples))}"
    elif incomplete:
        yield (
            "left out records without text or domain: "
            f"{sum(source.incomplete for source in incomplete):,}, in "
            f"{_some([source.path for source in incomplete])}"
        )
    # Where a limit applies, files behind it are not even opened.
    if not manifest.arguments.get("max_bytes_per_domain"):
        empty = [source.path for source in manifest.sources if not source.documents]
        if empty:
            yield f"{len(empty)} of {len(manifest.sources)} files hold no text: {_some(empty)}"
    train, held_out = manifest.tokens(TRAIN), manifest.tokens(HELD_OUT)
    absent = [
        name
        for name in manifest.arguments.get("domains", [])
        if name not in train and name not in held_out
    ]
    if absent:
        yield f"no documents in {_some(absent)}, which --domains names"
    yield from _held_out_warnings(manifest)
    only = [domain for domain in held_out if domain not in train]
    if only:
        yield f"only held-out documents in {_some(only)}; training leaves these domains out"
    short = [domain for domain, tokens in train.items() if tokens < seq_len]
    if short:
        yield f"less than one sample of {seq_len:,} training tokens in {_some(short)}"


def _held_out_warnings(manifest: Manifest) -> Iterator[str]:
    documents = {
        domain: sum(shard.documents for shard in shards)
        for domain, shards in manifest.splits.get(TRAIN, {}).items()
        if domain not in manifest.splits.get(HELD_OUT, {})
    }
    if not documents:
        return
    fraction = manifest.arguments.get("held_out", 0)
    counts = _some(list(documents))
    fix = "raise --held-out"
    if fraction:
        counts = _some([f"{domain} ({count:,})" for domain, count in documents.items()])
        fewest = min(documents.values())
        larger = min(0.5, 3 / fewest)
        fix = f"--held-out {fraction:g} takes one document in {1 / fraction:,.0f} or so: "
        fix += f"use --held-out {larger:.2g}, or " if larger > fraction else ""
        fix += "split long files into several documents"
    yield f"no held-out documents in {counts}; evaluation leaves these domains out ({fix})"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
