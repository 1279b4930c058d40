"""Configured image sources with their splits, and a stream of samples that can start anywhere.

The images of a split have `len`, `classes`, `images(positions)` -> uint8 NHWC, `labels(positions)`
and `order(rng)`, the random order of one epoch. Sample n of the stream is a function of (seed, n)
alone: it depends neither on the batch size, nor on the workers, nor on the first sample.
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

PATCH = 4  # side in pixels of the patches that have factors: the stride of the scenes teacher
LABELS = ("class", "factors", "objects")  # values of `labels` that do not name a file
# number of the first training scene of the teacher and the generators, and of the detector; their
# validation scenes begin VALIDATION later
FIRST_SCENE = {"class": 0, "factors": 0, "objects": 2 << 40}
VALIDATION = 1 << 40
SPLITS = ("train", "val", "all")


@dataclass(frozen=True)
class DataConfig(Checked):
    # "scenes", "cifar10", "cifar100", a folder or zip of images (one sub-folder per class, or
    # flat), or tar shards
    source: str = "scenes"
    image_size: Pixels = 32  # side of an image, in pixels
    train_images: Count = 12_000  # number of training images; scenes only
    val_images: Count = 2_000  # number of validation images; scenes only
    # filter for resizing the short side of an image
    interpolation: Literal["bicubic", "bilinear", "box"] = "bicubic"
    # mirror half of a folder's training images; scenes are never mirrored, since their captions say
    # left and right
    flip: bool = True
    # "class": every sub-folder is a class. Or the path of a file that numbers the class folders,
    # with lines "folder" or "folder,number". For scenes only: "factors", what each patch shows
    # (for the scenes teacher), or "objects", the objects of other scenes (for the detector)
    labels: str = "class"
    # folder, zip or shards of validation images in the same class folders, such as ImageNet's own;
    # all of `source` is then for training. "": a twentieth of `source` is for validation
    val_source: str = ""


class Source:
    """The images of a DataConfig; a folder is read once, when its first split is requested."""

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
        """Return the images of the split "train" or "val", which are disjoint, or of "all".

        "all" is all of a folder, without the images of `val_source`. Scenes are unlimited, and
        "all" is "val" there. Raises UserError for another split and for a source that does not
        exist.
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
                    f"the classes of 'scenes' have fixed numbers: labels '{config.labels}' are for "
                    "folders. Use 'class', 'factors' or 'objects'."
                )
            first = FIRST_SCENE[config.labels]
            if split == "train":
                return Scenes(first, config.train_images, config.image_size)
            return Scenes(first + VALIDATION, config.val_images, config.image_size)
        if config.labels in ("factors", "objects"):
            raise UserError(
                f"labels '{config.labels}' need the source 'scenes'; '{config.source}' has classes "
                "only."
            )
        if config.val_source:
            return self._validation if split == "val" else self._folder.split("all")
        return self._folder.split(split)


def open_source(config, split):
    """Return the images of a DataConfig for one split; see `Source.split`."""
    return Source(config).split(split)


def opened_source(source):
    """Return a Source unchanged, or the Source of a DataConfig."""
    return source if isinstance(source, Source) else Source(source)


def absolute(config):
    """Return a DataConfig with absolute paths, valid from any working directory."""
    path = lambda text: os.path.abspath(os.path.expanduser(text)) if text else ""  # noqa: E731
    source = config.source
    labels = config.labels
    return replace(
        config,
        val_source=path(config.val_source),
        source=source if source == "scenes" or source in DOWNLOADS else path(source),
        labels=labels if labels in LABELS else path(labels),
    )


