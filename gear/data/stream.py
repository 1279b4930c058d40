"""A source of images, which of them training may see, and a stream that can start at any sample.

A source answers `len`, `classes`, `images(positions)` -> uint8 NHWC, `labels(positions)`, and
`order(rng)`, that of an epoch. Sample n of the stream is a function of (seed, n) alone, whatever
the batch size, the workers or the sample one starts from.
"""

import functools
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gear.config import (
    Checked,
    Count,
    Pixels,
    UserError,
    check_value,
    given_by,
    nearest,
    require,
)
from gear.data.folders import Folder
from gear.data.scenes import NUM_CLASSES, Scenes
from gear.data.stores import DOWNLOADS
from gear.images import to_float

PATCH = 4  # pixels of a patch whose factors are asked for: the stride of the scenes teacher
LABELS = ("class", "factors")  # what is no file
SPLITS = ("train", "val", "all")


@dataclass(frozen=True)
class DataConfig(Checked):
    # or "cifar10", "cifar100", a folder or zip of images (a sub-folder a class, or flat), tar
    # shards
    source: str = "scenes"
    image_size: Pixels = 32  # of a side
    train_images: Count = 12_000  # scenes only
    val_images: Count = 2_000  # scenes only
    # of the resize of the short side
    interpolation: Literal["bicubic", "bilinear", "box"] = "bicubic"
    # mirror half of a folder's training images; scenes stay, their captions say left and right
    flip: bool = True
    # "class": a sub-folder is a class. Or a file that numbers classes, a folder a line or
    # "folder,number"; or "factors": what each patch shows (scenes; trains the teacher)
    labels: str = "class"
    # where the validation images lie, in the same class folders (ImageNet's own, say): then nothing
    # of `source` is held out; "": a twentieth of `source`
    val_source: str = ""


class Source:
    """The images of a DataConfig. A folder is walked once, when its first split is asked for."""

    def __init__(self, config):
        self.config = config

    @functools.cached_property
    def _folder(self):
        return Folder(self.config.source, self.config)

    @functools.cached_property
    def _validation(self):
        config = replace(self.config, source=self.config.val_source)
        with given_by("val_source"):
            images = Folder(config.source, config).split("all")
            require(
                images.classes == self._folder.classes,
                f"'{config.source}' has {len(images.classes)} classes ({images.classes[0]}, ...), "
                f"'{self.config.source}' {len(self._folder.classes)}: sort the validation images "
                "into folders of the same names.",
            )
        return images

    def split(self, split):
        """Return the "train" or "val" split, no image being in both, or "all".

        "all" is all of a folder, without what `val_source` names; of scenes, which have no end,
        those of "val". Raises UserError for another split, and where there is no such source.
        """
        config = self.config
        require(
            not config.val_source or config.source not in ("scenes", *DOWNLOADS),
            f"val_source is for folders, zips and tars: '{config.source}' has its own split.",
        )
        if split not in SPLITS:
            raise UserError(
                f"unknown split '{split}'.{nearest(split, SPLITS)} Known: {', '.join(SPLITS)}."
            )
        if config.source == "scenes":  # disjoint ranges of scene numbers
            if config.labels not in LABELS:
                raise UserError(
                    f"the classes of 'scenes' have their numbers: labels '{config.labels}' are for "
                    "folders."
                )
            first, length = (
                (0, config.train_images) if split == "train" else (1 << 40, config.val_images)
            )
            return Scenes(first, length, config.image_size)
        if config.labels == "factors":
            raise UserError(
                f"labels 'factors' need the source 'scenes'; '{config.source}' has classes only."
            )
        if config.val_source:
            return self._validation if split == "val" else self._folder.split("all")
        return self._folder.split(split)


def open_source(config, split):
    """Return a split of a DataConfig's images: `Source.split`."""
    return Source(config).split(split)


def opened_source(source):
    """Return a Source as it is, and that of a DataConfig."""
    return source if isinstance(source, Source) else Source(source)


def absolute(config):
    """Return a DataConfig whose paths mean the same from any working directory."""
    path = lambda text: os.path.abspath(os.path.expanduser(text)) if text else ""  # noqa: E731
    source, labels = config.source, config.labels
    return replace(
        config,
        val_source=path(config.val_source),
        source=source if source == "scenes" or source in DOWNLOADS else path(source),
        labels=labels if labels in LABELS else path(labels),
    )


def num_classes(config, absent=None):
    """Return the number of classes of a DataConfig's source; what would have to be downloaded is
    not.

    `absent`, where given, is the answer for a folder or zip that is not there.
    """
    if config.source == "scenes":
        return NUM_CLASSES
    if (
        absent is not None
        and config.source not in DOWNLOADS
        and not Path(config.source).expanduser().exists()
    ):
        return absent
    return (
        DOWNLOADS[config.source][1]
        if config.source in DOWNLOADS
        else len(open_source(config, "train").classes)
    )


