"""The command line, gear COMMAND ...: the command NAME is the function `command` of
gear/cli/NAME.py.
"""

import importlib
import sys

from gear.cli.console import console
from gear.cli.usage import COMMANDS, overview
from gear.config import UserError, __version__, nearest

HELP = {"-h", "--help"}


def main(arguments=None):
    """Run one command; a user's mistake prints one message and exits with code 2, a stopped run
    with code 1.

    The module of a command is imported when the command is called: importing torch alone takes a
    second. With tyro's sub-commands every call would import tyro and the options of all commands.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["help"]:  # gear help train
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in HELP:
        print(overview())
        return
    if arguments == ["--version"]:
        print(f"gear {__version__}")
        return
    name, words = arguments[0], arguments[1:]
    first_option = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    # the names after "--" may begin with a dash
    separator = words.index("--") if "--" in words else len(words)
    names, options = words[:first_option] + words[separator + 1 :], words[first_option:separator]
    with console():
        if name not in COMMANDS:
            raise UserError(
                f"unknown command '{name}'.{nearest(name, COMMANDS)} Known: {', '.join(COMMANDS)}."
            )
        module = importlib.import_module(f"gear.cli.{name}")
        if not HELP & set(options):
            return module.command(names, options)
        help_text = importlib.import_module("gear.cli.arguments").help_text
        print(help_text(name, COMMANDS[name], module.USAGE, names))
    sys.exit(0)  # as argparse and tyro end after --help


if __name__ == "__main__":
    main()