def num_classes(config, absent=None):
    """Return the number of classes of a DataConfig's source, without downloading anything.

    absent: the value to return for a folder or zip that does not exist; without it, such a source
    raises UserError.
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
    """Raise UserError unless the names `classes` of a source are the `expected` ones.

    expected: a list of names, or a number of classes.
    """
    if (
        expected in (classes, len(classes))
        or not isinstance(expected, int)
        and len(expected) == len(classes) == 1
    ):
        return  # the name of a single class does not matter: its label is 0
    describe = lambda names: (
        f"{len(names)} ({', '.join(names[:12])}{', ...' if len(names) > 12 else ''})"
    )  # noqa: E731
    expected_text = expected if isinstance(expected, int) else describe(expected)
    raise UserError(
        f"classes in '{config.source}': {describe(classes)}; this run has {expected_text} "
        "(generator.num_classes). Put the class folders back as they were, or train a run of "
        "another name (--label)."
    )


class Stream(Dataset):
    """Training samples by their number n = 0, 1, 2, ...

    Each epoch is a seeded permutation of the training images; crops and flips are seeded by n.
    """

    def __init__(self, source, seed):
        opened = opened_source(source)
        self.config = opened.config
        self.seed = seed
        self.source = opened.split("train")
        self.mirrors = self.config.flip and not isinstance(self.source, Scenes)
        self._epoch = None
        self._order = None

    def _position(self, n):
        epoch, offset = divmod(n, len(self.source))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = self.source.order(np.random.default_rng((self.seed, epoch)))
        return self._order[offset]

    def __getitems__(self, numbers):
        try:
            return self._samples(numbers)
        except UserError as error:
            # returned and raised in the parent: a worker process would add its own traceback
            return error

    def _samples(self, numbers):
        positions, crops, mirrored = self.choose(numbers)
        return torch.from_numpy(self.render(positions, crops, mirrored)), self.labels(positions)

    def choose(self, numbers):
        """Return what samples show: positions (B,), crops (B, 2) in [0, 1), and whether each is
        mirrored (B,).
        """
        positions = np.array([self._position(n) for n in numbers])
        draws = np.stack([np.random.default_rng((self.seed, 1, n + 1)).random(3) for n in numbers])
        return positions, draws[:, :2], (draws[:, 2] < 0.5) & self.mirrors

    def render(self, positions, crops, mirrored):
        """Return the images that `choose` chose: (B, H, W, 3) uint8."""
        images = self.source.images(
            positions, **({} if isinstance(self.source, Scenes) else {"draws": crops})
        )
        images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        return np.ascontiguousarray(images)

    def labels(self, positions):
        return torch.from_numpy(_labels(self.source, self.config, positions))


def stream(source, seed, batch_size, start=0, workers=0, rows=slice(None), samples=None):
    """Return an endless iterator of (images (B, H, W, 3) uint8, labels (B,)).

    source: a DataConfig or Source. start: the number of the first sample. rows: a slice of every
    batch; only those samples, the ones of one process, are prepared. samples: by default
    Stream(source, seed), or another Stream that returns more per sample. torch's global generator
    is not used. Raises UserError during iteration if images are unreadable.
    """

    def numbers():
        n = start
        while True:
            yield list(range(n, n + batch_size))[rows]
            n += batch_size

    return loaded(samples or Stream(source, seed), numbers(), workers)


def loaded(samples, batches, workers=0):
    """Return an iterator of the samples of a Stream, one batch per list of numbers in `batches`, in
    that order.
    """
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
        worker_init_fn=_ignore_interrupts,
    )
    return map(_raised, iter(loader))


def _ignore_interrupts(worker):
    """Ignore SIGINT in a worker process: a terminal's Ctrl-C reaches it, but the parent needs its
    workers to finish the step. Workers end when the parent does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(batch):
    return batch


def _raised(batch):
    """Return a batch, or raise the UserError that a worker returned in its place."""
    if isinstance(batch, UserError):
        raise batch
    return batch


def _labels(source, config, positions):
    """Return classes (B,), factors per patch (B, h, w, 4) or objects (B, 3, 7), as the
    configuration says.
    """
    if config.labels == "factors":
        return source.factors(positions, PATCH)
    return source.objects(positions) if config.labels == "objects" else source.labels(positions)


def load(source, split="val", count=None):
    """Return the first `count` images of a split and their labels; all images by default.

    source: a DataConfig or Source. Images are (N, 3, H, W) float32 in [-1, 1], cropped at the
    centre and not flipped. Labels are (N,) int64 or, if the configuration asks for them, factors
    (N, h, w, 4) or objects (N, 3, 7). Raises UserError for a count below 1.
    """
    source = opened_source(source)
    if count is not None:
        check_value("count", count, Count)
    images = source.split(split)
    positions = np.arange(len(images) if count is None else min(count, len(images)))
    labels = _labels(images, source.config, positions)
    return to_float(torch.from_numpy(images.images(positions))), torch.from_numpy(labels)


def upload(samples, device):
    """Copy the samples of a stream to a device without waiting; return a list of tensors there.

    Images (B, H, W, 3) uint8 are converted to float on the device.
    """
    if device.type == "cuda":
        samples = [sample.pin_memory().to(device, non_blocking=True) for sample in samples]
    return [to_float(sample) if sample.dtype == torch.uint8 else sample for sample in samples]
