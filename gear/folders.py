"""Images that lie somewhere: in a folder, in a zip, in tar shards, or to be downloaded by torchvision."""

import contextlib
import fcntl
import hashlib
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision import datasets

from gear.config import UserError, nearest
from gear.home import cache_dir
from gear.shards import EXTENSIONS, Shards, is_spec

VALIDATION_SHARE = 0.05  # of a folder's images
UNREADABLE_SHARE = 0.01  # of a folder's images that may be skipped
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "box": Image.Resampling.BOX}
DOWNLOADS = {"cifar10": (datasets.CIFAR10, 10), "cifar100": (datasets.CIFAR100, 100)}  # name: torchvision's class, classes


def _is_image(name):
    """Tell images by their extension, and not what a system hides among them (`._1.png`, `__MACOSX/`)."""
    path = Path(name)
    return path.suffix.lower() in EXTENSIONS and not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


class Directory:
    """The images of a folder, or one image file: their names, relative and sorted, and a way to read one."""

    def __init__(self, root):
        self.root = root if root.is_dir() else root.parent
        if not root.is_dir():
            self.names = [root.name]
            return
        files = (f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file())
        self.names = sorted(filter(_is_image, files))

    def image(self, name):
        with open(self.root / name, "rb") as file:
            return Image.open(file).convert("RGB")

    def size(self, name):
        with Image.open(self.root / name) as image:  # its header alone is read
            return image.size

    def stamp(self, name):
        """Return what changes when the image does."""
        stat = (self.root / name).stat()
        return stat.st_size, stat.st_mtime_ns


class Zip:
    """The images of a zip, read in place. A folder that holds all of them, as in `train/cat/1.png`, does not count."""

    def __init__(self, path):
        self.path, self._handles = path, {}
        try:
            entries = sorted(filter(_is_image, self._zip().namelist()))
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise UserError(f"'{path}' is not a zip ({error}). Give --source a folder or a zip of class folders.") from None
        self._top = f"{entries[0].split('/')[0]}/" if entries else ""
        if any(not n.startswith(self._top) or "/" not in n for n in entries):
            self._top = ""
        self.names = [n.removeprefix(self._top) for n in entries]

    def _zip(self):
        """Return this process's handle: one shared with worker processes would share its position in the file."""
        if os.getpid() not in self._handles:
            self._handles[os.getpid()] = zipfile.ZipFile(self.path)
        return self._handles[os.getpid()]

    def image(self, name):
        with self._zip().open(self._top + name) as file:
            return Image.open(file).convert("RGB")

    def size(self, name):
        with self._zip().open(self._top + name) as file:
            return Image.open(file).size

    def stamp(self, name):
        return self._zip().getinfo(self._top + name).CRC


