"""Where gear keeps its files, how they are written completely or not at all, and how they are
checked when they are read.
"""

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
BYTE_ORDER_MARKS = (  # UTF-32 before UTF-16, whose little-endian mark begins UTF-32's
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
    """Return the folder that the environment `variable` names, else `folder` beside the sources.

    An installed gear has no sources beside it; `folder` is then in the working directory.
    """
    if os.environ.get(variable):
        return Path(os.environ[variable]).expanduser().resolve()
    return (ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()) / folder


def cache_dir():
    """Return the folder of files that can be downloaded or computed again: $GEAR_CACHE, else
    ~/.cache/gear.
    """
    return Path(os.environ.get("GEAR_CACHE") or "~/.cache/gear").expanduser()


def is_utf8(path):
    """Return whether the bytes of a path are UTF-8, which some libraries require."""
    return os.fsencode(path) == str(path).encode(errors="replace")


@functools.cache
def say_once(line):
    """Print a line on stderr once per process, whatever the number of calls.

    Bytes of a path that are not UTF-8 are printed as escapes.
    """
    print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)


def child_environment():
    """Return the environment variables of a child process that imports this gear.

    The child does not import modules from its working directory.
    """
    checkout = [str(ROOT)] if (ROOT / "pyproject.toml").exists() else []
    path = os.pathsep.join([*checkout, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def check_writable(folder, variable):
    """Raise UserError unless `folder` can be written to, or created and then written to.

    variable: the environment variable that sets the folder, or None; the message names it.
    """
    nearest_path = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    is_folder = nearest_path.is_dir()
    if not (is_folder and os.access(nearest_path, os.W_OK | os.X_OK)):
        reason = "cannot be written to" if is_folder else "is a file, not a folder"
        reason = reason if nearest_path.exists() else "is a link that leads nowhere"
        remedy = f"Set ${variable} to a folder of your own" if variable else "Name another folder"
        raise UserError(f"nothing can be kept in {folder}: {nearest_path} {reason}. {remedy}.")


def check_target(path, suffix=""):
    """Return `path` with ~ expanded, after a test that a file can be written there.

    Raises UserError if it cannot, or if `path` does not end in `suffix`.
    """
    path = Path(path).expanduser()
    if path.is_dir() or path.suffix.lower() != (suffix or path.suffix.lower()):
        reason = "is a folder" if path.is_dir() else f"does not end in {suffix}"
        raise UserError(f"{path} {reason}: name a file to write.")
    check_writable(path.absolute().parent, None)
    return path


def write_atomically(path, write):
    """Call `write(temporary)` and rename the temporary file to `path`.

    A reader sees the complete old file or the complete new one.
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
    """Call `fill(temporary)` on an empty folder and rename it to `folder`: complete or absent.

    The files are flushed to disk before the renaming. A `folder` that exists stays unchanged.
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
    """Force everything written to `path`, a file or a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# -- text ------------------------------------------------------------------------------------------


def read_text(path):
    """Return the content of a text file, with every line ending in "\\n".

    The file is in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Other encodings are not
    guessed: the same bytes are different letters in Windows-1252 and in Windows-1251. Raises
    UserError for another encoding, for a file that is not text, and for one that cannot be read.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): a text file is expected."
        ) from None
    marks = (pair for pair in BYTE_ORDER_MARKS if content.startswith(pair[0]))
    mark, encoding = next(marks, (b"", "utf-8"))
    if b"\0" in content and not mark:
        raise UserError(
            f"{path} is not a text file: it holds zero bytes. If it is text in UTF-16, save it as "
            "UTF-8, or with a byte order mark."
        )
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line_number = error.object[: error.start].count(10) + 1
        raise UserError(
            f"{path} is not in {encoding.upper()}: byte 0x{error.object[error.start]:02x} in line "
            f"{line_number}. Save it as UTF-8; if it is in Windows-1252 or Latin-1, "
            f"iconv -f WINDOWS-1252 -t UTF-8 {path.name} does that."
        ) from None
    if "\0" in text:
        raise UserError(f"{path} is not a text file: it holds zero characters.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path):
    """Return the lines of a text file, as `read_text` reads it, without blank lines at its end.

    Lines end only where an editor ends them; str.splitlines would also split at U+2028 and similar
    characters.
    """
    text = read_text(path).rstrip()
    return text.split("\n") if text else []


def read_json(path, **options):
    """Return the value in a JSON file, in any encoding that `read_text` accepts.

    options: keywords of json.loads. Raises ValueError for a file that cannot be read or is not
    JSON.
    """
    try:
        text = read_text(path)
    except UserError as error:
        raise ValueError(f"{error}".rstrip(".")) from None
    return parse_json(text, **options)


def parse_json(text, **options):
    """Return the value of a JSON text; `options` are keywords of json.loads.

    Raises ValueError for text that is not JSON, is nested too deeply, or escapes half a character
    (a lone surrogate).
    """
    try:
        values = json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text.lower():  # a lone surrogate can be neither printed nor written
        json.dumps(values, ensure_ascii=False).encode()
    return values


def kept_json(path):
    """Return the value in a JSON file, or None if the file is absent or damaged.

    It is for files that can be made again.
    """
    try:
        return read_json(path)
    except ValueError:
        return None


# -- arrays ----------------------------------------------------------------------------------------


def write_array(path, array):
    """Write an array as .npy, followed by the SHA-256 of the file's bytes; see `read_array`.

    np.load ignores the bytes after the array.
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
    """Return an array that `write_array` wrote, or None if the file is absent, cut short or changed
    in any bit.

    mapped: map the file into memory instead of loading it.
    """
    try:
        content = np.memmap(path, np.uint8, "r")
        digest = hashlib.sha256(content[:-32]).digest()
        return (
            np.load(path, mmap_mode="r" if mapped else None)
            if digest == content[-32:].tobytes()
            else None
        )
    except (OSError, ValueError, EOFError):  # absent or empty
        return None
