"""Where gear keeps things, how a file gets there whole, and how it is checked when it is read."""

import codecs
import functools
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from gear.config import UserError

ROOT = Path(__file__).resolve().parent.parent
MARKS = (  # byte order marks; one of UTF-32 begins as one of UTF-16 does
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def figures_dir():
    """Return the folder of figures: $GEAR_FIGURES, else figures/ beside the package's sources."""
    return home("GEAR_FIGURES", "figures")


def home(variable, folder):
    """Return the folder that an environment variable names, else `folder` beside the sources."""
    if os.environ.get(variable):
        return Path(os.environ[variable]).expanduser().resolve()
    return (ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()) / folder


def cache_dir():
    """Return the folder of what can be downloaded or computed again: $GEAR_CACHE, else
    ~/.cache/gear.
    """
    return Path(os.environ.get("GEAR_CACHE") or "~/.cache/gear").expanduser()


def is_utf8(path):
    """Tell whether a path's bytes are UTF-8, which some libraries ask for."""
    return os.fsencode(path) == str(path).encode(errors="replace")


@functools.cache
def say_once(line):
    """Print a line on stderr, the first time it is said; a path in it may hold bytes that no
    encoding has.
    """
    print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)


def child_environment():
    """Return the environment of a Python process that imports this gear, and nothing that lies in
    the working directory.
    """
    checkout = [str(ROOT)] if (ROOT / "pyproject.toml").exists() else []
    path = os.pathsep.join([*checkout, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def check_writable(folder, variable):
    """Raise UserError unless `folder` can be written to, or made; `variable` is the one that moves
    it, if any.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "cannot be written to" if there.is_dir() else "is a file, not a folder"
        why = why if there.exists() else "is a link that leads nowhere"
        remedy = f"Set ${variable} to a folder of your own" if variable else "Name another place"
        raise UserError(f"nothing can be kept in {folder}: {there} {why}. {remedy}.")


def check_target(path, suffix=""):
    """Return `path`, ~ expanded, if a file can be written to it; raises UserError if not, or if it
    does not end in `suffix`.
    """
    path = Path(path).expanduser()
    if path.is_dir() or path.suffix.lower() != (suffix or path.suffix.lower()):
        what = "is a folder" if path.is_dir() else f"does not end in {suffix}"
        raise UserError(f"{path} {what}: name a file to write.")
    check_writable(path.absolute().parent, None)
    return path


def write_atomically(path, write):
    """Call `write(temporary)` and rename the result to `path`: a reader sees the old file or the
    new one, never half.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder_atomically(folder, fill):
    """Call `fill(temporary)` on an empty folder, and rename it to `folder`: complete or absent.

    Its files are flushed before. A folder that is there already stays as it is.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        for path in [*temporary.iterdir(), temporary]:
            flush(path)
        if not folder.exists():
            os.replace(temporary, folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path):
    """Force what was written to `path`, a file or a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# -- text ------------------------------------------------------------------------------------------


def read_text(path):
    """Return a text file's content: UTF-8, or UTF-16 or UTF-32 with a byte order mark; every line
    ends in "\\n".

    Raises UserError for a file that cannot be read, for one that is no text, and for another
    encoding, which is not guessed: the same bytes are other letters in Windows-1252 and in
    Windows-1251.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): a text file is expected."
        ) from None
    mark, encoding = next((pair for pair in MARKS if content.startswith(pair[0])), (b"", "utf-8"))
    if b"\0" in content and not mark:
        raise UserError(
            f"{path} is not a text file: it holds zero bytes. UTF-16 has to begin with a byte "
            "order mark."
        )
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        where = (
            f"byte 0x{error.object[error.start]:02x} in line "
            f"{error.object[: error.start].count(10) + 1}"
        )
        raise UserError(
            f"{path} is not in {encoding.upper()}: {where}. Save it as UTF-8; if it is in "
            "Windows-1252 or Latin-1, "
            f"iconv -f WINDOWS-1252 -t UTF-8 {path.name} does that."
        ) from None
    if "\0" in text:
        raise UserError(f"{path} is not a text file: it holds zero characters.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path):
    """Return the lines of a text file, without blank ones at its end; see `read_text`.

    A line ends where an editor ends it: not at U+2028 and the other characters at which
    str.splitlines does, too.
    """
    text = read_text(path).rstrip()
    return text.split("\n") if text else []


def read_json(path, **options):
    """Return what a JSON file holds, in any encoding of `read_text`; raises ValueError for what is
    none.
    """
    try:
        text = read_text(path)
    except UserError as error:
        raise ValueError(f"{error}".rstrip(".")) from None
    return parse_json(text, **options)


def parse_json(text, **options):
    """Return the value of a JSON text; raises ValueError, also for nesting too deep and for halves
    of characters.
    """
    try:
        values = json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text.lower():  # half a character, alone, can be neither printed nor written
        json.dumps(values, ensure_ascii=False).encode()
    return values


def kept_json(path):
    """Return what a JSON file holds, or None where it is absent or damaged: for what can be made
    again.
    """
    try:
        return read_json(path)
    except ValueError:
        return None


# -- arrays ----------------------------------------------------------------------------------------


def write_array(path, array):
    """Write an array as .npy with the SHA-256 of the file's bytes behind it, which np.load passes
    over; see `read_array`.
    """

    def write(temporary):
        with open(temporary, "w+b") as file:
            np.save(file, array)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").digest()
            file.seek(0, os.SEEK_END)
            file.write(digest)

    write_atomically(path, write)


def read_array(path, mapped=False):
    """Return an array that `write_array` wrote, or None where it is absent, cut short or changed,
    by one bit or more.
    """
    try:
        content = np.memmap(path, np.uint8, "r")
        digest = hashlib.sha256(content[:-32]).digest()
        return (
            np.load(path, mmap_mode="r" if mapped else None)
            if digest == content[-32:].tobytes()
            else None
        )
    except (OSError, ValueError, EOFError):  # absent, empty
        return None
