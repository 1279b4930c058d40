"""Where gear keeps things, and how a file gets there whole."""

import os
from pathlib import Path

from gear.config import UserError

ROOT = Path(__file__).resolve().parent.parent


def runs_dir():
    """Return the folder of runs: $GEAR_RUNS, else runs/ beside the package's sources, else under the working directory."""
    return _home("GEAR_RUNS", "runs")


def figures_dir():
    """Return the folder of figures: $GEAR_FIGURES, else figures/ beside the package's sources."""
    return _home("GEAR_FIGURES", "figures")


def _home(variable, folder):
    if os.environ.get(variable):
        return Path(os.environ[variable]).expanduser().resolve()
    return (ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()) / folder


def cache_dir():
    """Return the folder of what can be downloaded or computed again: $GEAR_CACHE, else ~/.cache/gear."""
    return Path(os.environ.get("GEAR_CACHE") or "~/.cache/gear").expanduser()


def check_writable(folder, variable):
    """Raise UserError unless `folder` can be written to, or made; `variable` is the one that moves it, if any."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "cannot be written to" if there.is_dir() else "is a file, not a folder"
        remedy = f"Set ${variable} to a folder of your own" if variable else "Name another place"
        raise UserError(f"nothing can be kept in {folder}: {there} {why}. {remedy}.")


def write_atomically(path, write):
    """Call `write(temporary)` and rename the result to `path`: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path):
    """Force what was written to `path`, a file or a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
