"""Where images lie: a folder, a zip, a download. A store names its images, and counts what it leaves out.

A name is the path of an image within its source, with "/" between, the same for a folder and for any
archive of it. A store answers `open(name)`, a binary file; `length(name)`, its bytes; `stamp(name)`,
which changes when the image does.
"""

import fcntl
import functools
import io
import os
import posixpath
import re
import stat
import sys
import unicodedata
import zipfile
from collections import Counter

from gear.config import UserError
from gear.data.pixels import is_hidden, why_no_image
from gear.home import cache_dir

LOST_SHARE = 0.01  # of a source's images that may be left out
DOWNLOADS = {"cifar10": ("CIFAR10", 10), "cifar100": ("CIFAR100", 100)}  # name: torchvision's class, classes
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # names of folders


class Census:
    """What a source leaves out, by reason; `lost` are images that cannot be had."""

    def __init__(self):
        self.reasons, self.lost = {}, Counter()

    def leave_out(self, name, reason, is_loss=False):
        self.reasons.setdefault(reason, []).append(name)
        if is_loss:
            self.lost[reason] += 1

    def takes(self, name, open_file):
        """Say whether a file is an image, and count it where it is none."""
        if why := why_no_image(name, open_file):
            self.leave_out(name, *why)
        return not why

    def __str__(self):
        """Say it in a line: how many, why, and one of them by name; "" where nothing was left out."""
        return "; ".join(f"{len(n)} ({why}), as {n[0]}" for why, n in self.reasons.items())

    def check(self, source, num_images):
        """Say once what was left out; raises UserError where more than LOST_SHARE of images are lost."""
        lost = self.lost.total()
        if lost > LOST_SHARE * (num_images + lost):
            named = "; ".join(f"{count} ({why}): {', '.join(self.reasons[why][:3])}" for why, count in self.lost.items())
            raise UserError(
                f"{lost} of {num_images + lost} images in '{source}' cannot be taken, over "
                f"{LOST_SHARE:.0%}: {named}. Save them as PNG or JPEG, or remove them."
            )
        if self.reasons:
            _say(f"{source}: {num_images} images; left out: {self}")


@functools.cache  # a source is opened for every split
def _say(line):
    print(line, file=sys.stderr)


# -- names ---------------------------------------------------------------------------------------------


def tidy(path, separators="/"):
    """Return a path within an archive as a folder's walk would name it: no ".", no "..", composed letters.

    Letters come composed (NFC), for a Mac packs them in two parts.
    """
    parts = re.split(f"[{re.escape(separators)}]", path)
    return unicodedata.normalize("NFC", "/".join(p for p in parts if p not in ("", ".", "..")))


def named(entries, source):
    """Return ({name: entry}, top) of {tidy path: entry}: a folder that holds all class folders does not count.

    Raises UserError where the folders are splits, which hold the same classes.
    """
    top = ""
    while True:
        rest = [path.removeprefix(top) for path in entries]
        folders = {path.split("/")[0] for path in rest if "/" in path}
        splits = {folder for folder in folders if folder.lower() in SPLITS}
        if len(splits) > 1:
            first = min(splits, key=lambda folder: (not folder.lower().startswith("train"), folder))
            inside = posixpath.join(str(source), top, first)
            raise UserError(
                f"'{source}' holds the splits {', '.join(sorted(splits))}, which are no classes: give "
                f"one of them, as in '{inside}' (an archive: unpacked)."
            )
        if len(folders) != 1 or any(path.count("/") < 2 for path in rest):
            return {path: entries[top + path] for path in sorted(rest)}, top
        top += f"{folders.pop()}/"


# -- stores --------------------------------------------------------------------------------------------