class Download:
    """The training images of a torchvision data set, named CLASS/NUMBER and kept in the cache folder."""

    def __init__(self, name):
        (kind, _), root = DOWNLOADS[name], cache_dir() / name
        try:
            root.mkdir(parents=True, exist_ok=True)
            with open(root / ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others wait
                self._data = kind(root, train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"'{name}' is not in {root}, and could not be downloaded from {kind.url} ({getattr(error, 'reason', error)}). "
                f"Give a folder or a zip of class folders instead: --source PATH."
            ) from None
        self.names = [f"{self._data.classes[label]}/{i:05d}" for i, label in enumerate(self._data.targets)]

    def image(self, name):
        return self._data[int(name.split("/")[1])][0]

    def size(self, name):
        return self.image(name).size

    def stamp(self, name):
        return ""  # torchvision has compared the files with their checksums


def _store(source):
    if source in DOWNLOADS:
        return Download(source)
    root = Path(source).expanduser()
    if is_spec(source) and not (root.is_dir() and Directory(root).names):
        return Shards(source)
    if not root.exists():
        raise UserError(
            f"no folder or zip of images at '{source}'. Give --source a folder or a zip of class folders, tar shards, 'scenes' "
            f"or one of {', '.join(DOWNLOADS)}.{nearest(source, ['scenes', *DOWNLOADS])}"
        )
    return Directory(root) if root.is_dir() or _is_image(root.name) else Zip(root)


class Folder:
    """Images of a folder, a zip, tar shards or a download, one sub-folder a class; a flat one is one class.

    A twentieth, chosen by a hash of each image's relative name, is the validation split: adding images moves none of them
    (of a folder so small that no hash falls into it, the lowest is taken); the split "all" holds both. An image that cannot
    be read is named once, and the next of its class stands in for it. Raises UserError when there is no such folder or zip,
    or no download, when it holds no images, and when more than a hundredth of them cannot be read.
    """

    def __init__(self, path, split, config):
        self.path, self.store = path, _store(path)
        names = self.store.names
        if not names:
            raise UserError(f"'{path}' holds no images ({', '.join(sorted(EXTENSIONS))}).")
        folders, loose = sorted({n.split("/")[0] for n in names if "/" in n}), [n for n in names if "/" not in n]
        if folders and loose:
            raise UserError(
                f"'{path}' holds class folders ({', '.join(folders[:3])}) and {len(loose)} images beside them ({loose[0]}): "
                f"move those into a class folder."
            )
        self.classes = folders or [Path(path).stem]
        rank = {n: _hash(n) for n in names}
        names = sorted(names, key=rank.get)  # the first N are then a sample of all classes
        held_out = {n for n in names if rank[n] < VALIDATION_SHARE} or {names[0]}
        self.names = names if split == "all" else [n for n in names if (n in held_out) == (split == "val")]
        if not self.names:
            raise UserError(f"'{path}' holds too few images ({len(names)}): none is left for the split '{split}'.")
        number = {name: i for i, name in enumerate(self.classes)}
        self._labels = np.array([number[n.split("/")[0]] if folders else 0 for n in self.names], np.int64)
        self._filter, self._size, self.unreadable = INTERPOLATIONS[config.interpolation], config.image_size, {}

    def __len__(self):
        return len(self.names)

    def labels(self, positions):
        return self._labels[positions]

    def identity(self):
        """Return a hash of the images' names, in order, and of what changes with their content."""
        return hashlib.sha256(repr([(name, self.store.stamp(name)) for name in self.names]).encode()).hexdigest()

    def order(self, rng):
        """Return an epoch's order of the positions, drawn from a numpy generator."""
        return self.store.order(self.names, rng) if isinstance(self.store, Shards) else rng.permutation(len(self))

    def is_cropped(self):
        """Say whether any image leaves a choice where to crop it: resized, it is no square."""
        ours = set(self.names)
        for name in filter(ours.__contains__, self.store.names):  # in which order they are fastest to read
            with contextlib.suppress(Exception):  # an image that cannot be read has a stand-in, which is looked at itself
                if self._resized(self.store.size(name)) != [self._size, self._size]:
                    return True
        return False

    def images(self, positions, draws=None):
        """Resize the short side and crop to the square: at the centre, or where `draws` (B, 2) in [0, 1) says."""
        out = []
        for i, position in enumerate(positions):
            image = self._decode(position) or self._stand_in(position)
            image = image.resize(self._resized(image.size), self._filter)
            room = np.array(image.size) - self._size
            x, y = room // 2 if draws is None else (draws[i] * (room + 1)).astype(int)
            out.append(np.asarray(image.crop((x, y, x + self._size, y + self._size))))
        return np.stack(out)

    def _resized(self, size):
        """Return the width and height to which an image of `size` is resized: the short side has image_size pixels."""
        scale = self._size / min(size)
        return [max(self._size, round(side * scale)) for side in size]

    def _decode(self, position):
        """Return the image at a position, or None, counted and named, if it cannot be read."""
        name = self.names[position]
        if name in self.unreadable:
            return None
        try:
            return self.store.image(name)
        except Exception as error:  # decoders raise whatever they like
            self.unreadable[name] = "not an image" if isinstance(error, UnidentifiedImageError) else error
        if len(self.unreadable) > UNREADABLE_SHARE * len(self.names):
            listed = "; ".join(f"{self._place(n)} ({e})" for n, e in list(self.unreadable.items())[:3])
            raise UserError(
                f"{len(self.unreadable)} of {len(self.names)} images cannot be read, over {UNREADABLE_SHARE:.0%}: {listed}. "
                f"Remove or replace them."
            )
        print(
            f"{self._place(name)} cannot be read ({self.unreadable[name]}): skipped, {len(self.unreadable)} so far",
            file=sys.stderr,
        )
        return None

    def _place(self, name):
        """Say where an image lies: a source may be the image itself."""
        return Path(self.path) if Path(self.path).name == name else Path(self.path) / name

    def _stand_in(self, position):
        """Return the next image of the same class that can be read."""
        label = self._labels[position]
        same = np.flatnonzero(self._labels == label)
        for other in np.roll(same, -np.searchsorted(same, position)):
            if (image := self._decode(other)) is not None:
                return image
        raise UserError(f"no image of the class '{self.classes[label]}' in '{self.path}' can be read.")


def _hash(name):
    """Map a name to [0, 1), evenly and for ever."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12
