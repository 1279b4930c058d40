"""Where the images of an evaluation come from: a run's samples, someone else's, a reference. All
uint8 (N, H, W, 3).
"""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from gear.config import UserError, given_by
from gear.data import DataConfig, Source
from gear.device import derived_seed
from gear.evaluation.scores import BATCH, FeatureSet, extract
from gear.files import read_array, write_array
from gear.generator.sampling import generate, sampling_dtype
from gear.images import to_uint8
from gear.measures.frechet import Moments, check_statistics
from gear.tokenizer.model import images_at_once

# samples drawn at once, always: what is drawn must not depend on where a kill fell
CHUNKS = {"cpu": 64, "cuda": 256}
# how they are drawn where a protocol does not say it
PLAIN = {"dtype": "float32", "chunk": CHUNKS["cpu"]}
SEEDS = 2  # the second way in which chunks are seeded: those of the first are not mixed in
STATISTICS = {  # arrays of a reference file, by feature network: {kind: (mean, covariance)}
    "inception": {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")},
    "dinov2-l": {"pool": ("dino_mu", "dino_sigma")},
}
EMBEDDINGS = {"dinov2-l": "dino_embeddings"}  # features of a reference file, for the neighbours


def balanced_labels(count, classes, seed):
    """Return `count` labels, each class as often as another (but for the remainder), in a seeded
    order: (N,) int64.
    """
    return torch.from_numpy(np.random.default_rng(seed).permutation(np.arange(count) % classes))


def drawing(generator):
    """Return what a protocol says of how `draw_samples` draws on a generator's device: dtype and
    chunk if not as in PLAIN.
    """
    dtype = str(sampling_dtype(generator)).removeprefix("torch.")
    how = {"dtype": dtype, "chunk": CHUNKS[generator.embedding.device.type]}
    return {key: value for key, value in how.items() if value != PLAIN[key]}


def filled_up(labels, size):
    """Return labels (N,) in chunks of `size`, N if there are fewer; the last is filled up with the
    first labels.
    """
    size = min(size, len(labels))
    return torch.cat([labels, labels[: -len(labels) % size]]).split(size)


def draw_samples(folder, generator, tokenizer, labels, seed, quiet=False, side=0, **sampling):
    """Yield uint8 chunks (64, H, W, 3), on a GPU of 256, of samples for labels (N,), each kept in
    `folder` as it is drawn. They are resized to `side` pixels before they are rounded, bicubic
    as in the public code; 0: not.

    Chunk i is a function of its labels and (seed, i): a call that was killed goes on where it was,
    to the same samples. One that is not what was written, or comes without its hash, is drawn
    again.
    """
    device = generator.embedding.device
    size = CHUNKS[device.type]
    chunks = labels.split(size)
    # there, chunks of one size are one graph
    conditions = filled_up(labels, size) if device.type == "cuda" else chunks
    for i, part in enumerate(
        tqdm(chunks, desc="samples", unit=" chunks", disable=quiet, mininterval=2.0)
    ):
        path = folder / f"{i:05d}.npy"
        images = read_array(path)
        if images is None or len(images) != len(part):
            indices = generate(generator, conditions[i], seed=derived_seed(seed, i), **sampling)[
                : len(part)
            ]
            grids = indices.split(
                images_at_once(device, indices[0].numel() * tokenizer.config.downsampling**2)
            )
            images = torch.cat([to_uint8(_resized(tokenizer.decode(g), side)).cpu() for g in grids])
            images = images.numpy()
            write_array(path, images)
        yield torch.from_numpy(images)


def _resized(images, size):
    """Return images (B, 3, H, W) in [-1, 1] at `size` pixels a side, in the same range."""
    if not size:
        return images
    return F.interpolate(images, (size, size), mode="bicubic").clamp(-1, 1)


def samples_folder(run, protocol):
    """Return the folder in which a run's samples of a protocol are kept: its name is the hash of
    the protocol, and of how chunks are seeded.
    """
    drawn = json.dumps(protocol | {"seeds": SEEDS}, sort_keys=True)
    return run.path / "evaluation" / hashlib.sha256(drawn.encode()).hexdigest()[:12]


def own_images(source, size=0):
    """Return the Source of a run's images as a reference, at `size` pixels (0: at its own): of
    scenes as many as are asked for.
    """
    config = source.config
    size = size or config.image_size
    if config.source == "scenes":
        return Source(DataConfig("scenes", size))
    return source if size == config.image_size else Source(replace(config, image_size=size))


def read_images(source, image_size, count=None, split="all", interpolation="bicubic"):
    """Yield uint8 batches of a folder, zip, image, torchvision name or "scenes", resized and
    centre-cropped.

    A Source, which is open, may stand for all but `count` and `split`.
    """
    if not isinstance(source, Source):
        source = Source(DataConfig(str(source), image_size, interpolation=interpolation))
    images = source.split(split)
    total = len(images) if count is None else min(count, len(images))
    for start in range(0, total, BATCH):
        yield torch.from_numpy(images.images(np.arange(start, min(start + BATCH, total))))


def is_npz(source):
    """Tell a .npz from what else images lie in; raises UserError for a .npy."""
    if isinstance(source, Source):
        return False
    path = Path(source).expanduser()
    if path.suffix.lower() == ".npy" and not path.is_dir():
        raise _one_array(source)
    return path.suffix.lower() == ".npz" and not path.is_dir()


def _one_array(source):
    return UserError(
        f"'{source}' cannot be read as .npz: a .npy holds one array. Save images as "
        "numpy.savez(PATH, images), statistics as "
        f"numpy.savez(PATH, mu=mean, sigma=covariance), or give a folder of images."
    )


def read_npz(path):
    """Return the arrays of a .npz as {name: array}; raises UserError for what is none, or cut
    short. No pickle is read.
    """
    try:
        content = np.load(Path(path).expanduser(), allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise _one_array(path)
        with content as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.") from None
    except UserError:
        raise
    except (
        Exception
    ) as error:  # headers are read as Python's literals, by its tokenizer: many types
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{path}' cannot be read as .npz ({why}): it is cut short, or another file."
        ) from None


def npz_images(path, arrays=None):
    """Yield uint8 batches of `arr_0` (N, H, W, 3) in a .npz, ADM's format; raises UserError for
    another kind.
    """
    arrays = read_npz(path) if arrays is None else arrays
    if "arr_0" not in arrays:
        raise UserError(
            f"'{path}' has no arr_0, which holds the images: it has "
            f"{', '.join(arrays) or 'nothing'}."
        )
    images = arrays["arr_0"]
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise UserError(
            f"arr_0 of '{path}' is {images.shape} {images.dtype}: uint8 (N, H, W, 3) in [0, 255] "
            "is expected."
        )
    for start in range(0, len(images), BATCH):
        yield torch.from_numpy(images[start : start + BATCH])


def write_npz(path, batches, count):
    """Write `count` uint8 images, batch by batch, as `arr_0` (N, H, W, 3) of a .npz that the ADM
    evaluator reads.
    """
    with (
        zipfile.ZipFile(path, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        for i, images in enumerate(batches):
            if i == 0:
                header = {
                    "descr": "|u1",
                    "fortran_order": False,
                    "shape": (count, *images.shape[1:]),
                }
                np.lib.format.write_array_header_1_0(file, header)
            file.write(images.contiguous().numpy().tobytes())


def open_images(source, image_size, count=None, split="all", interpolation="bicubic"):
    """Yield uint8 batches of a .npz or of what `read_images` takes, `count` images at most."""
    if not is_npz(source):
        yield from read_images(source, image_size, count, split, interpolation)
        return
    left = count
    for images in npz_images(source):
        yield images if left is None else images[:left]
        left = left if left is None else left - len(images)
        if left is not None and left <= 0:
            return


def _statistics(source, arrays, names):
    """Return the mean and the covariance that a file calls `names`, in float64."""
    pair = [arrays[name] for name in names]
    with given_by(f"{' and '.join(names)} of '{source}'"):
        if kinds := [str(a.dtype) for a in pair if a.dtype.kind not in "fiu"]:
            raise UserError(f"arrays of {', '.join(kinds)}: numbers are expected.")
        return check_statistics(*pair)


def _embedded(source, arrays, name, device):
    """Return the FeatureSet of the features (N, D) that a file brings under `name`."""
    rows = torch.as_tensor(arrays[name])
    if rows.ndim != 2 or not rows.is_floating_point():
        raise UserError(
            f"{name} of '{source}' is {tuple(rows.shape)} {rows.dtype}: float rows (N, D) are "
            "expected."
        )
    with given_by(f"{name} of '{source}'"):
        moments = Moments(rows.shape[1]).update(rows.float())
    features = FeatureSet(Path(source).name, "", len(rows), rows=rows.float().to(device))
    if len(rows) > 1:
        features.moments["pool"] = moments.mean, moments.covariance
    return features


def reference(
    source, network, image_size, count=None, split="all", device="cpu", interpolation="bicubic"
):
    """Return the FeatureSet of a reference: an ADM or GPIC .npz of statistics and images, or
    images.

    Statistics in a file stand as they are (ADM's are of the whole training set); its features
    (GPIC's), or its images, serve the metrics from neighbours. Raises UserError for a file that has
    neither, and for statistics that are none.
    """
    if not is_npz(source):
        batches = read_images(source, image_size, count, split, interpolation)
        return extract(
            source.config.source if isinstance(source, Source) else str(source),
            batches,
            network,
            device,
        )
    arrays = read_npz(source)
    names = STATISTICS.get(network.name, {})
    found = {
        kind: _statistics(source, arrays, pair)
        for kind, pair in names.items()
        if set(pair) <= arrays.keys()
    }
    embeddings = EMBEDDINGS.get(network.name)
    if embeddings in arrays:
        features = _embedded(source, arrays, embeddings, device)
    elif "arr_0" in arrays:
        features = extract(Path(source).name, npz_images(source, arrays), network, device)
    elif found:
        features = FeatureSet(Path(source).name, "", 0, {})
    else:
        wanted = (
            ", ".join(n for pair in names.values() for n in pair)
            or "statistics of this feature network"
        )
        raise UserError(
            f"'{source}' has neither images (arr_0) nor {wanted}: it has "
            f"{', '.join(arrays) or 'nothing'}."
        )
    features.moments |= found
    features.given = tuple(found)
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    features.pixels = digest.hexdigest()[:12]
    return features
