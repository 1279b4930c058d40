"""Which runs there are: their names and folders, and what tells a run from another folder."""

import fnmatch
import functools
import json
import os
import sys
from pathlib import Path

from gear.config import UserError
from gear.home import is_utf8, runs_dir

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


def configuration(folder):
    """Return the configuration in a run's folder; raises ValueError or OSError saying why there is none."""
    config = json.loads((folder / "config.json").read_text())
    if not (isinstance(config, dict) and isinstance(config.get("recipe"), str) and isinstance(config.get("steps"), int)):
        raise ValueError("it is not the configuration of a run, which has a recipe and steps")
    return config


def _is_run(folder):
    try:
        configuration(folder)
        reason = "metrics.jsonl: it is a folder" if (folder / "metrics.jsonl").is_dir() else ""
    except (OSError, RecursionError, ValueError) as error:
        reason = f"config.json: {getattr(error, 'strerror', None) or error}"
    reason = reason if is_utf8(folder.name) else "its name is no UTF-8, which tables hold alone"
    if reason:
        _say(f"{folder}: not a run of gear ({reason}); left out")
    return not reason


@functools.cache
def _say(line):
    """Print a line on stderr, the first time it is said."""
    print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)  # a path may hold bytes that no encoding has


def read_lines(path):
    """Read JSON lines; a last line cut short by a kill is left out. Raises UserError for what is no file."""
    try:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it.") from None
    records = []
    for line in lines:
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"])})
        except (KeyError, OverflowError, TypeError, ValueError):
            break
    return records
