"""The images of an evaluation: samples of a run, samples of a file, or a reference. All are uint8
(N, H, W, 3).
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

# samples per chunk; it is fixed, so that samples do not depend on when a call was interrupted
CHUNKS = {"cpu": 64, "cuda": 256}
# settings of drawing that a protocol does not state
DEFAULT_DRAWING = {"dtype": "float32", "chunk": CHUNKS["cpu"]}
SEEDS = 2  # version of the seeding of chunks; chunks of an earlier version are not used
STATISTICS = {  # arrays of a reference file per feature network: {kind: (mean, covariance)}
    "inception": {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")},
    "dinov2-l": {"pool": ("dino_mu", "dino_sigma")},
}
EMBEDDINGS = {"dinov2-l": "dino_embeddings"}  # array of features of a reference file


def balanced_labels(count, classes, seed):
    """Return `count` labels (N,) int64 in an order that depends on the seed.

    All classes have the same number of labels, or differ by one where `classes` does not divide
    `count`.
    """
    return torch.from_numpy(np.random.default_rng(seed).permutation(np.arange(count) % classes))


def drawing_protocol(generator):
    """Return the protocol fields of `draw_samples` on a generator's device: "dtype" and "chunk",
    each only where it differs from DEFAULT_DRAWING.
    """
    dtype = str(sampling_dtype(generator)).removeprefix("torch.")
    settings = {"dtype": dtype, "chunk": CHUNKS[generator.embedding.device.type]}
    return {key: value for key, value in settings.items() if value != DEFAULT_DRAWING[key]}


def padded_chunks(labels, size):
    """Split labels (N,) into chunks of `size`, or of N if that is smaller.

    The last chunk is padded with the first labels, so that all chunks have the same size.
    """
    size = min(size, len(labels))
    return torch.cat([labels, labels[: -len(labels) % size]]).split(size)


def draw_samples(folder, generator, tokenizer, labels, seed, quiet=False, side=0, **sampling):
    """Yield samples for labels (N,) in uint8 chunks (n, H, W, 3): n is 64, on a GPU 256, or less in
    the last chunk. `sampling` are keywords of `generate`.

    Each chunk is kept in `folder` as soon as it is drawn. With a `side` other than 0, samples are
    resized to `side` pixels before they are rounded, bicubic as in the public code. Chunk i depends
    only on its labels and (seed, i), so a call continues an interrupted one and yields the same
    samples. A kept chunk that is damaged or has no hash is drawn again.
    """
    device = generator.embedding.device
    size = CHUNKS[device.type]
    chunks = labels.split(size)
    # on a GPU, chunks of one size share one CUDA graph
    conditions = padded_chunks(labels, size) if device.type == "cuda" else chunks
    for i, chunk in enumerate(
        tqdm(chunks, desc="samples", unit=" chunks", disable=quiet, mininterval=2.0)
    ):
        path = folder / f"{i:05d}.npy"
        images = read_array(path)
        if images is None or len(images) != len(chunk):
            indices = generate(generator, conditions[i], seed=derived_seed(seed, i), **sampling)
            indices = indices[: len(chunk)]
            grids = indices.split(
                images_at_once(device, indices[0].numel() * tokenizer.config.downsampling**2)
            )
            images = torch.cat([to_uint8(_resized(tokenizer.decode(g), side)).cpu() for g in grids])
            images = images.numpy()
            write_array(path, images)
        yield torch.from_numpy(images)


def _resized(images, size):
    """Resize images (B, 3, H, W) in [-1, 1] to `size` x `size` pixels; 0 keeps their size."""
    if not size:
        return images
    return F.interpolate(images, (size, size), mode="bicubic").clamp(-1, 1)


def samples_folder(run, protocol):
    """Return the folder that keeps a run's samples of a protocol.

    Its name is a hash of the protocol and of the version of the seeding of chunks.
    """
    text = json.dumps(protocol | {"seeds": SEEDS}, sort_keys=True)
    return run.path / "evaluation" / hashlib.sha256(text.encode()).hexdigest()[:12]


def reference_source(source, size=0):
    """Return the Source of a run's images for use as a reference, at `size` pixels (0: its size).

    For scenes, which are generated, it has as many images as are requested, even if the run was
    trained on fewer.
    """
    config = source.config
    size = size or config.image_size
    if config.source == "scenes":
        return Source(DataConfig("scenes", size))
    return source if size == config.image_size else Source(replace(config, image_size=size))


def read_images(source, image_size, count=None, split="all", interpolation="bicubic"):
    """Yield uint8 batches of a folder, zip, image, torchvision name or "scenes", resized and
    centre-cropped.

    `source` may also be an open Source; `image_size` and `interpolation` are then those of the
    Source. At most `count` images of `split` are read, all if it is None.
    """
    if not isinstance(source, Source):
        source = Source(DataConfig(str(source), image_size, interpolation=interpolation))
    images = source.split(split)
    total = len(images) if count is None else min(count, len(images))
    for start in range(0, total, BATCH):
        yield torch.from_numpy(images.images(np.arange(start, min(start + BATCH, total))))


def is_npz(source):
    """Return whether a source is a .npz file; raise UserError for a .npy file."""
    if isinstance(source, Source):
        return False
    path = Path(source).expanduser()
    if path.suffix.lower() == ".npy" and not path.is_dir():
        raise _npy_error(source)
    return path.suffix.lower() == ".npz" and not path.is_dir()


def _npy_error(source):
    return UserError(
        f"'{source}' cannot be read as .npz: a .npy holds one array. Save images as "
        "numpy.savez(PATH, images), statistics as "
        f"numpy.savez(PATH, mu=mean, sigma=covariance), or give a folder of images."
    )


def read_npz(path):
    """Return the arrays of a .npz file as {name: array}; pickled objects are not read.

    Raises UserError for a missing file, and for one that is no .npz file or is cut short.
    """
    try:
        content = np.load(Path(path).expanduser(), allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise _npy_error(path)
        with content as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.") from None
    except UserError:
        raise
    # NumPy parses headers as Python literals, which can raise errors of many types
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{path}' cannot be read as .npz ({reason}): it may be cut short, or of "
            "another format."
        ) from None


def npz_images(path, arrays=None):
    """Yield uint8 batches of `arr_0` (N, H, W, 3) in a .npz file, the format of ADM.

    Raises UserError where the array is missing or has another shape or type.
    """
    arrays = read_npz(path) if arrays is None else arrays
    if "arr_0" not in arrays:
        raise UserError(
            f"'{path}' has no arr_0, the array of the images: it has "
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
    """Write `count` uint8 images, batch by batch, as `arr_0` (N, H, W, 3) of a .npz file in the
    format of the ADM evaluator.
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
    """Yield uint8 batches of a .npz file, or of a source that `read_images` takes.

    At most `count` images are read, all if it is None.
    """
    if not is_npz(source):
        yield from read_images(source, image_size, count, split, interpolation)
        return
    num_left = count
    for images in npz_images(source):
        yield images if num_left is None else images[:num_left]
        num_left = None if num_left is None else num_left - len(images)
        if num_left is not None and num_left <= 0:
            return


