"""Options on the command line: parsed, and described by --help."""

import contextlib
import io
import os
import re
import shutil
import textwrap
from dataclasses import dataclass

import tyro

MARKERS = (tyro.conf.OmitArgPrefixes,)  # --tau, not --config.objective.tau
WIDTH = 100  # columns of a help text, at most


@dataclass(frozen=True)
class NoOptions:
    """The options of a command that has none."""


def parse(default, arguments, command=""):
    """Return `default`, a dataclass, with the fields changed that `arguments` name.

    `command` is named in tyro's messages. Ends the process with such a message and exit code 2 for
    an unknown option or a value of the wrong type. Raises UserError for a value out of its range.
    """
    program = f"gear {command}".strip()
    return tyro.cli(type(default), default=default, args=arguments, prog=program, config=MARKERS)


def help_text(command, sentence, usage, names=()):
    """Return the text of `gear COMMAND --help`; the defaults of options are those for `names`."""
    width = min(WIDTH, shutil.get_terminal_size().columns)
    lines = [" ".join(filter(None, ["usage: gear", command, usage.names, "[OPTIONS]"])), ""]
    for paragraph in filter(None, [sentence, *usage.details.split("\n")]):
        lines += [*textwrap.wrap(paragraph, width, break_on_hyphens=False), ""]
    lines += ["Examples:", *(f"  {example}" for example in usage.examples), ""]
    options = usage.options(names) if usage.options else NoOptions()
    return "\n".join(lines) + "\n" + _describe(options, usage.title, width)


def _describe(options, title, width):
    """Return what tyro says of options, in groups under plain titles; `title` is the first."""
    output = io.StringIO()  # no terminal, so that tyro draws neither boxes nor colours
    with _columns(width), contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        tyro.cli(type(options), default=options, args=["--help"], description="", config=MARKERS)
    described = output.getvalue().partition("\n\n")[2]  # a blank line ends the usage
    lines = [line.rstrip() for line in described.rstrip().split("\n")]
    described = "\n".join(lines)
    described = re.sub(r"(?m)^  -{9,}$", "", described)  # below the description of a group
    return re.sub(
        r"(?m)^ (?:(\S.*) )?options\n -+$",
        lambda group: f"{group[1].replace('.', ', ').capitalize() if group[1] else title}:",
        described,
    )


@contextlib.contextmanager
def _columns(width):
    """Let tyro find a terminal that is `width` columns wide: in a wide one it sets groups side by
    side.
    """
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
