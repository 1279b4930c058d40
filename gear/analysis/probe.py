"""The probe: describe the tokens of any checkpoint on any images, and compare its features with a
teacher's. The notebook `probe` draws the result.
"""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from gear import data
from gear.analysis.features import generator_features, teacher_features, tokenizer_features
from gear.analysis.profiles import COLUMNS, check_neighbours, profile, tokenizer_table
from gear.checkpoints import load_generator, load_tokenizer, open_checkpoint
from gear.config import Samples, Tau, UserError, check_value
from gear.data.trained import place_of
from gear.device import open_device
from gear.generator.model import Generator
from gear.images import check_divides
from gear.measures import codes
from gear.measures.reconstruction import l1, psnr
from gear.runs.run import Run
from gear.teachers import check_grid, load_teacher
from gear.tokenizer.model import Tokenizer

# images per batch: at 256 px a public tokenizer needs 0.4 GB per image, affinity (L, K) included
BATCH = 4
CURVE_POINTS = 101


@dataclass(frozen=True)
class Subject:
    """A checkpoint to probe, with the name, step and hash that a figure's provenance records."""

    name: str
    step: int | None  # None where the file does not state its step
    config_hash: str  # 12 hex digits: a run's configuration hash, or the SHA-256 of a file's bytes
    trained_on: str | None  # the image source of a run; None for a file
    tokenizer: Tokenizer
    generator: Generator | None = None

    @property
    def stride(self):
        return self.tokenizer.config.downsampling

    def condition(self, source, labels):
        """Return the conditions (N,) for images of `source`: their labels if the generator was
        trained on that source, and "no class" for each image otherwise.
        """
        no_class = self.generator.condition.no_class
        is_training_source = self.trained_on == data.absolute(data.DataConfig(source)).source
        has_known_labels = int(labels.max()) < no_class
        if is_training_source and has_known_labels:
            return labels
        return torch.full_like(labels, no_class)


def open_tokenizers(*sources):
    """Open tokenizers, each by a run's name or a checkpoint file; return one Subject per source.

    An empty source "" is skipped. Raises UserError as `load_tokenizer` does, and where two
    checkpoints have the same name, because a figure could not tell them apart.
    """
    subjects = [
        _subject(source, open_checkpoint(source), load_tokenizer(source))
        for source in sources
        if source
    ]
    if len({subject.name for subject in subjects}) < len(subjects):
        raise UserError(
            f"two checkpoints are called '{subjects[0].name}': rename one of the files, or leave "
            "one out."
        )
    return subjects


def open_generator(source, tokenizer):
    """Open a generator together with the tokenizer in its checkpoint; return a Subject.

    `tokenizer` is used where the checkpoint holds none. Raises UserError as `load_generator` does,
    for a generator that is conditioned on captions, and for a codebook of another size.
    """
    checkpoint = open_checkpoint(source)
    generator = load_generator(source)
    if generator.config.text_slots:
        raise UserError(
            f"'{source}' is conditioned on captions, which images do not have: give a generator of "
            "classes, or '' for none."
        )
    tokenizer = (
        load_tokenizer(source)
        if {"tokenizer", "tokenizer_ema"} & checkpoint.parts.keys()
        else tokenizer
    )
    codebook_size = tokenizer.config.codebook_size
    if generator.codebook_size != codebook_size:
        raise UserError(
            f"the generator '{source}' knows {generator.codebook_size} codes, but "
            f"{tokenizer.source} has {codebook_size}: give the tokenizer it was trained with."
        )
    return _subject(source, checkpoint, tokenizer, generator)


