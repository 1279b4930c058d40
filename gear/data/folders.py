"""The images of a folder, archive or download with their classes and splits."""

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

VALIDATION_SHARE = 0.05  # share of a folder's images in the validation split
UNREADABLE_SHARE = 0.01  # share of a folder's images that may be skipped as unreadable


def open_store(source):
    """Return the store for `source`: a folder, a zip, tar shards, one image, or a download.

    Raises UserError for anything else.
    """
    if source in DOWNLOADS:
        return Download(source)
    if not source:
        raise UserError(
            "no source of images is named: a folder, a zip, tar shards or 'scenes' is expected."
        )
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        store = Directory(path)
        shards = [tar.name for tar in path.glob("*.tar") if tar.is_file()]
        if shards and store.names and not any("/" in name for name in store.names):
            raise UserError(
                f"'{source}' holds {len(store.names)} images ({store.names[0]}) and {len(shards)} "
                f"shards ({shards[0]}): which are meant? Move the others away."
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
    """Return the store for a file, judged by its content: a zip, a tar or an image."""
    with open(path, "rb") as file:
        head = file.read(512)
    if path.suffix.lower() == ".zip" or head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return Zip(path)
    if head[257:262] == b"ustar":
        return Shards(path)
    if why_no_image(path.name, lambda: open(path, "rb")):
        raise UserError(
            f"'{path}' is not a zip, a tar or an image. A packed tar (.tar.gz) has to be unpacked: "
            "single images cannot be read from it without reading all of it."
        )
    return Directory(path)


class Folder:
    """The images of a folder, a zip, tar shards or a download, with one sub-folder per class.

    A source without sub-folders is a single class. A new Folder holds all images; `split` returns
    those of training or validation.

    Classes are sorted by name, or by number if every name begins with one; a file of labels
    (`config.labels`) may give another order. The validation split is a twentieth of the images,
    chosen by a hash of each image's name within the source: added images do not move others to
    another split. If no hash falls into the twentieth, the image with the lowest hash is taken. An
    unreadable image is reported once and replaced by the next readable one of its class.

    Raises UserError if the source is absent or holds no images, or if more than a hundredth of them
    are lost or unreadable.
    """

    def __init__(self, source, config):
        self.path = source
        self.store = open_store(source)
        names = self.store.names
        census = self.store.census
        if not names and not census.lost:
            left_out = f"; left out: {census}" if census.reasons else ""
            raise UserError(
                f"'{source}' holds no images (.png, .jpg, whatever Pillow opens){left_out}."
            )
        filled_folders = {name.split("/")[0] for name in names}
        for folder in (
            f.removeprefix(self.store.top)
            for f in self.store.folders
            if f.startswith(self.store.top)
        ):
            if folder and "/" not in folder and folder not in filled_folders:
                census.leave_out(f"{folder}/", "a folder without images")
        census.check(source, names, None if isinstance(self.store, Shards) else self.store.top)
        rank = {name: _hash(name) for name in names}
        names = sorted(names, key=rank.get)  # the first N are then a random sample of all classes
        self.held_out = {name for name in names if rank[name] < VALIDATION_SHARE} or {names[0]}
        self.all_labels, self.classes = self._classify(names, config.labels)
        self._filter = INTERPOLATIONS[config.interpolation]
        self._size = config.image_size
        self._select(names)

    def _select(self, names):
        self.names = names
        self.unreadable = {}
        self._labels = np.array([self.all_labels[name] for name in names], np.int64)

    def split(self, split):
        """Return a Folder of the images of the split "train", "val" or "all" (both).

        Raises UserError for an empty split.
        """
        names = [
            n for n in self.names if split == "all" or (n in self.held_out) == (split == "val")
        ]
        if not names:
            raise UserError(
                f"'{self.path}' holds too few images ({len(self)}): none is left for the split "
                f"'{split}'."
            )
        part = copy.copy(self)  # the open store and the classes are shared
        part._select(names)
        return part

    def _classify(self, names, labels):
        """Return ({name: class number}, [class name]).

        Raises UserError if images lie beside class folders, or if `labels` is a file and there are
        no class folders.
        """
        folders = {name.split("/")[0] for name in names if "/" in name}
        loose = [name for name in names if "/" not in name]
        if folders and loose:
            raise UserError(
                f"'{self.path}' holds class folders ({', '.join(sorted(folders)[:3])}) and "
                f"{len(loose)} images beside them ({loose[0]}): move the images into a class "
                "folder."
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
        """Return a hash that changes when the images, their names or their order change."""
        stamps = [(name, self.store.stamp(name)) for name in self.names]
        return hashlib.sha256(repr((RULES, stamps)).encode()).hexdigest()

    def order(self, rng):
        """Return the positions in the random order of one epoch, drawn from a NumPy generator."""
        return (
            self.store.order(self.names, rng)
            if isinstance(self.store, Shards)
            else rng.permutation(len(self))
        )

    def is_cropped(self):
        """Return whether any resized image is not square, so that the position of its crop
        matters.
        """
        names = set(self.names)
        for name in filter(names.__contains__, self.store.names):  # the order that reads fastest
            # an unreadable image is replaced by another one, which is examined itself
            with contextlib.suppress(Exception):
                with self.store.open(name) as file, Image.open(file) as image:
                    if resized_to(image.size, self._size) != [self._size, self._size]:
                        return True
        return False

    def images(self, positions, draws=None):
        """Return the images at `positions` (B,), resized and cropped: (B, size, size, 3) uint8.

        draws: (B, 2) in [0, 1), the positions of the crops; without it, crops are centred. Raises
        UserError if too many images are unreadable.
        """
        rows = []
        for i, position in enumerate(positions):
            image = self._decode(position) or self._replacement(position)
            rows.append(
                square(image, self._size, self._filter, None if draws is None else draws[i])
            )
        return np.stack(rows)

    def _decode(self, position):
        """Return the image at a position, or None if it is unreadable, which is reported once."""
        name = self.names[position]
        if name in self.unreadable:
            return None
        try:
            with self.store.open(name) as file:
                return to_rgb(Image.open(file))
        except Exception as error:  # decoders raise errors of any type
            self.unreadable[name] = (
                "not an image" if isinstance(error, UnidentifiedImageError) else error
            )
        if len(self.unreadable) > UNREADABLE_SHARE * len(self.names):
            listed = "; ".join(
                f"{self._location(n)} ({e})" for n, e in list(self.unreadable.items())[:3]
            )
            raise UserError(
                f"{len(self.unreadable)} of {len(self.names)} images cannot be read, over "
                f"{UNREADABLE_SHARE:.0%}: {listed}. Remove or replace them."
            )
        print(
            f"{self._location(name)} cannot be read ({self.unreadable[name]}): skipped, "
            f"{len(self.unreadable)} so far",
            file=sys.stderr,
        )
        return None

    def _location(self, name):
        """Return the path of an image, for messages; the source may be the image itself."""
        root = Path(self.path)
        return root if root.name == name else root / self.store.top / name

    def _replacement(self, position):
        """Return the next readable image of the same class."""
        label = self._labels[position]
        positions = np.flatnonzero(self._labels == label)
        for candidate in np.roll(positions, -np.searchsorted(positions, position)):
            if (image := self._decode(candidate)) is not None:
                return image
        raise UserError(
            f"no image of the class '{self.classes[label]}' in '{self.path}' can be read."
        )


def in_order(folders):
    """Sort class folders by name, or by number if every name begins with one (0_cat, 10_dog)."""
    numbers = [re.match(r"\d+", folder, re.ASCII) for folder in folders]
    if not all(numbers):
        return sorted(folders)
    return sorted(folders, key=lambda folder: (int(re.match(r"\d+", folder)[0]), folder))


def read_labels(path, folders):
    """Return the class names in a file of labels, in the order of the class numbers.

    Each line of the file is a class folder, in the order of the numbers, or a class folder, a comma
    or space, and its number. A class without images keeps its number. folders: the class folders of
    the source. Raises UserError for a file that cannot be read, that names a folder or number
    twice, or that lacks one of `folders`.
    """
    lines = [
        unicodedata.normalize("NFC", line.strip()) for line in read_lines(path) if line.strip()
    ]
    rows = [re.fullmatch(r"(.*[^\s,])[\s,]+(\d{1,6})", line, re.ASCII) for line in lines]
    if folders <= set(lines):
        pairs = [(line, i) for i, line in enumerate(lines)]
    elif all(rows):
        pairs = [(row[1], int(row[2])) for row in rows]
    else:  # ImageNet's own list: a folder and a description of its content
        pairs = [(line.split()[0], i) for i, line in enumerate(lines)]
    number_of = dict(pairs)
    name_of = {number: name for name, number in pairs}
    if not pairs or not len(number_of) == len(name_of) == len(pairs):
        raise UserError(
            f"the labels in '{path}' are not one line per class ({len(pairs)} lines, "
            f"{len(number_of)} folders, {len(name_of)} numbers): each line has to be a folder, or "
            "a folder, a comma and its number, each once."
        )
    if missing := sorted(folders - number_of.keys()):
        raise UserError(
            f"the labels in '{path}' have no line for {len(missing)} of {len(folders)} class "
            f"folders ({', '.join(missing[:3])}).{nearest(missing[0], number_of)}"
        )
    return [name_of.get(number, f"{number:05d}") for number in range(max(name_of) + 1)]


def _hash(name):
    """Map a name to [0, 1), uniformly and always to the same value."""
    return int(hashlib.sha256(os.fsencode(name)).hexdigest()[:12], 16) / 16**12
