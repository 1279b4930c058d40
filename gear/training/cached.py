"""Codes and teacher features for the stage `generator`, where both networks are frozen: they are
computed once and then looked up.

Training sees variants of an image (flips, crops), and each variant has one row in the cache. If
images need no crop (scenes, CIFAR, a folder of square images), an image has one row, or two with
flips, for every seed. If images are cropped at random, every sample is a new variant: row n is
sample n of the stream, and only runs with the same seed share rows.

    codes/KEY/about.json    everything that the values depend on: network, images, batch size,
                            torch, device; KEY is its hash
              000000.npy    the first rows, followed by their hash; every file is complete or absent
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

FILE = 4096  # rows per file, rounded down to whole batches


class Cached(Stream):
    """A Stream whose samples are images without pixels (B, 0), labels (B,), indices (B, L) and, if
    there is a teacher, its features (B, L, C).

    On a CPU the values equal, bit for bit, what State.observe computes from images: they are
    computed in batches of the same size, on which the last bits depend, and features are stored in
    float32. On a GPU, features are stored in float16. Missing or damaged files are computed first.

    Raises UserError if the cache folder cannot be written to, OSError if the disk is full, and
    Interrupted if `signals` contains a signal. Complete files are kept in each case.
    """

    def __init__(self, state, workers=0, quiet=False, signals=(), source=None):
        config = state.config
        super().__init__(source or config.data, config.seed)
        self.batch = config.batch_size
        self.device = state.device
        self.identity = self.source.identity()
        self.per_image = None if self.source.is_cropped() else 1 + self.mirrors
        self.length = (
            len(self.source) * self.per_image
            if self.per_image
            else config.steps * config.batch_size
        )
        sizes = (self.batch, FILE, self.length)
        code_dtype = np.min_scalar_type(config.tokenizer.codebook_size - 1)
        encode = lambda images: state.tokenizer.encode(images).flatten(1)  # noqa: E731
        about = self._about("codes", state.tokenizer)
        self.arrays = [Rows(about, encode, code_dtype, np.int64, *sizes)]
        if state.teacher_features is not None:
            feature_dtype = np.float32 if state.device.type == "cpu" else np.float16
            about = self._about("features", state.teacher_features)
            if self.device.type != "cpu" and config.precision != "float32":  # see State.features
                about["precision"] = config.precision
            self.arrays.append(Rows(about, state.features, feature_dtype, np.float32, *sizes))
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
        """Return the image variants of the given rows as training sees them: (B, H, W, 3) uint8."""
        if not self.per_image:
            return self.render(*self.choose(rows))
        positions, mirrored = np.divmod(rows, self.per_image)
        return self.render(positions, np.zeros((len(rows), 2)), mirrored.astype(bool))

    def _about(self, what, network):
        """Return everything that the outputs of a frozen network depend on, as JSON values."""
        config = self.config
        device = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
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
        """Compute the missing files; every image is loaded once for both arrays."""
        check_writable(cache_dir(), "GEAR_CACHE")
        codes = self.arrays[0]
        codes.folder.mkdir(parents=True, exist_ok=True)
        # one lock for the whole cache, because runs with different codes share features
        with FileLock(codes.folder.parent / ".lock"):
            missing = {
                file: [array for array in self.arrays if not array.is_complete(file)]
                for file in range(codes.num_files)
            }
            missing = {file: arrays for file, arrays in missing.items() if arrays}
            incomplete = {id(array): array for arrays in missing.values() for array in arrays}
            for array in incomplete.values():
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
                                "goes on from there."
                            ),
                            signals[0],
                        )
                    values = [[] for _ in arrays]
                    for _ in codes.batches(file):
                        (batch,) = upload([next(images)], self.device)
                        for array_values, array in zip(values, arrays):
                            array_values.append(array.compute_batch(batch))
                        bar.update(min(self.batch, bar.total - bar.n))
                    for array_values, array in zip(values, arrays):
                        array.write(file, array_values)


class _Images(Stream):
    """A Stream of the images that the rows of a Cached are computed from."""

    def __init__(self, cached):
        self.cached = cached

    def _samples(self, rows):
        return torch.from_numpy(self.cached.images(np.array(rows)))


class Rows:
    """The outputs of `compute` for images, one row per image, stored in files of about `per_file`
    rows.

    They are stored as `stored_dtype` and returned as `returned_dtype`.
    """

    def __init__(self, about, compute, stored_dtype, returned_dtype, batch, per_file, length):
        self.about = about
        self.compute = compute
        self.stored_dtype = stored_dtype
        self.returned_dtype = returned_dtype
        self.batch = batch
        self.length = length
        self.per_file = batch * max(1, per_file // batch)
        self.num_files = -(-length // self.per_file)
        self.folder = cache_dir() / "codes" / config_hash(about)

    def __getitem__(self, rows):
        values = [_mapped(self._path(row // self.per_file))[row % self.per_file] for row in rows]
        return torch.from_numpy(np.stack(values).astype(self.returned_dtype))

    def _path(self, file):
        return self.folder / f"{file:06d}.npy"

    def rows(self, file):
        return range(file * self.per_file, min((file + 1) * self.per_file, self.length))

    def batches(self, file):
        """Return the row numbers of a file in full batches; the last row is repeated to fill the
        last batch.
        """
        rows = self.rows(file)
        return [
            [min(row, rows[-1]) for row in range(first, first + self.batch)]
            for first in rows[:: self.batch]
        ]

    def is_complete(self, file):
        """Tell whether a file exists, is undamaged and holds all rows; a longer run's file serves a
        shorter run.

        The file's hash is checked, which reads every byte once when a run starts. A gigabyte takes
        a second or two. Computing the values again would take hours, and training reads all rows
        every epoch anyway.
        """
        array = read_array(self._path(file), mapped=True)
        return (
            array is not None
            and array.dtype == self.stored_dtype
            and len(array) >= len(self.rows(file))
        )

    @torch.no_grad()
    def compute_batch(self, images):
        return self.compute(images).cpu().numpy().astype(self.stored_dtype)

    def write(self, file, values):
        """Write a file atomically from the values of its batches."""
        write_array(self._path(file), np.concatenate(values)[: len(self.rows(file))])
        _mapped.cache_clear()  # the file may replace a shorter run's last file

    def announce(self):
        """Print one line that says what is computed, where to, and why nothing stored fits."""
        about = self.folder / "about.json"
        others = {}
        for path in self.folder.parent.glob("*/about.json"):
            # an unreadable file is ignored: the differences only serve the message
            with contextlib.suppress(TypeError, ValueError):
                others[path.parent.name] = differences(dict(read_json(path)), self.about)
        same_kind = {
            name: lines
            for name, lines in others.items()
            if not any(line.startswith("what:") for line in lines)
        }
        if about.exists():
            reason = "files are missing, damaged or not computed yet"
        elif same_kind:
            nearest = min(same_kind, key=lambda name: len(same_kind[name]))
            reason = (
                f"those in {nearest} were made with another "
                f"{', '.join(line.split(':')[0] for line in same_kind[nearest])}"
            )
        else:
            reason = "none are stored yet"
        print(
            f"{self.about['what']} of {self.length} rows are computed into {self.folder}: "
            f"{reason}.",
            file=sys.stderr,
        )
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        write_atomically(about, lambda path: path.write_text(json.dumps(self.about, indent=1)))


@functools.lru_cache(maxsize=256)  # bounded, because every mapped file holds a file descriptor
def _mapped(path):
    return np.load(path, mmap_mode="r")


def network_identity(network):
    """Return a hash of a frozen network: of its tensors, and of its modules' types and `identity`
    attributes.
    """
    digest = hashlib.sha256(
        repr([(type(m).__name__, getattr(m, "identity", "")) for m in network.modules()]).encode()
    )
    for name, tensor in network.state_dict().items():
        digest.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.cpu().numpy().tobytes()
        )
    return digest.hexdigest()[:24]