def check_classes(config, classes, expected):
    """Raise UserError unless the `classes` found in a source are the `expected` ones: their names,
    or their number.
    """
    if (
        expected in (classes, len(classes))
        or not isinstance(expected, int)
        and len(expected) == len(classes) == 1
    ):
        return  # what a single class is called changes no label
    tell = lambda names: (
        f"{len(names)} ({', '.join(names[:12])}{', ...' if len(names) > 12 else ''})"
    )  # noqa: E731
    wanted = expected if isinstance(expected, int) else tell(expected)
    raise UserError(
        f"classes in '{config.source}': {tell(classes)}; this run has {wanted} "
        "(generator.num_classes). Put the class folders back as they were, or train a run of "
        "another name (--label)."
    )


class Stream(Dataset):
    """Training samples by their number n = 0, 1, 2, ...: epochs of seeded permutations, seeded
    crops and flips.
    """

    def __init__(self, source, seed):
        opened = opened_source(source)
        self.config, self.seed, self.source = opened.config, seed, opened.split("train")
        self.mirrors = self.config.flip and not isinstance(self.source, Scenes)
        self._epoch, self._order = None, None

    def _position(self, n):
        epoch, offset = divmod(n, len(self.source))
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                self.source.order(np.random.default_rng((self.seed, epoch))),
            )
        return self._order[offset]

    def __getitems__(self, numbers):
        try:
            return self._samples(numbers)
        except (
            UserError
        ) as error:  # handed over, because a worker process would wrap it in its traceback
            return error

    def _samples(self, numbers):
        positions, crops, mirrored = self.choose(numbers)
        return torch.from_numpy(self.render(positions, crops, mirrored)), self.labels(positions)

    def choose(self, numbers):
        """Say what samples show: positions (B,), crops (B, 2) in [0, 1), and whether they are
        mirrored (B,).
        """
        positions = np.array([self._position(n) for n in numbers])
        draws = np.stack([np.random.default_rng((self.seed, 1, n + 1)).random(3) for n in numbers])
        return positions, draws[:, :2], (draws[:, 2] < 0.5) & self.mirrors

    def render(self, positions, crops, mirrored):
        """Return what `choose` chose: (B, H, W, 3) uint8."""
        images = self.source.images(
            positions, **({} if isinstance(self.source, Scenes) else {"draws": crops})
        )
        images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        return np.ascontiguousarray(images)

    def labels(self, positions):
        return torch.from_numpy(_labels(self.source, self.config, positions))


def stream(source, seed, batch_size, start=0, workers=0, rows=slice(None), samples=None):
    """Return an endless iterator of (images (B, H, W, 3) uint8, labels (B,)) of a DataConfig or
    Source, from a sample on.

    Of each batch it prepares the `rows` alone: those of one process. `samples`, by default
    Stream(source, seed), may be another Stream, which answers with more. Nothing is drawn from
    torch's global generator. Raises UserError, when it gets there, for an image that cannot be
    read.
    """

    def numbers():
        n = start
        while True:
            yield list(range(n, n + batch_size))[rows]
            n += batch_size

    return loaded(samples or Stream(source, seed), numbers(), workers)


def loaded(samples, batches, workers=0):
    """Return an iterator of what a Stream answers to each list of numbers in `batches`, in that
    order.
    """
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),
        worker_init_fn=_leave_interrupts_to_the_parent,
    )
    return map(_raised, iter(loader))


def _leave_interrupts_to_the_parent(worker):
    """A terminal's Ctrl-C reaches workers too, and the parent needs them to finish its step; they
    end when it does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch):
    return batch


def _raised(batch):
    if isinstance(batch, UserError):
        raise batch
    return batch


def _labels(source, config, positions):
    """Return classes (B,), or what each patch shows (B, h, w, 4), as the configuration asks."""
    return (
        source.factors(positions, PATCH) if config.labels == "factors" else source.labels(positions)
    )


def load(source, split="val", count=None):
    """Return the first `count` images of a split of a DataConfig or Source, centre-cropped, never
    flipped, and their labels.

    (N, 3, H, W) float32 in [-1, 1] and (N,) int64, or (N, h, w, 4) where the configuration asks for
    factors. Raises UserError for a count below 1.
    """
    source = opened_source(source)
    if count is not None:
        check_value("count", count, Count)
    images = source.split(split)
    positions = np.arange(len(images) if count is None else min(count, len(images)))
    labels = _labels(images, source.config, positions)
    return to_float(torch.from_numpy(images.images(positions))), torch.from_numpy(labels)


def upload(samples, device):
    """Send what a stream gives to a device, without waiting for it; images (B, H, W, 3) uint8
    become float there.
    """
    if device.type == "cuda":
        samples = [sample.pin_memory().to(device, non_blocking=True) for sample in samples]
    return [to_float(sample) if sample.dtype == torch.uint8 else sample for sample in samples]
