"""Which runs there are: their names and folders, and what tells a run from another folder."""

import fnmatch
import os
from pathlib import Path

from gear.config import UserError
from gear.files import is_utf8, runs_dir, say_once
from gear.runs.records import read_config

NAME_BYTES = 255  # of a folder's name, at most


def run_path(name):
    """Return the folder of the run `name`; raises UserError for a path, and for what cannot be a folder's name in UTF-8."""
    name = str(name)
    if name in ("", "..") or name != Path(name).name or len(os.fsencode(name)) > NAME_BYTES or not is_utf8(name):
        what = "a path" if name in (".", "..") or "/" in name else "no name of a folder, in UTF-8"
        raise UserError(f"'{name}' is {what}; a run is opened by name, that of its folder in {runs_dir()} ($GEAR_RUNS).")
    return runs_dir() / name


def run_names(pattern="*"):
    """Return the names of the runs that match the shell `pattern`, sorted; of one of exactly that name, that alone.

    A folder whose files are not those of a run is left out, and named once on stderr.
    """
    names = sorted(path.parent.name for path in runs_dir().glob("*/config.json"))
    if pattern in names:
        return [pattern]
    return [name for name in names if fnmatch.fnmatchcase(name, pattern) and _is_run(runs_dir() / name)]


def _is_run(folder):
    try:
        read_config(folder / "config.json")
        reason = "metrics.jsonl: it is a folder" if (folder / "metrics.jsonl").is_dir() else ""
    except ValueError as error:
        reason = f"config.json: {error}"
    reason = reason if is_utf8(folder.name) else "its name is no UTF-8, which tables hold alone"
    if reason:
        say_once(f"{folder}: not a run of gear ({reason}); left out")
    return not reason


def readable(read, otherwise):
    """Return `read()`, or say why it cannot be read and return `otherwise`: one damaged run hides no other."""
    try:
        return read()
    except UserError as error:
        say_once(f"left out: {error}")
        return otherwise