def _subject(source, checkpoint, *networks):
    if checkpoint.container == "run":
        run = Run.open(checkpoint.source)
        return Subject(run.name, checkpoint.step, run.config_hash, place_of(run), *networks)
    with open(Path(source).expanduser(), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return Subject(checkpoint.source, checkpoint.step, digest, None, *networks)


def load_images(config, count):
    """Return the first `count` images (N, 3, H, W) of a DataConfig's source and their labels (N,).

    All splits are read. Raises UserError for fewer than 2 images.
    """
    check_value("count", count, Samples)
    images, labels = data.load(config, "all", count)
    if len(images) < 2:
        raise UserError(
            f"'{config.source}' has {len(images)} images: at least 2 are needed, 100 are better."
        )
    return images, labels


@contextlib.contextmanager
def on_device(device, *networks):
    """Move networks to a device for the duration of a `with` block, and back to the CPU after it.

    The caller's images are on the CPU, so the networks have to return there.
    """
    try:
        yield [network.to(device) for network in networks]
    finally:
        for network in networks:
            network.to("cpu")


def teacher_targets(name, config, images, strides, k, device="auto"):
    """Return {stride: the teacher's features (N, L, C) on the token grid of that stride}.

    Each value is None where `name` is "". The features are computed on `device`, see `open_device`.
    Raises UserError where the teacher's grid differs from the tokens' grid, where the image size is
    not divisible by a stride, and where an image has too few tokens for k neighbours.
    """
    size = config.image_size
    targets = dict.fromkeys(sorted(set(strides)))
    for stride in targets:
        check_divides((size, size), stride)
        check_neighbours(k, (size // stride) ** 2)
        if name:
            teacher = load_teacher(name, config, stride)
            check_grid(teacher, size, stride)
            targets[stride] = teacher_features(teacher.to(open_device(device)), images)
    return targets


@torch.no_grad()
def probe_tokenizer(tokenizer, images, tau, target, k, device="auto"):
    """Tokenize images (N, 3, H, W) batch by batch; return indices (N, h, w) and a table.

    The table has the columns `COLUMNS` and x. Its levels and metrics are:
      "image"    psnr (dB) and l1 (in [0, 1] units);
      "codes"    usage_entropy, usage_size and usage_dead;
      "rank"     usage_mass, the share of tokens that the x most used codes have;
      "token"    assignment_tau and assignment_one, the entropy in nats of softmax(A_i / tau) at
                 `tau` and at 1;
      "quantile" the x-quantile of these entropies over tokens.
    Rows of `tokenizer_profile` follow: the features before and after quantisation are compared
    with the teacher's features `target`, or, where it is None, only their maps are described.
    """
    check_value("tau", tau, Tau)
    device = open_device(device)
    quantizer = tokenizer.quantizer
    grid = [side // tokenizer.config.downsampling for side in images.shape[-2:]]
    parts = []
    with on_device(device, tokenizer):
        for x in images.split(BATCH):
            x = x.to(device)
            features = tokenizer_features(tokenizer, x)
            z = features["pre"].mT.unflatten(2, grid)  # (B, L, D) -> (B, D, h, w)
            indices = quantizer.indices(z).unflatten(1, grid)
            affinity = quantizer.affinity(z)
            entropy = [codes.row_entropies(affinity.dense, t) for t in (tau, 1.0)]  # (B, L)
            decoded = tokenizer.decode(indices)
            measured = (indices, *features.values(), psnr(decoded, x), l1(decoded, x), *entropy)
            parts.append([values.cpu() for values in measured])
    indices, pre, post, *measured = (torch.cat(part) for part in zip(*parts))
    rows = _usage_rows(codes.usage(indices, tokenizer.config.codebook_size))
    for metric, values in zip(("psnr", "l1", "assignment_tau", "assignment_one"), measured):
        level = "image" if values.ndim == 1 else "token"
        values = values.flatten().double()
        row = dict(metric=metric, n=values.numel())
        rows.append(row | dict(level=level, value=float(values.mean()), spread=float(values.std())))
        for share in np.linspace(0, 1, CURVE_POINTS) if level == "token" else ():
            rows.append(
                row | dict(level="quantile", x=share, value=float(np.quantile(values, share)))
            )
    table = pd.DataFrame(rows, columns=[*COLUMNS, "x"])
    return indices, pd.concat(
        [table, tokenizer_table({"pre": pre, "post": post}, target, k, device)], ignore_index=True
    )


def _usage_rows(usage):
    values = {
        "usage_entropy": usage.entropy,
        "usage_size": usage.effective_size,
        "usage_dead": float(usage.dead),
    }
    curve = {
        m: float(usage.top_mass[int(m) - 1])
        for m in np.unique(np.geomspace(1, len(usage.top_mass), CURVE_POINTS).round())
    }
    rows = [
        dict(metric=name, level="codes", value=value, n=usage.n) for name, value in values.items()
    ]
    return rows + [
        dict(metric="usage_mass", level="rank", x=m, value=v, n=usage.n) for m, v in curve.items()
    ]


def probe_generator(subject, images, condition, target, k, device="auto"):
    """Compare four layers of a generator with the teacher's features: return a `profile` table.

    The layers are 0, the tap layer, the middle and the last one. With a `target` of None, only
    their maps are described.
    """
    config = subject.generator.config
    batches = zip(images.split(BATCH), condition.split(BATCH))
    layers = sorted({0, config.tap_layer, config.layers // 2, config.layers})
    device = open_device(device)
    with on_device(device, subject.generator, subject.tokenizer):
        parts = [
            generator_features(subject.generator, subject.tokenizer, x, y, layers)
            for x, y in batches
        ]
    return profile(
        {layer: torch.cat([part[layer] for part in parts]) for layer in layers}, target, k, device
    )
