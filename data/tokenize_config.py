"""Options of data.tokenize."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from data.errors import InputError, require_at_least
from data.options import ON_DISK
from data.sources import AUTO, MAX_RECORD_MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeConfig:
    """Turns text, or conversations, into token shards per domain.

    An output that exists is reused if it was made from the same files (by path and size) with the
    same arguments. An interrupted run continues where it stopped, once it has checked what is
    there. The result does not depend on the number of workers.
    """

    ESSENTIAL: ClassVar = (
        "input tokenizer output seq-len workers domain-field conversations chat-template"
    )

    input: Annotated[tuple[str, ...], ON_DISK]
    """Files, folders or quoted globs ('**' crosses folders): .jsonl .parquet .txt, or any other
    text suffix the glob ends with; .zst .gz .bz2 .xz .lz4 are decompressed."""
    tokenizer: Annotated[str, ON_DISK]
    """A sentencepiece .model file, a .gguf file, a folder with tokenizer.json or tokenizer.model, a
    run's output folder, or a name on the Hugging Face hub."""
    output: Annotated[str, ON_DISK] = "runs/tokens"
    """Folder for the shards and manifest.json."""
    seq_len: int = 4096
    """Sample length for the counts in the closing report; the shards fit any length. With
    --conversations the length of samples that they are packed into, and trained in."""
    workers: int | None = None
    """Worker processes; default one per core."""
    domain_field: str = AUTO
    """Where a document's domain is: a dotted field of its record; "folder", the name of the file's
    folder; or "auto", meta.redpajama_set_name for records and the folder for plain text and
    conversations."""
    conversations: bool = False
    """Records are conversations as ShareGPT (conversations), OpenAI (messages) or Alpaca
    (instruction, input, output) keep them: training counts the assistant's turns alone."""
    chat_template: Annotated[str | None, ON_DISK] = None
    """How conversations are written: vicuna, chatml, llama3, or a file with a template in Jinja.
    Default: the tokenizer's own."""
    text_field: str = "text"
    """Dotted field of a record that holds its text."""
    skip_incomplete: bool = False
    """Leave out, and count, records whose text or domain is absent or null, and conversations that
    cannot be trained on."""
    merge_domains: bool = False
    """Take names that become one domain, such as "Common Crawl" and "common-crawl", as one; without
    it they are an error."""
    max_record_mib: int = MAX_RECORD_MIB
    """Length, in MiB, above which a record or plain text file is refused. Tokenizing takes some
    hundred times as much memory."""
    domains: tuple[str, ...] = ()
    """Domains to expect; any other is an error. Default: whatever the input holds."""
    held_out: float = 0.01
    """Fraction of documents set apart for evaluation, chosen by a hash of the text."""
    max_bytes_per_domain: int | None = None
    """Stop each domain at the first document that brings it to this many bytes. Uses one process.
    All of the input is read, in case a domain comes late, unless --domains names all of them."""
    task_mib: int = 512
    """Input, in MiB, behind one shard per domain: the unit of work that a worker takes."""
    overwrite: bool = False
    """Replace an output made with other arguments, or one whose bytes are not what was written: of
    one made with the same, all is read."""
    verify: bool = False
    """Read all of an output that is there already and check it against its checksums, instead of
    the sizes of its files alone."""

    def __post_init__(self) -> None:
        if not self.input:
            raise InputError("--input names no files; give at least one file, folder or glob")
        if not 0 <= self.held_out < 1:
            raise InputError(f"--held-out {self.held_out} is a fraction: use 0 up to, not with, 1")
        require_at_least(self, 1, "workers", "seq_len", "task_mib", "max_bytes_per_domain")
        require_at_least(self, 1, "max_record_mib")
        if self.conversations:
            require_at_least(self, 2, "seq_len", why=" (a token and its successor)")

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        found: dict[str, str] = {}
        if self.max_bytes_per_domain is not None and self.workers not in (None, 1):
            found["workers"] = "--max-bytes-per-domain takes one process"
        if self.conversations:
            found["text_field"] = "--conversations takes the fields of conversations"
        else:
            found["chat_template"] = "only --conversations are written by one"
        return found
