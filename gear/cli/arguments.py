"""The words that follow a command and its names, read as its options."""

import tyro


def parse(default, arguments):
    """Return `default`, a dataclass, with the fields that `arguments` name changed.

    Ends the process with tyro's message, exit code 2, for an unknown option or a value of another
    type. Raises UserError for a value out of its range.
    """
    return tyro.cli(
        type(default), default=default, args=arguments, config=(tyro.conf.OmitArgPrefixes,)
    )
