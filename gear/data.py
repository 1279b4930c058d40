"""Images: where they come from, which of them training may see, and a stream that can start at any sample.

A source answers `len`, `classes`, `images(positions)` -> uint8 NHWC and `labels(positions)`. Sample n of the stream is a
function of (seed, n) alone, whatever the batch size, the workers or the sample one starts from.
"""

import hashlib
import os
import signal
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from gear.config import UserError
from gear.scenes import NUM_CLASSES, Scenes

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
VALIDATION_SHARE = 0.05  # of a folder's images
UNREADABLE_SHARE = 0.01  # of a folder's images that may be skipped
PATCH = 4  # pixels of a patch whose factors are asked for: the stride of the scenes teacher
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "box": Image.Resampling.BOX}


@dataclass(frozen=True)
class DataConfig:
    source: str = "scenes"  # "scenes", or the path of a folder or a zip of images (one sub-folder a class, or flat)
    image_size: int = 32  # pixels
    train_images: int = 12_000  # scenes only
    val_images: int = 2_000  # scenes only
    interpolation: Literal["bicubic", "bilinear", "box"] = "bicubic"  # of the resize of the short side
    flip: bool = True  # mirror half of a folder's training images; scenes stay, their captions say left and right
    labels: Literal["class", "factors"] = "class"  # "factors": what each patch shows (scenes; trains the teacher)


class Directory:
    """The images of a folder: their names, relative and sorted, and a way to open one."""

    def __init__(self, root):
        self.root = root
        files = (f for f in root.rglob("*") if f.suffix.lower() in EXTENSIONS and f.is_file())
        self.names = sorted(f.relative_to(root).as_posix() for f in files)

    def open(self, name):
        return open(self.root / name, "rb")


class Zip:
    """The images of a zip, read in place. A folder that holds all of them, as in `train/cat/1.png`, does not count."""

    def __init__(self, path):
        self.path, self._handles = path, {}
        try:
            entries = sorted(n for n in self._zip().namelist() if Path(n).suffix.lower() in EXTENSIONS)
        except zipfile.BadZipFile as error:
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

    def open(self, name):
        return self._zip().open(self._top + name)


class Folder:
    """Images of a folder or a zip, one sub-folder a class; a flat one is one class.

    A twentieth, chosen by a hash of each image's relative name, is the validation split: adding images moves none of them
    (of a folder so small that no hash falls into it, the lowest is taken). An image that cannot be read is named once, and
    the next of its class stands in for it. Raises UserError when there is no such folder or zip, when it holds no images,
    and when more than a hundredth of them cannot be read.
    """

    def __init__(self, path, split, config):
        root = Path(path).expanduser()
        if not root.exists():
            raise UserError(
                f"no folder or zip of images at '{path}'. Give --source 'scenes', a folder or a zip of class folders."
            )
        self.path, self.store = path, Directory(root) if root.is_dir() else Zip(root)
        names = self.store.names
        if not names:
            raise UserError(f"'{path}' holds no images ({', '.join(sorted(EXTENSIONS))}).")
        folders, loose = sorted({n.split("/")[0] for n in names if "/" in n}), [n for n in names if "/" not in n]
        if folders and loose:
            raise UserError(
                f"'{path}' holds class folders ({', '.join(folders[:3])}) and {len(loose)} images beside them ({loose[0]}): "
                f"move those into a class folder."
            )
        self.classes = folders or [root.stem]
        rank = {n: _hash(n) for n in names}
        names = sorted(names, key=rank.get)  # the first N are then a sample of all classes
        held_out = {n for n in names if rank[n] < VALIDATION_SHARE} or {names[0]}
        self.names = [n for n in names if (n in held_out) == (split == "val")]
        if not self.names:
            raise UserError(f"'{path}' holds too few images ({len(names)}): none is left for the split '{split}'.")
        number = {name: i for i, name in enumerate(self.classes)}
        self._labels = np.array([number[n.split("/")[0]] if folders else 0 for n in self.names], np.int64)
        self._filter, self._size, self.unreadable = INTERPOLATIONS[config.interpolation], config.image_size, {}

    def __len__(self):
        return len(self.names)

    def labels(self, positions):
        return self._labels[positions]

    def images(self, positions, draws=None):
        """Resize the short side and crop to the square: at the centre, or where `draws` (B, 2) in [0, 1) says."""
        out = []
        for i, position in enumerate(positions):
            image = self._decode(position) or self._stand_in(position)
            scale = self._size / min(image.size)
            image = image.resize([max(self._size, round(side * scale)) for side in image.size], self._filter)
            room = np.array(image.size) - self._size
            x, y = room // 2 if draws is None else (draws[i] * (room + 1)).astype(int)
            out.append(np.asarray(image.crop((x, y, x + self._size, y + self._size))))
        return np.stack(out)

    def _decode(self, position):
        """Return the image at a position, or None, counted and named, if it cannot be read."""
        name = self.names[position]
        if name in self.unreadable:
            return None
        try:
            with self.store.open(name) as file:
                return Image.open(file).convert("RGB")
        except (OSError, zipfile.BadZipFile, zlib.error, Image.DecompressionBombError) as error:
            self.unreadable[name] = "not an image" if isinstance(error, UnidentifiedImageError) else error
        if len(self.unreadable) > UNREADABLE_SHARE * len(self.names):
            listed = "; ".join(f"{Path(self.path) / n} ({e})" for n, e in list(self.unreadable.items())[:3])
            raise UserError(
                f"{len(self.unreadable)} of {len(self.names)} images cannot be read, over {UNREADABLE_SHARE:.0%}: {listed}. "
                f"Remove or replace them."
            )
        print(
            f"{Path(self.path) / name} cannot be read ({self.unreadable[name]}): skipped, {len(self.unreadable)} so far",
            file=sys.stderr,
        )
        return None

    def _stand_in(self, position):
        """Return the next image of the same class that can be read."""
        label = self._labels[position]
        same = np.flatnonzero(self._labels == label)
        for other in np.roll(same, -np.searchsorted(same, position)):
            if (image := self._decode(other)) is not None:
                return image
        raise UserError(f"no image of the class '{self.classes[label]}' in '{self.path}' can be read.")


