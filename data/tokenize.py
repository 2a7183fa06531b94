"""`python -m data.tokenize`: text files to checksummed token shards per domain, with a manifest."""

import sys
from pathlib import Path

if not __package__:  # started as a file: the library looks for a module of its own of this name
    _HERE = Path(__file__).resolve().parent
    sys.path[:] = [str(_HERE.parent), *(entry for entry in sys.path if Path(entry) != _HERE)]

from data.chat import open_chat
from data.cli import parse, run
from data.domain_names import chosen_domains
from data.errors import naming
from data.find import find_files
from data.job import Job
from data.machine import available_cores
from data.sources import Fields, warn_of_folders_with_one_name
from data.tasks import Settings
from data.token_report import print_report
from data.tokenize_config import TokenizeConfig
from data.tokenizers import load_tokenizer

EXAMPLES = """
python -m data.tokenize --input 'SlimPajama-627B/train/**/*.jsonl.zst' \\
    --tokenizer meta-llama/Llama-2-7b-hf --output runs/tokens --workers 32
python -m data.tokenize --input 'notes/**/*.md' 'src/**/*.py' \\
    --domain-field folder --tokenizer tokenizer.model
python -m data.tokenize --input pile.jsonl.zst --tokenizer models/small \\
    --domain-field meta.pile_set_name --domains Pile-CC Github \\
    --max-bytes-per-domain 10000000
python -m data.tokenize --input sharegpt.jsonl --conversations --chat-template vicuna \\
    --tokenizer runs/cpt --output runs/chat --seq-len 2048
"""


def main(argv: list[str] | None = None) -> None:
    """Runs the command with `argv` (default: the process's arguments)."""
    config = parse(TokenizeConfig, section="tokenize", argv=argv, examples=EXAMPLES)
    domains = chosen_domains(config.domains)
    output = Path(config.output)
    files = find_files(config.input, output)
    with naming("--tokenizer"):
        tokenizer = load_tokenizer(config.tokenizer)
    chat = None
    if config.conversations:
        chat = open_chat(config.chat_template, tokenizer, config.tokenizer, config.seq_len)
    fields = Fields(
        text=config.text_field,
        domain=config.domain_field,
        conversations=config.conversations,
        skip_incomplete=config.skip_incomplete,
        max_bytes=config.max_record_mib << 20,
    )
    warn_of_folders_with_one_name(files, fields)
    settings = Settings(
        fields=fields,
        domains=domains,
        held_out=config.held_out,
        max_bytes_per_domain=config.max_bytes_per_domain,
        bytes_per_task=config.task_mib << 20,
        merge_domains=config.merge_domains,
        chat=chat,
    )
    job = Job(files, settings, tokenizer, output, config.overwrite)
    manifest, worked = job.run(config.workers or available_cores(), config.verify)
    print_report(manifest, output, config.seq_len, worked)


if __name__ == "__main__":
    run(main, alone=True)