class Directory:
    """The images of a folder, whose links are followed, or one image file."""

    def __init__(self, root):
        self.census, self.folders = Census(), []
        self.root = root if root.is_dir() else root.parent
        paths = self._walk("", ()) if root.is_dir() else [root.name]
        taken = {tidy(path): path for path in paths if self._is_taken(path)}
        self.entries, self.top = named(taken, root) if root.is_dir() else (taken, "")
        self.names = list(self.entries)

    def _is_taken(self, path):
        return self.census.takes(path, lambda: open(self.root / path, "rb"))

    def _walk(self, folder, above):
        """Yield the paths of files in and under a folder; `above` are the folders it lies in."""
        place = self.root / folder
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in above:
            self.census.leave_out(folder, "a link to a folder it lies in")
            return
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            self.census.leave_out(folder, f"a folder: {error.strerror}", is_loss=True)
            return
        for entry in entries:
            path = f"{folder}{entry.name}"
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:  # a ring of links
                self.census.leave_out(path, error.strerror, is_loss=True)
                continue
            if is_folder and is_hidden(entry.name):
                self.census.leave_out(path, "hidden by a system")
            elif is_folder:
                self.folders.append(tidy(path))
                yield from self._walk(f"{path}/", (*above, (here.st_dev, here.st_ino)))
            elif is_file:
                yield path
            elif entry.is_symlink():
                self.census.leave_out(path, "a link to nothing", is_loss=True)
            else:
                self.census.leave_out(path, "no file")

    def open(self, name):
        return open(self.root / self.entries[name], "rb")

    def length(self, name):
        return (self.root / self.entries[name]).stat().st_size

    def stamp(self, name):
        """Return what changes when the image does."""
        there = (self.root / self.entries[name]).stat()
        return there.st_size, there.st_mtime_ns


class Zip:
    """The images of a zip, read in place."""

    def __init__(self, path):
        self.path, self._handles, self.census, self.folders = path, {}, Census(), []
        try:
            members = self._zip().infolist()
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, OSError) as error:
            raise UserError(f"'{path}' is not a zip that can be read ({error}).") from None
        paths = {member: _path_in_zip(member) for member in members}
        separators = "/" if any("/" in p for p in paths.values()) else "/\\"  # some packers know no other
        files = {}
        for member, path in paths.items():
            is_folder, path = path.endswith(tuple(separators)), tidy(path, separators)
            if is_folder:
                self.folders.append(path)
                continue
            if path in files:
                self.census.leave_out(path, "an earlier copy of a file that stands there twice")
            files[path] = member
        taken = {}
        for path, member in files.items():
            if self.census.takes(path, functools.partial(self._open, member)):
                target = self._target(path, member, files)
                if target is None:
                    self.census.leave_out(path, "a link to nothing", is_loss=True)
                else:
                    taken[path] = target
        self.entries, self.top = named(taken, self.path)
        self.names = list(self.entries)

    def _target(self, path, member, files):
        """Return the member whose content a path has: a link's is another's, or nobody's (None)."""
        for _ in range(8):  # links to links, and no ring of them
            if not stat.S_ISLNK(member.external_attr >> 16):
                return member
            with self._open(member) as file:
                path = posixpath.normpath(posixpath.join(posixpath.dirname(path), os.fsdecode(file.read())))
            if path not in files:
                return None
            member = files[path]
        return None

    def _zip(self):
        """Return this process's handle: one shared with worker processes would share its position in the file."""
        if os.getpid() not in self._handles:
            self._handles[os.getpid()] = zipfile.ZipFile(self.path)
        return self._handles[os.getpid()]

    def _open(self, member):
        return self._zip().open(member)

    def open(self, name):
        return self._open(self.entries[name])

    def length(self, name):
        return self.entries[name].file_size

    def stamp(self, name):
        return self.entries[name].CRC


def _path_in_zip(member):
    """Return a member's path as a file system would have it: without a flag its bytes are read as code page 437."""
    if member.flag_bits & 0x800:  # UTF-8
        return member.orig_filename
    try:
        return os.fsdecode(member.orig_filename.encode("cp437"))
    except UnicodeEncodeError:
        return member.orig_filename


class Download:
    """The training images of a torchvision data set, named CLASS/NUMBER and kept in the cache folder."""

    def __init__(self, name):
        import torchvision.datasets  # it loads torch's compiler, which takes 2 s

        kind, root = getattr(torchvision.datasets, DOWNLOADS[name][0]), cache_dir() / name
        try:
            root.mkdir(parents=True, exist_ok=True)
            with open(root / ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others wait
                self._data = kind(root, train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"'{name}' is not in {root}, and could not be downloaded from {kind.url} "
                f"({getattr(error, 'reason', error)}). A folder or a zip of class folders will do instead."
            ) from None
        self.census, self.folders, self.top = Census(), [], ""
        classes, targets = self._data.classes, self._data.targets
        self.entries = {f"{classes[label]}/{i:05d}": i for i, label in enumerate(targets)}
        self.names = list(self.entries)

    def open(self, name):
        file = io.BytesIO()
        self._data[self.entries[name]][0].save(file, "PPM")
        file.seek(0)
        return file

    def length(self, name):
        return 0

    def stamp(self, name):
        return ""  # torchvision has compared the files with their checksums
