"""Codes and teacher features for the stage `generator`, where both networks are frozen: computed
once, then looked up.

What training sees of an image is a variant of it, and has a row. Where images fill their square
(scenes, CIFAR, a folder of square ones) there are finitely many: an image has one row, or with
flips two, whatever the seed. Where they are cropped at random, each sample is a variant of its own:
row n is sample n of the stream, which runs of one seed share.

    codes/KEY/about.json    what the values depend on, whose hash is KEY: network, images, batch
                            size, torch, device
              000000.npy    the first rows, complete or absent, like every file after it; behind
                            them their hash
"""

import contextlib
import functools
import hashlib
import json
import sys

import numpy as np
import PIL
import torch
from filelock import FileLock
from tqdm import tqdm

from gear.config import Interrupted, __version__, config_hash, differences
from gear.data import Stream, loaded
from gear.data.stream import upload
from gear.files import (
    cache_dir,
    check_writable,
    read_array,
    read_json,
    write_array,
    write_atomically,
)

FILE = 4096  # rows of a file, rounded to whole batches


class Cached(Stream):
    """A Stream whose samples are pixel-free images (B, 0), labels (B,), indices (B, L), and with a
    teacher features (B, L, C).

    On a CPU they are, bit for bit, what State.observe computes from images: they are computed in
    batches of the same size, on which the last bits depend, and features are kept in float32. On a
    GPU these are kept in float16. What is missing or cut short in the cache folder is computed
    first. Raises UserError when that folder cannot be written to, OSError when it is full, and
    Interrupted when `signals` holds one; the files that are complete then stand.
    """

    def __init__(self, state, workers=0, quiet=False, signals=(), source=None):
        config = state.config
        super().__init__(source or config.data, config.seed)
        self.batch, self.device, self.identity = (
            config.batch_size,
            state.device,
            self.source.identity(),
        )
        self.per_image = None if self.source.is_cropped() else 1 + self.mirrors
        self.length = (
            len(self.source) * self.per_image
            if self.per_image
            else config.steps * config.batch_size
        )
        codes, count = (
            np.min_scalar_type(config.tokenizer.codebook_size - 1),
            (self.batch, FILE, self.length),
        )
        encode = lambda images: state.tokenizer.encode(images).flatten(1)  # noqa: E731
        self.arrays = [Rows(self._about("codes", state.tokenizer), encode, codes, np.int64, *count)]
        if state.teacher_features is not None:
            features = np.float32 if state.device.type == "cpu" else np.float16
            about = self._about("features", state.teacher_features)
            if self.device.type != "cpu" and config.precision != "float32":  # see State.features
                about["precision"] = config.precision
            self.arrays.append(Rows(about, state.features, features, np.float32, *count))
        self._complete(workers, quiet, signals)

    def _samples(self, numbers):
        positions, _, mirrored = self.choose(numbers)
        rows = positions * self.per_image + mirrored if self.per_image else np.array(numbers)
        return (
            torch.empty(len(rows), 0),
            self.labels(positions),
            *(array[rows] for array in self.arrays),
        )

    def images(self, rows):
        """Return what stands behind rows as training sees it, (B, H, W, 3) uint8."""
        if not self.per_image:
            return self.render(*self.choose(rows))
        positions, mirrored = np.divmod(rows, self.per_image)
        return self.render(positions, np.zeros((len(rows), 2)), mirrored.astype(bool))

    def _about(self, what, network):
        """Return all that the values of a frozen network depend on, as JSON values."""
        config, device = (
            self.config,
            f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        )
        if self.device.type != "cpu":
            device = torch.cuda.get_device_name(self.device)
        return {
            "what": what,
            "network": network_identity(network),
            "images": self.identity,
            "flip": bool(self.mirrors),
            "image_size": config.image_size,
            "interpolation": config.interpolation,
            "batch_size": self.batch,
            "crops": "none" if self.per_image else f"of seed {self.seed}",
            "device": device,
            "versions": [__version__, torch.__version__, np.__version__, PIL.__version__],
        }

    def _complete(self, workers, quiet, signals):
        """Compute the files that are not there, images once for both arrays."""
        check_writable(cache_dir(), "GEAR_CACHE")
        codes = self.arrays[0]
        codes.folder.mkdir(parents=True, exist_ok=True)
        # of all: runs on different codes share features
        with FileLock(codes.folder.parent / ".lock"):
            missing = {
                file: [a for a in self.arrays if not a.has(file)] for file in range(codes.files)
            }
            missing = {file: arrays for file, arrays in missing.items() if arrays}
            for array in {id(a): a for arrays in missing.values() for a in arrays}.values():
                array.announce()
            batches = [batch for file in missing for batch in codes.batches(file)]
            images = loaded(_Images(self), batches, workers)
            total = sum(len(codes.rows(file)) for file in missing)
            with tqdm(
                total=total,
                desc="codes",
                unit=" rows",
                disable=quiet or not missing,
                dynamic_ncols=True,
            ) as bar:
                for file, arrays in missing.items():
                    if signals:
                        raise Interrupted(
                            (
                                f"{codes.folder.parent} keeps what was computed. The same command "
                                "goes on."
                            ),
                            signals[0],
                        )
                    values = [[] for _ in arrays]
                    for _ in codes.batches(file):
                        (batch,) = upload([next(images)], self.device)
                        for of_array, array in zip(values, arrays):
                            of_array.append(array.of(batch))
                        bar.update(min(self.batch, bar.total - bar.n))
                    for of_array, array in zip(values, arrays):
                        array.keep(file, of_array)


