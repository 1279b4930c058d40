"""The images of a source with their classes and splits, as training sees them."""

import contextlib
import copy
import hashlib
import os
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from gear.config import UserError, nearest
from gear.data.pixels import INTERPOLATIONS, RULES, resized_to, square, to_rgb, why_no_image
from gear.data.stores import DOWNLOADS, Directory, Download, Zip
from gear.data.tars import Shards
from gear.files import read_lines

VALIDATION_SHARE = 0.05  # of a folder's images
UNREADABLE_SHARE = 0.01  # of a folder's images that may be skipped


def open_store(source):
    """Open a folder, a zip, tar shards, one image or a download; raises UserError for anything
    else.
    """
    if source in DOWNLOADS:
        return Download(source)
    if not source:
        raise UserError(
            "no source of images is named: a folder, a zip, tar shards or 'scenes' is expected."
        )
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        store, shards = Directory(path), [tar.name for tar in path.glob("*.tar") if tar.is_file()]
        if shards and store.names and not any("/" in name for name in store.names):
            raise UserError(
                f"'{source}' holds {len(store.names)} images ({store.names[0]}) and {len(shards)} "
                f"shards ({shards[0]}): "
                f"which are meant? Move the others away."
            )
        return store if store.names or not shards else Shards(source)
    if (
        str(source).endswith(".tar")
        or "{" in str(source)
        and ".tar" in str(source)
        and not path.exists()
    ):
        return Shards(source)
    if path.is_file():
        return _open_file(path)
    raise UserError(
        f"there are no images at '{source}'. A folder, a zip or tar shards of images is expected, "
        f"'scenes' or one of {', '.join(DOWNLOADS)}.{nearest(source, ['scenes', *DOWNLOADS])}"
    )


def _open_file(path):
    """Open a file by its content: a zip, a tar, an image."""
    with open(path, "rb") as file:
        head = file.read(512)
    if path.suffix.lower() == ".zip" or head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return Zip(path)
    if head[257:262] == b"ustar":
        return Shards(path)
    if why_no_image(path.name, lambda: open(path, "rb")):
        raise UserError(
            f"'{path}' is not a zip, a tar or an image. A packed tar (.tar.gz) has to be unpacked: "
            f"its images could not be found again without reading all of it."
        )
    return Directory(path)


