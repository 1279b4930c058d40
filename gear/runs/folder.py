"""Where runs are written: the folder of all runs and the folder of one run."""

import os
from pathlib import Path

from gear.config import UserError
from gear.files import home, is_utf8
from gear.runs.names import NAME_BYTES, REFERENCE


def runs_dir():
    """Return the folder of runs: $GEAR_RUNS, else runs/ beside the package's sources, else under
    the working directory.
    """
    return home("GEAR_RUNS", "runs")


def run_path(name):
    """Return the folder of the run `name`.

    Raises UserError for a path, for text that cannot be a folder's name in UTF-8, and for the name
    of the folder of records.
    """
    name = str(name)
    if name == REFERENCE:
        raise UserError(
            f"'{name}' is no name of a run: the folder of that name holds the records of runs "
            "without weights. Choose another name."
        )
    is_path = name in ("", "..") or name != Path(name).name
    if is_path or len(os.fsencode(name)) > NAME_BYTES or not is_utf8(name):
        kind = "a path" if name in (".", "..") or "/" in name else "no name of a folder, in UTF-8"
        raise UserError(
            f"'{name}' is {kind}; a run is opened by name: the name of its folder in {runs_dir()} "
            "($GEAR_RUNS)."
        )
    return runs_dir() / name