def _statistics(source, arrays, names):
    """Return the mean and the covariance of a file, its arrays `names`, in float64."""
    pair = [arrays[name] for name in names]
    with given_by(f"{' and '.join(names)} of '{source}'"):
        if wrong_dtypes := [str(a.dtype) for a in pair if a.dtype.kind not in "fiu"]:
            raise UserError(f"arrays of {', '.join(wrong_dtypes)}: numbers are expected.")
        return check_statistics(*pair)


def _embedded(source, arrays, name, device):
    """Return the FeatureSet of the features (N, D) in the array `name` of a file."""
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
    """Return the FeatureSet of a reference: images, or a .npz file of ADM or GPIC.

    Statistics in a file are used as they are (ADM's are of the full training set). The features
    in a file (GPIC's), or else its images, are used for the metrics from neighbours. Raises
    UserError for a file without statistics, features and images, and for invalid statistics.
    """
    if not is_npz(source):
        batches = read_images(source, image_size, count, split, interpolation)
        name = source.config.source if isinstance(source, Source) else str(source)
        return extract(name, batches, network, device)
    arrays = read_npz(source)
    names = STATISTICS.get(network.name, {})
    statistics = {
        kind: _statistics(source, arrays, pair)
        for kind, pair in names.items()
        if set(pair) <= arrays.keys()
    }
    embeddings = EMBEDDINGS.get(network.name)
    if embeddings in arrays:
        features = _embedded(source, arrays, embeddings, device)
    elif "arr_0" in arrays:
        features = extract(Path(source).name, npz_images(source, arrays), network, device)
    elif statistics:
        features = FeatureSet(Path(source).name, "", 0, {})
    else:
        expected = (
            ", ".join(name for pair in names.values() for name in pair)
            or "statistics of this feature network"
        )
        raise UserError(
            f"'{source}' has neither images (arr_0) nor {expected}: it has "
            f"{', '.join(arrays) or 'nothing'}."
        )
    features.moments |= statistics
    features.file_moments = tuple(statistics)
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    features.digest = digest.hexdigest()[:12]
    return features
