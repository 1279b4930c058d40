"""The list of existing runs, and the test that tells a run from any other folder."""

import fnmatch

from gear.config import UserError
from gear.files import is_utf8, say_once
from gear.runs.folder import runs_dir
from gear.runs.names import REFERENCE
from gear.runs.records import read_config
from gear.runs.reference import reference


def run_names(pattern="*"):
    """Return the names of runs and records that match the shell `pattern`, sorted.

    If a run of the name `pattern` exists, it alone is returned, whatever else the pattern matches.
    A folder whose files are not those of a run is left out and reported once on stderr.
    """
    folders = {path.parent.name for path in runs_dir().glob("*/config.json")} - {REFERENCE}
    names = folders | set(reference().names)
    if pattern in names:
        return [pattern]
    matching = (name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern))
    return [name for name in matching if name not in folders or _is_run(runs_dir() / name)]


def _is_run(folder):
    try:
        read_config(folder / "config.json")
        reason = "metrics.jsonl: it is a folder" if (folder / "metrics.jsonl").is_dir() else ""
    except ValueError as error:
        reason = f"config.json: {error}"
    reason = reason if is_utf8(folder.name) else "its name is no UTF-8, as tables require"
    if reason:
        say_once(f"{folder}: not a run of gear ({reason}); left out")
    return not reason


def readable(read, otherwise):
    """Return `read()`; if that raises UserError, print the error and return `otherwise`.

    A listing of many runs thus survives a damaged one.
    """
    try:
        return read()
    except UserError as error:
        say_once(f"left out: {error}")
        return otherwise
