"""Stores: access to the images in a folder, a zip or a download.

The name of an image is its path within the source, with "/" between folders; it is the same for a
folder and for any archive of it. A store has `names`; `census`, the files that it leaves out;
`open(name)`, which returns a binary file; `length(name)`, in bytes; and `stamp(name)`, a value that
changes when the image does.
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

# name -> (class in torchvision.datasets, number of classes)
DOWNLOADS = {"cifar10": ("CIFAR10", 10), "cifar100": ("CIFAR100", 100)}


class Directory:
    """The images of a folder, with links followed, or one image file."""

    def __init__(self, root):
        self.census = Census()
        self.folders = []
        self.root = root if root.is_dir() else root.parent
        paths = self._walk("", ()) if root.is_dir() else [root.name]
        images = {}  # tidy path -> path
        for path in filter(self._is_image, paths):
            if tidy(path) in images:
                self.census.leave_out(
                    path, "of the same name as another, its letters composed", is_loss=True
                )
            images[tidy(path)] = path
        self.entries, self.top = named(images, root) if root.is_dir() else (images, "")
        self.names = list(self.entries)

    def _is_image(self, path):
        return self.census.takes(path, lambda: open(self.root / path, "rb"))

    def _walk(self, folder, parents):
        """Yield the paths of all files in a folder and its sub-folders.

        parents: (device, inode) of the folders around it, by which cycles of links are found.
        """
        full_path = self.root / folder
        status = os.stat(full_path)
        if (status.st_dev, status.st_ino) in parents:
            self.census.leave_out(folder, "a link to a folder it lies in")
            return
        try:
            entries = sorted(os.scandir(full_path), key=lambda entry: entry.name)
        except OSError as error:
            self.census.leave_out(folder, f"a folder: {error.strerror}", is_loss=True)
            return
        for entry in entries:
            path = f"{folder}{entry.name}"
            try:
                is_folder = entry.is_dir()
                is_file = entry.is_file()
            except OSError as error:  # a cycle of links
                self.census.leave_out(path, error.strerror, is_loss=True)
                continue
            if is_folder and is_hidden(entry.name):
                self.census.leave_out(path, "hidden by a system")
            elif is_folder:
                self.folders.append(tidy(path))
                yield from self._walk(f"{path}/", (*parents, (status.st_dev, status.st_ino)))
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
        """Return a value that changes when the image does."""
        status = (self.root / self.entries[name]).stat()
        return status.st_size, status.st_mtime_ns


class Zip:
    """The images of a zip, read without unpacking it."""

    def __init__(self, path):
        self.path = path
        self.census = Census()
        self.folders = []
        self._handles = {}  # process -> open zip
        try:
            members = self._zip().infolist()
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, OSError) as error:
            raise UserError(
                f"'{path}' is not a zip that can be read ({error}). Pack the images again."
            ) from None
        paths = {member: _path_in_zip(member) for member in members}
        has_slashes = any("/" in path.rstrip("/") for path in paths.values())
        separators = "/" if has_slashes else "/\\"  # some Windows packers write backslashes alone
        files = {}
        links = {}
        for member, path in paths.items():
            is_folder = path.endswith(tuple(separators))
            path = tidy(path, separators)
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
        images = {path: member for path, member in files.items() if self._is_image(path, member)}
        self.entries, self.top = named(images, self.path)
        self.names = list(self.entries)

    def _is_image(self, path, member):
        return self.census.takes(path, lambda: self._open(member))

    def _target(self, path, member):
        """Return the path to which a link leads, or "" if the link cannot be read."""
        try:
            with self._open(member) as file:
                return posixpath.normpath(
                    posixpath.join(posixpath.dirname(path), os.fsdecode(file.read()))
                )
        except Exception:  # a damaged member raises errors of any type
            return ""

    def _zip(self):
        """Return this process's handle of the zip; a shared handle would share its position in the
        file.
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
    """Return a member's path as a file system encodes it.

    zipfile decodes a path without the UTF-8 flag by code page 437, which is undone here.
    """
    if member.flag_bits & 0x800:  # the flag for UTF-8
        return member.orig_filename
    try:
        return os.fsdecode(member.orig_filename.encode("cp437"))
    except UnicodeEncodeError:
        return member.orig_filename


class Download:
    """The training images of a torchvision data set, downloaded to the cache folder.

    Images are named CLASS/NUMBER.
    """

    def __init__(self, name):
        import torchvision.datasets  # loads torch's compiler, which takes 2 s

        kind = getattr(torchvision.datasets, DOWNLOADS[name][0])
        root = cache_dir() / name
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".lock"):  # one process downloads, the others wait
                self._data = kind(root, train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"'{name}' is not in {root}, and could not be downloaded from {kind.url} "
                f"({getattr(error, 'reason', error)}). Use a folder or a zip of class folders "
                "instead."
            ) from None
        self.census = Census()
        self.folders = []
        self.top = ""
        classes = self._data.classes
        self.entries = {
            f"{classes[label]}/{i:05d}": i for i, label in enumerate(self._data.targets)
        }
        self.names = list(self.entries)

    def open(self, name):
        file = io.BytesIO()
        self._data[self.entries[name]][0].save(file, "PPM")
        file.seek(0)
        return file

    def length(self, name):
        return 0

    def stamp(self, name):
        return ""  # the images never change: torchvision compares the files with their checksums