class Folder:
    """Images of a folder, a zip, tar shards or a download, one sub-folder a class; a flat one is
    one class.

    It is opened whole, and `split` gives the part of it that training may see, or may not.

    Classes are in the order of their names, or where each begins with a number, of those numbers; a
    file of labels (`config.labels`) says otherwise. A twentieth of the images, chosen by a hash of
    each one's name within the source, is the validation split: adding images moves none of them (of
    a folder so small that no hash falls into it, the lowest is taken); the split "all" holds both.
    An image that cannot be read is named once, and the next of its class stands in for it.

    Raises UserError where there is no such source, where it holds no images, and where more than a
    hundredth of them are lost or cannot be read.
    """

    def __init__(self, source, config):
        self.path, self.store = source, open_store(source)
        names = self.store.names
        census = self.store.census
        if not names and not census.lost:
            left_out = f"; left out: {census}" if census.reasons else ""
            raise UserError(
                f"'{source}' holds no images (.png, .jpg, whatever Pillow opens){left_out}."
            )
        filled = {name.split("/")[0] for name in names}
        for folder in (
            f.removeprefix(self.store.top)
            for f in self.store.folders
            if f.startswith(self.store.top)
        ):
            if folder and "/" not in folder and folder not in filled:
                census.leave_out(f"{folder}/", "a folder without images")
        census.check(source, names, None if isinstance(self.store, Shards) else self.store.top)
        rank = {name: _hash(name) for name in names}
        names = sorted(names, key=rank.get)  # the first N are then a sample of all classes
        self.held_out = {name for name in names if rank[name] < VALIDATION_SHARE} or {names[0]}
        self.all_labels, self.classes = self._classify(names, config.labels)
        self._filter, self._size = INTERPOLATIONS[config.interpolation], config.image_size
        self._take(names)

    def _take(self, names):
        self.names, self.unreadable = names, {}
        self._labels = np.array([self.all_labels[name] for name in names], np.int64)

    def split(self, split):
        """Return the images of the split "train", "val" or "all"; raises UserError where none is
        left for it.
        """
        names = [
            n for n in self.names if split == "all" or (n in self.held_out) == (split == "val")
        ]
        if not names:
            raise UserError(
                f"'{self.path}' holds too few images ({len(self)}): none is left for the split "
                f"'{split}'."
            )
        part = copy.copy(self)  # of the store that is open, and the classes that are told
        part._take(names)
        return part

    def _classify(self, names, labels):
        """Return ({name: class number}, [class name]); raises UserError for images beside class
        folders.
        """
        folders = {name.split("/")[0] for name in names if "/" in name}
        loose = [name for name in names if "/" not in name]
        if folders and loose:
            raise UserError(
                f"'{self.path}' holds class folders ({', '.join(sorted(folders)[:3])}) and "
                f"{len(loose)} images "
                f"beside them ({loose[0]}): move those into a class folder."
            )
        if not folders and labels != "class":
            raise UserError(
                f"the labels '{labels}' number class folders, and '{self.path}' has none."
            )
        if not folders:
            return dict.fromkeys(names, 0), [Path(self.path).stem]
        if isinstance(self.store, Shards) and self.store.numbered and labels == "class":
            number = {folder: int(folder) for folder in folders}
            return {name: number[name.split("/")[0]] for name in names}, [
                f"{i:05d}" for i in range(max(number.values()) + 1)
            ]
        classes = in_order(folders) if labels == "class" else read_labels(labels, folders)
        number = {folder: i for i, folder in enumerate(classes)}
        return {name: number[name.split("/")[0]] for name in names}, classes

    def __len__(self):
        return len(self.names)

    def labels(self, positions):
        return self._labels[positions]

    def identity(self):
        """Return a hash of the images' names, in order, and of what changes with their content."""
        stamps = [(name, self.store.stamp(name)) for name in self.names]
        return hashlib.sha256(repr((RULES, stamps)).encode()).hexdigest()

    def order(self, rng):
        """Return an epoch's order of the positions, drawn from a numpy generator."""
        return (
            self.store.order(self.names, rng)
            if isinstance(self.store, Shards)
            else rng.permutation(len(self))
        )

    def is_cropped(self):
        """Say whether any image leaves a choice where to crop it: resized, it is no square."""
        chosen = set(self.names)
        # in which order they are fastest to read
        for name in filter(chosen.__contains__, self.store.names):
            # an image that cannot be read has a stand-in, which is looked at itself
            with contextlib.suppress(Exception):
                with self.store.open(name) as file, Image.open(file) as image:
                    if resized_to(image.size, self._size) != [self._size, self._size]:
                        return True
        return False

    def images(self, positions, draws=None):
        """Resize the short side and crop to the square: at the centre, or where `draws` (B, 2) in
        [0, 1) says.
        """
        rows = []
        for i, position in enumerate(positions):
            image = self._decode(position) or self._stand_in(position)
            rows.append(
                square(image, self._size, self._filter, None if draws is None else draws[i])
            )
        return np.stack(rows)

    def _decode(self, position):
        """Return the image at a position, or None, counted and named, if it cannot be read."""
        name = self.names[position]
        if name in self.unreadable:
            return None
        try:
            with self.store.open(name) as file:
                return to_rgb(Image.open(file))
        except Exception as error:  # decoders raise whatever they like
            self.unreadable[name] = (
                "not an image" if isinstance(error, UnidentifiedImageError) else error
            )
        if len(self.unreadable) > UNREADABLE_SHARE * len(self.names):
            listed = "; ".join(
                f"{self._place(n)} ({e})" for n, e in list(self.unreadable.items())[:3]
            )
            raise UserError(
                f"{len(self.unreadable)} of {len(self.names)} images cannot be read, over "
                f"{UNREADABLE_SHARE:.0%}: {listed}. "
                f"Remove or replace them."
            )
        print(
            (
                f"{self._place(name)} cannot be read ({self.unreadable[name]}): skipped, "
                f"{len(self.unreadable)} so far"
            ),
            file=sys.stderr,
        )
        return None

    def _place(self, name):
        """Say where an image lies: a source may be the image itself."""
        root = Path(self.path)
        return root if root.name == name else root / self.store.top / name

    def _stand_in(self, position):
        """Return the next image of the same class that can be read."""
        label = self._labels[position]
        same = np.flatnonzero(self._labels == label)
        for other in np.roll(same, -np.searchsorted(same, position)):
            if (image := self._decode(other)) is not None:
                return image
        raise UserError(
            f"no image of the class '{self.classes[label]}' in '{self.path}' can be read."
        )


def in_order(folders):
    """Return class folders by name, or where each begins with a number (0_cat, 10_dog), by those
    numbers.
    """
    numbers = [re.match(r"\d+", folder, re.ASCII) for folder in folders]
    if not all(numbers):
        return sorted(folders)
    return sorted(folders, key=lambda folder: (int(re.match(r"\d+", folder)[0]), folder))


def read_labels(path, folders):
    """Return the class names that a file of labels gives, class i at place i.

    It is a text of one class folder a line, in the order of their numbers, or of a folder, a comma
    or space, and its number. A class without images keeps its number. Raises UserError for a file
    that cannot be read, a number or a folder that stands there twice, and folders that it does not
    name.
    """
    lines = [
        unicodedata.normalize("NFC", line.strip()) for line in read_lines(path) if line.strip()
    ]
    rows = [re.fullmatch(r"(.*[^\s,])[\s,]+(\d{1,6})", line, re.ASCII) for line in lines]
    if folders <= set(lines):
        pairs = [(line, i) for i, line in enumerate(lines)]
    elif all(rows):
        pairs = [(row[1], int(row[2])) for row in rows]
    else:  # as ImageNet's list has it: a folder and what is in it
        pairs = [(line.split()[0], i) for i, line in enumerate(lines)]
    named, numbered = dict(pairs), {number: name for name, number in pairs}
    if not pairs or not len(named) == len(numbered) == len(pairs):
        raise UserError(
            f"the labels in '{path}' are not one line a class ({len(pairs)} lines, {len(named)} "
            "folders, "
            f"{len(numbered)} numbers): a folder, or a folder, a comma and its number, each once."
        )
    if missing := sorted(folders - named.keys()):
        raise UserError(
            f"the labels in '{path}' have no line for {len(missing)} of {len(folders)} class "
            "folders "
            f"({', '.join(missing[:3])}).{nearest(missing[0], named)}"
        )
    return [numbered.get(number, f"{number:05d}") for number in range(max(numbered) + 1)]


def _hash(name):
    """Map a name to [0, 1), evenly and for ever."""
    return int(hashlib.sha256(os.fsencode(name)).hexdigest()[:12], 16) / 16**12
