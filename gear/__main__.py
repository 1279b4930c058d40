"""The command line: gear COMMAND ...; the command NAME is the function `command` of
gear/cli/NAME.py.
"""

import importlib
import sys

from gear.cli.console import console
from gear.config import UserError, __version__, nearest

# A command's module is imported when it is called: torch alone takes a second. Sub-commands of
# tyro's would import tyro and the options of every command, and with them torch, for any of them.
COMMANDS = {
    "train": "Train runs by recipe name; missing parents come first. The same command resumes.",
    "sweep": (
        "Run one of the paper's ablations: train and score what is missing, and say whether it "
        "goes as the paper's does."
    ),
    "sample": "Draw samples of a generator, a run's or a file's, into a PNG.",
    "reconstruct": (
        "Write a sheet of images above their reconstructions, and what was lost, of a run or a "
        "checkpoint file."
    ),
    "inspect": (
        "Say what a checkpoint file or a run holds: layout, sizes, parameters of each part, "
        "training step."
    ),
    "export": (
        "Write a run's or a file's networks to OUT: .safetensors with a card, or .pt in the public "
        "layout they have."
    ),
    "data": (
        "Say what a source of images holds: classes with their numbers, counts, sizes, modes, and "
        "what is left out."
    ),
    "evaluate": (
        "Score runs: sample, compare with a reference, reconstruct; metrics.json keeps every "
        "number with its protocol."
    ),
    "figures": (
        "Execute the notebooks, or those named, and write their figures and the page of all; skip "
        "what is up to date."
    ),
    "claims": (
        "Judge the paper's claims on the runs of a preset (default: scenes); writes "
        "data/claims.csv beside the figures."
    ),
    "runs": "List the runs: name, stage, step, and whether they are finished.",
    "pack": (
        "Write finished runs into FOLDER as records without weights, many in a few files (make "
        "reference)."
    ),
    "teacher": "Package a run of the recipe teacher-scenes as the scenes teacher (make teacher).",
}


def main(arguments=None):
    """Run one command; a user's mistake prints one message and exits with code 2, a stopped run
    with code 1.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("\n".join(f"gear {name:8} {sentence}" for name, sentence in COMMANDS.items()))
        return
    if arguments == ["--version"]:
        print(f"gear {__version__}")
        return
    name, rest = arguments[0], arguments[1:]
    first = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    # names follow it, which may begin with a dash
    last = rest.index("--") if "--" in rest else len(rest)
    with console():
        if name not in COMMANDS:
            raise UserError(
                f"unknown command '{name}'.{nearest(name, COMMANDS)} Known: {', '.join(COMMANDS)}."
            )
        module = importlib.import_module(f"gear.cli.{name}")
        module.command(rest[:first] + rest[last + 1 :], rest[first:last])


if __name__ == "__main__":
    main()
