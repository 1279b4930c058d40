"""The commands of gear, and what the help of one command says beside its options."""

from collections.abc import Callable
from dataclasses import dataclass

# The sentences stand here, not in the commands' modules: `gear --help` imports none of them.
GROUPS = {
    "Train": {
        "train": "Train runs by recipe name, after missing parents; the same command resumes.",
        "sweep": "Train and score one ablation study, and compare it with the paper's table.",
    },
    "Use a run or a checkpoint file": {
        "sample": "Draw images from a generator into one PNG.",
        "reconstruct": "Draw images above their reconstructions, and measure the error.",
        "evaluate": "Score samples or reconstructions, and keep every number with its protocol.",
        "inspect": "Print layout, sizes, number of parameters and training step.",
        "export": "Write networks to a .safetensors file, or to a .pt file in a public layout.",
    },
    "Look at results": {
        "runs": "List the runs with their stage and step.",
        "figures": "Execute notebooks, and write their figures and the gallery of all figures.",
        "claims": "Judge the paper's claims on the runs of one preset.",
    },
    "Data, packages and this machine": {
        "data": "Describe a source of images: classes, counts, sizes, and unusable files.",
        "pack": "Write finished runs without their weights into a folder of a few files.",
        "package": "Put a trained scenes teacher or detector into the package.",
        "doctor": "Check what works on this machine: GPU, packages, weights and folders.",
        "completion": "Print a script that completes commands, names and options in a shell.",
    },
}
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}


@dataclass(frozen=True)
class Usage:
    """What the help and the shell completion of one command need to know."""

    names: str  # the words before the options, as the usage line shows them; "": none
    examples: tuple[str, ...]
    # maps the names on the command line to the options with their defaults, a dataclass
    options: Callable | None = None
    details: str = ""  # paragraphs that follow the command's sentence, one per line
    title: str = "Options"  # of the first group of options
    choices: tuple[str, ...] = ()  # names that the shell completes
    takes_runs: bool = False  # whether the shell completes the names of the user's runs


def overview():
    """Return the text of `gear --help`."""
    lines = [
        "usage: gear COMMAND [NAME ...] [--OPTION VALUE ...]",
        "",
        "Train an image tokenizer and an autoregressive generator together, and measure both.",
    ]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:12} {sentence}" for name, sentence in commands.items()]
    lines += [
        "",
        "gear COMMAND --help  describes one command, with its options and examples.",
        "gear train --help    lists the recipes.",
        "gear --version       prints the version.",
        "",
        "README.md explains the method and every command, docs/gpu.md the use of a GPU.",
    ]
    return "\n".join(lines)