def open_source(config, split):
    """Open the "train" or "val" split of a DataConfig; no image is in both."""
    if config.source == "scenes":  # disjoint ranges of scene numbers
        first, length = {"train": (0, config.train_images), "val": (1 << 40, config.val_images)}[split]
        return Scenes(first, length, config.image_size)
    if config.labels == "factors":
        raise UserError(f"labels 'factors' need the source 'scenes'; '{config.source}' has classes only.")
    return Folder(config.source, split, config)


def num_classes(config):
    """Return the number of classes of a DataConfig's source."""
    return NUM_CLASSES if config.source == "scenes" else len(open_source(config, "train").classes)


def check_classes(config, classes, expected):
    """Raise UserError unless the `classes` found in a source are the `expected` ones: their names, or their number."""
    if expected in (classes, len(classes)):
        return
    tell = lambda names: f"{len(names)} ({', '.join(names[:12])}{', ...' if len(names) > 12 else ''})"  # noqa: E731
    wanted = expected if isinstance(expected, int) else tell(expected)
    raise UserError(
        f"classes in '{config.source}': {tell(classes)}; this run has {wanted} "
        f"(generator.num_classes). Put the class folders back as they were, or train a run of another name (--label)."
    )


class Stream(Dataset):
    """Training samples by their number n = 0, 1, 2, ...: epochs of seeded permutations, seeded crops and flips."""

    def __init__(self, config, seed):
        self.config, self.seed = config, seed
        self.source = open_source(config, "train")
        self._epoch, self._order = None, None

    def _position(self, n):
        epoch, offset = divmod(n, len(self.source))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.source))
        return self._order[offset]

    def __getitems__(self, numbers):
        try:
            return self._samples(numbers)
        except UserError as error:  # handed over, because a worker process would wrap it in its traceback
            return error

    def _samples(self, numbers):
        positions = np.array([self._position(n) for n in numbers])
        draws = np.stack([np.random.default_rng((self.seed, 1, n + 1)).random(3) for n in numbers])
        crop = {} if isinstance(self.source, Scenes) else {"draws": draws[:, :2]}
        images = self.source.images(positions, **crop)
        if self.config.flip and not isinstance(self.source, Scenes):
            images = np.where((draws[:, 2] < 0.5)[:, None, None, None], images[:, :, ::-1], images)
        labels = _labels(self.source, self.config, positions)
        return to_float(torch.from_numpy(np.ascontiguousarray(images))), torch.from_numpy(labels)


def stream(config, seed, batch_size, start=0, workers=0):
    """Return an endless iterator of (images (B, 3, H, W) in [-1, 1], labels (B,)), from sample number `start` on.

    It draws nothing from torch's global generator. Raises UserError, when it gets there, for an image that cannot be read.
    """

    def numbers():
        n = start
        while True:
            yield list(range(n, n + batch_size))
            n += batch_size

    loader = DataLoader(
        Stream(config, seed), batch_sampler=numbers(), num_workers=workers, collate_fn=_as_it_is, generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_parent,
    )  # fmt: skip
    return map(_raised, iter(loader))


def _leave_signals_to_the_parent(worker):
    """A terminal's Ctrl-C reaches workers too, and the parent needs them to finish its step; they end when it does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch):
    return batch


def _raised(batch):
    if isinstance(batch, UserError):
        raise batch
    return batch


def _labels(source, config, positions):
    """Return classes (B,), or what each patch shows (B, h, w, 4), as the configuration asks."""
    return source.factors(positions, PATCH) if config.labels == "factors" else source.labels(positions)


def load(config, split="val", count=None):
    """Return the first `count` images of a split, centre-cropped and never flipped, and their labels.

    (N, 3, H, W) float32 in [-1, 1] and (N,) int64, or (N, h, w, 4) where the configuration asks for factors.
    """
    return read(open_source(config, split), config, count)


def read(source, config, count=None):
    """Return what `load` does, of a source that is open."""
    positions = np.arange(len(source) if count is None else min(count, len(source)))
    return to_float(torch.from_numpy(source.images(positions))), torch.from_numpy(_labels(source, config, positions))


def to_float(images):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]: x = uint8 / 127.5 - 1."""
    return images.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounding half up: trunc(clamp(127.5 x + 128, 0, 255))."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _hash(name):
    """Map a name to [0, 1), evenly and for ever."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12
