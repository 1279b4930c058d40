"""Options on the command line: parsed, and described by --help."""

import contextlib
import io
import shutil
import textwrap
from dataclasses import dataclass

import tyro

MARKERS = (tyro.conf.OmitArgPrefixes,)  # --tau, not --config.objective.tau


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
    width = min(100, shutil.get_terminal_size().columns)
    paragraphs = [sentence, *usage.details.split("\n")]
    options = usage.options(names) if usage.options else NoOptions()
    lines = [" ".join(filter(None, ["usage: gear", command, usage.names, "[OPTIONS]"])), ""]
    for paragraph in filter(None, paragraphs):
        lines += [*textwrap.wrap(paragraph, width, break_on_hyphens=False), ""]
    lines += ["Examples:", *(f"  {example}" for example in usage.examples), ""]
    return "\n".join(lines) + "\n" + _describe(options)


def _describe(options):
    """Return tyro's description of options, without its usage line and without boxes."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        tyro.cli(type(options), default=options, args=["--help"], description="", config=MARKERS)
    described = output.getvalue().partition("\n\n")[2]  # a blank line ends the usage
    return "\n".join(line.rstrip() for line in described.rstrip().split("\n"))