class _Images(Stream):
    """The images behind the rows of a Cached."""

    def __init__(self, cached):
        self.cached = cached

    def _samples(self, rows):
        return torch.from_numpy(self.cached.images(np.array(rows)))


class Rows:
    """What `compute` makes of images, a row each: kept as `kept` in files of about `per_file` rows,
    handed out as `given`.
    """

    def __init__(self, about, compute, kept, given, batch, per_file, length):
        self.about, self.compute, self.kept, self.given, self.batch, self.length = (
            about,
            compute,
            kept,
            given,
            batch,
            length,
        )
        self.per_file = batch * max(1, per_file // batch)
        self.files = -(-length // self.per_file)
        self.folder = cache_dir() / "codes" / config_hash(about)

    def __getitem__(self, rows):
        found = [_mapped(self._path(row // self.per_file))[row % self.per_file] for row in rows]
        return torch.from_numpy(np.stack(found).astype(self.given))

    def _path(self, file):
        return self.folder / f"{file:06d}.npy"

    def rows(self, file):
        return range(file * self.per_file, min((file + 1) * self.per_file, self.length))

    def batches(self, file):
        """Return the rows of a file in whole batches; the last row fills up the last one."""
        rows = self.rows(file)
        return [
            [min(row, rows[-1]) for row in range(first, first + self.batch)]
            for first in rows[:: self.batch]
        ]

    def has(self, file):
        """Say whether a file is there and holds what was written; a longer run's serves a shorter
        one.

        Its hash is computed, which reads every byte once when a run starts: a gigabyte takes a
        second or two, hours less than the network that made it would, and the rows are read again
        every epoch anyway.
        """
        array = read_array(self._path(file), mapped=True)
        return array is not None and array.dtype == self.kept and len(array) >= len(self.rows(file))

    @torch.no_grad()
    def of(self, images):
        return self.compute(images).cpu().numpy().astype(self.kept)

    def keep(self, file, values):
        """Write a file from the values of its batches; it is there whole or not at all."""
        write_array(self._path(file), np.concatenate(values)[: len(self.rows(file))])
        _mapped.cache_clear()  # a longer run replaces the last file of a shorter one

    def announce(self):
        """Say in a line what is computed and why: against what is kept, what has changed."""
        about, others = self.folder / "about.json", {}
        for path in self.folder.parent.glob("*/about.json"):
            # it only serves to say what has changed
            with contextlib.suppress(TypeError, ValueError):
                others[path.parent.name] = differences(dict(read_json(path)), self.about)
        near = {k: v for k, v in others.items() if not any(line.startswith("what:") for line in v)}
        if about.exists():
            why = "files are missing, damaged or yet to come"
        elif near:
            nearest = min(near, key=lambda name: len(near[name]))
            why = (
                f"those in {nearest} were made with another "
                f"{', '.join(line.split(':')[0] for line in near[nearest])}"
            )
        else:
            why = "none are kept yet"
        print(
            f"{self.about['what']} of {self.length} rows go to {self.folder}: {why}.",
            file=sys.stderr,
        )
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        write_atomically(about, lambda path: path.write_text(json.dumps(self.about, indent=1)))


@functools.lru_cache(maxsize=256)  # a mapped file holds a descriptor
def _mapped(path):
    return np.load(path, mmap_mode="r")


def network_identity(network):
    """Return a hash of a frozen network: its tensors and what its parts say of themselves."""
    digest = hashlib.sha256(
        repr([(type(m).__name__, getattr(m, "identity", "")) for m in network.modules()]).encode()
    )
    for name, tensor in network.state_dict().items():
        digest.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.cpu().numpy().tobytes()
        )
    return digest.hexdigest()[:24]
