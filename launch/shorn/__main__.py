"""`shorn COMMAND ...`: all commands under one name, on one or several ranks."""

import difflib
import importlib
import sys

from data import cli
from data.errors import InputError
from data.machine import stand_alone
from data.plain_parser import Parser, refuse_unknown
from launch.shorn.commands import COMMANDS
from launch.shorn.completion import OWN_FLAGS, SHELLS, completion
from launch.shorn.overview import overview, version


def main(argv: list[str] | None = None) -> None:
    """Runs the command that `argv` (default: the process's arguments) begins with."""
    words = list(sys.argv[1:] if argv is None else argv)
    cli.run(lambda: start(words))


def start(words: list[str]) -> None:
    """Does what `words` ask for. Raises InputError where that is unclear, SystemExit with the
    status of ranks."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", "--help-all", action="store_true", dest="help")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--completion", choices=SHELLS)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("command", nargs="?")
    parser.add_argument("rest", nargs="...")
    given, unknown = parser.parse_known_args(words)
    refuse_unknown(unknown, OWN_FLAGS)
    if given.version:
        cli.show(f"shorn {version()}")
    elif given.completion:
        cli.show(completion(given.completion))
    elif given.help or given.command is None:
        cli.show(overview())
    else:
        run_command(given.command, given.rest, given.ranks)


def run_command(name: str, words: list[str], ranks: int) -> None:
    """Runs the command `name` with the arguments `words`, on several `ranks` where it can."""
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `shorn {near[0]}`?" if near else f"known: {', '.join(COMMANDS)}"
        raise InputError(f"unknown command {name!r}; {hint}")
    if name != "demo":  # whose own option is called --ranks
        parser = Parser(add_help=False, allow_abbrev=False)
        parser.add_argument("--ranks", type=int, default=ranks)
        given, words = parser.parse_known_args(words)
        ranks = given.ranks
    if ranks < 1:
        raise InputError(f"--ranks {ranks}: must be at least 1")
    if ranks > 1 and not command.on_ranks:
        able = ", ".join(name for name, command in COMMANDS.items() if command.on_ranks)
        raise InputError(
            f"shorn {name} runs as one process: leave out --ranks {ranks} ({able} take it)"
        )
    if ranks > 1 and set(cli.HELP_FLAGS).isdisjoint(words):
        from launch.shorn.ranks import start_ranks

        sys.exit(start_ranks(ranks, [name, *words]))
    if not command.on_ranks:
        stand_alone()
    sys.argv = [f"shorn {name}{' [--ranks N]' if command.on_ranks else ''}", *words]
    importlib.import_module(command.module).main()


if __name__ == "__main__":
    main()
