"""Where images lie: a folder, a zip, a download. A store names its images, and counts what it
leaves out.

A name is the path of an image within its source, with "/" between, the same for a folder and for
any archive of it. A store answers `open(name)`, a binary file; `length(name)`, its bytes;
`stamp(name)`, which changes when the image does.
"""

import io
import os
import posixpath
import stat
import zipfile

from filelock import FileLock

from gear.config import UserError
from gear.data.census import Census
from gear.data.names import follow, named, tidy
from gear.data.pixels import is_hidden
from gear.files import cache_dir

# name: torchvision's class, classes
DOWNLOADS = {"cifar10": ("CIFAR10", 10), "cifar100": ("CIFAR100", 100)}


class Directory:
    """The images of a folder, whose links are followed, or one image file."""

    def __init__(self, root):
        self.census, self.folders = Census(), []
        self.root = root if root.is_dir() else root.parent
        paths = self._walk("", ()) if root.is_dir() else [root.name]
        taken = {}
        for path in filter(self._is_taken, paths):
            if tidy(path) in taken:
                self.census.leave_out(
                    path, "of the same name as another, its letters composed", is_loss=True
                )
            taken[tidy(path)] = path
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
        is_plain = any("/" in path.rstrip("/") for path in paths.values())
        separators = "/" if is_plain else "/\\"  # some packers know no other
        files, links = {}, {}
        for member, path in paths.items():
            is_folder, path = path.endswith(tuple(separators)), tidy(path, separators)
            if is_folder:
                self.folders.append(path)
                continue
            if path in files or path in links:
                self.census.leave_out(path, "an earlier copy of a file that stands there twice")
            if stat.S_ISLNK(member.external_attr >> 16):
                files.pop(path, None)
                links[path] = self._target(path, member)
            else:
                links.pop(path, None)
                files[path] = member
        follow(files, links, self.census)
        taken = {path: member for path, member in files.items() if self._is_taken(path, member)}
        self.entries, self.top = named(taken, self.path)
        self.names = list(self.entries)

    def _is_taken(self, path, member):
        return self.census.takes(path, lambda: self._open(member))

    def _target(self, path, member):
        """Return the path to which a link leads, "" where it cannot be read."""
        try:
            with self._open(member) as file:
                return posixpath.normpath(
                    posixpath.join(posixpath.dirname(path), os.fsdecode(file.read()))
                )
        except Exception:  # a damaged member raises whatever its decoder likes
            return ""

    def _zip(self):
        """Return this process's handle: one shared with worker processes would share its position
        in the file.
        """
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
    """Return a member's path as a file system would have it: without a flag its bytes are read as
    code page 437.
    """
    if member.flag_bits & 0x800:  # UTF-8
        return member.orig_filename
    try:
        return os.fsdecode(member.orig_filename.encode("cp437"))
    except UnicodeEncodeError:
        return member.orig_filename


class Download:
    """The training images of a torchvision data set, named CLASS/NUMBER and kept in the cache
    folder.
    """

    def __init__(self, name):
        import torchvision.datasets  # it loads torch's compiler, which takes 2 s

        kind, root = getattr(torchvision.datasets, DOWNLOADS[name][0]), cache_dir() / name
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".lock"):  # one process downloads, the others wait
                self._data = kind(root, train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"'{name}' is not in {root}, and could not be downloaded from {kind.url} "
                f"({getattr(error, 'reason', error)}). A folder or a zip of class folders will do "
                "instead."
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
