"""gear completion: print a script that completes commands, names and options in a shell."""

import dataclasses
import importlib
import shlex
import typing

from gear.cli.usage import COMMANDS, Usage
from gear.config import UserError, nearest
from gear.runs.folder import runs_dir

SHELLS = ("bash", "zsh")
USAGE = Usage(
    names="SHELL",
    examples=(
        "gear completion bash > ~/.local/share/bash-completion/completions/gear",
        "gear completion zsh > ~/.gear-completion.zsh",
    ),
    details=(
        "SHELL is bash or zsh. With bash, the first example is enough where the package "
        "bash-completion is installed (make the folder first); otherwise write the script to any "
        "file, and add `source FILE` to ~/.bashrc. With zsh, add `source ~/.gear-completion.zsh` "
        "to ~/.zshrc.\n"
        "The script holds the recipes and options of this version: write it again after an update."
    ),
    choices=SHELLS,
)

# zsh runs bash's completion functions once bashcompinit is loaded, which needs compinit.
ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
autoload -Uz bashcompinit && bashcompinit
"""
SCRIPT = """\
# Completion of the command gear, printed by `gear completion SHELL`.
_gear_runs() {
    local runs="${GEAR_RUNS:-}" config
    [ -n "$runs" ] || runs=%(runs)s
    for config in "$runs"/*/config.json; do
        if [ -f "$config" ]; then config="${config%%/config.json}"; echo "${config##*/}"; fi
    done
}
_gear() {
    local word="${COMP_WORDS[COMP_CWORD]}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words=%(commands)s
    else
        case "${COMP_WORDS[1]} ${COMP_WORDS[COMP_CWORD-1]}" in
%(values)s
        *) case "${COMP_WORDS[1]} $word" in
%(names)s
        esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _gear gear  # default: file names, where no word fits
"""


def command(names, arguments):
    if len(names) != 1 or arguments or names[0] not in SHELLS:
        is_misspelt = len(names) == 1 and names[0] not in SHELLS
        suggestion = nearest(names[0], SHELLS) if is_misspelt else ""
        raise UserError(
            "name one shell: gear completion SHELL, where SHELL is bash or zsh. There are no "
            f"options.{suggestion}"
        )
    print(script(names[0]), end="")


def script(shell):
    """Return the completion script for a shell, "bash" or "zsh"."""
    values = []  # lines for the word after an option
    names = []  # lines for all other words: options if the word begins with a dash, else names
    for command in COMMANDS:
        usage = importlib.import_module(f"gear.cli.{command}").USAGE
        options = flags(type(usage.options(()))) if usage.options else {}
        choices = {flag: words for flag, words in options.items() if words}
        values += [_case(f"{command} {flag}", "", words) for flag, words in choices.items()]
        free = [shlex.quote(f"{command} {flag}") for flag, words in options.items() if words == ()]
        if free:  # no words: file names
            values.append(f"        {'|'.join(free)}) ;;")
        runs = '" $(_gear_runs)"' if usage.takes_runs else ""
        names.append(_case(f"{command} -", "*", [*options, "--help"]))
        names.append(_case(f"{command} ", "*", usage.choices, runs))
    text = SCRIPT % {
        "runs": shlex.quote(str(runs_dir())),
        "commands": shlex.quote(" ".join(COMMANDS)),
        "values": "\n".join(values),
        "names": "\n".join(names),
    }
    return (ZSH if shell == "zsh" else "") + text


def flags(cls):
    """Return {"--option": its choices} for the fields of the dataclass `cls`.

    Fields of a nested dataclass are listed without the name of that dataclass.

    The choices are () for an option with a free value, and None for one that takes no value.
    """
    options = {}
    for name, kind in typing.get_type_hints(cls).items():
        flag = f"--{name.replace('_', '-')}"
        if dataclasses.is_dataclass(kind):
            options |= flags(kind)
        elif kind is bool:
            options |= {flag: None, f"--no-{flag[2:]}": None}
        else:
            is_choice = typing.get_origin(kind) is typing.Literal
            options[flag] = typing.get_args(kind) if is_choice else ()
    return options


def _case(start, pattern, words, expression=""):
    """Return one line of a shell's `case`: the words to offer where `start` and `pattern` fit."""
    offered = shlex.quote(" ".join(words)) + expression
    return f"        {shlex.quote(start)}{pattern}) words={offered} ;;"
