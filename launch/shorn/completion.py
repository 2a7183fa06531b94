"""Shell scripts that complete `shorn`'s commands and their flags."""

from data.cli import all_options
from launch.shorn.commands import COMMANDS

SHELLS = ("bash", "zsh", "fish")
OWN_FLAGS = ("--ranks", "--version", "--completion", "--help", "--help-all")

BASH = """_shorn() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" flags="{own}" name
    for name in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$name" in
{cases}
            *) continue ;;
        esac
        break
    done
    COMPREPLY=()
    if [[ "$word" == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$word"))
    elif [[ "$flags" == "{own}" ]]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    fi
}}
complete -o default -F _shorn shorn"""


def completion(shell: str) -> str:
    """The script for `shell`, one of SHELLS, which evaluates it."""
    if shell == "fish":
        return "\n".join(_fish())
    cases = "\n".join(
        f'            {name}) flags="{" ".join(flags_of(name))}" ;;' for name in COMMANDS
    )
    script = BASH.format(own=" ".join(OWN_FLAGS), cases=cases, commands=" ".join(COMMANDS))
    load = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"
    return load + script if shell == "zsh" else script


def flags_of(name: str) -> list[str]:
    """The flags of a command, help included."""
    command = COMMANDS[name]
    options = [option for option in all_options(command.load_config()) if not option.metavar]
    switches = [f"--no-{option.flag[2:]}" for option in options if option.type is bool]
    ranks = ["--ranks"] if command.on_ranks else []
    return [*(option.flag for option in options), *switches, *ranks, "--help", "--help-all"]


def _fish() -> list[str]:
    names = " ".join(COMMANDS)
    before = f'"not __fish_seen_subcommand_from {names}"'
    lines = [f"complete -c shorn -n {before} -l {flag[2:]}" for flag in OWN_FLAGS]
    for name, command in COMMANDS.items():
        lines.append(f"complete -c shorn -f -n {before} -a {name} -d '{command.summary}'")
        after = f'"__fish_seen_subcommand_from {name}"'
        lines += [f"complete -c shorn -n {after} -l {flag[2:]}" for flag in flags_of(name)]
    return lines
