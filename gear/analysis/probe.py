"""Any checkpoint on any images: what its tokens are like, and how much of a teacher is in them.
`probe.ipynb` draws it.
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

# images seen at once: at 256 px a public tokenizer takes 0.4 GB for each, its (L, K) affinity
# included
FEW = 4
POINTS = 101  # of a curve


@dataclass(frozen=True)
class Subject:
    """What is looked at, with the name, step and hash that a figure's provenance has of it."""

    name: str
    step: int | None  # None: the file does not say
    config_hash: str  # of a run's configuration, or of a file's bytes (SHA-256): 12 hex digits
    trained_on: str | None  # the image source of a run
    tokenizer: Tokenizer
    generator: Generator | None = None

    @property
    def stride(self):
        return self.tokenizer.config.downsampling

    def condition(self, source, labels):
        """Return the classes (N,) of images if the generator was trained on their `source`, else
        "no class" for each.
        """
        no_class = self.generator.condition.no_class
        own = (
            self.trained_on == data.absolute(data.DataConfig(source)).source
            and int(labels.max()) < no_class
        )
        return labels if own else torch.full_like(labels, no_class)


def open_tokenizers(*sources):
    """Open tokenizers by a run's name or a checkpoint file: a Subject for each source but "".

    Raises UserError as `load_tokenizer` does, and where two have one name: a figure could not tell
    them apart.
    """
    subjects = [
        _subject(source, open_checkpoint(source), load_tokenizer(source))
        for source in sources
        if source
    ]
    if len({subject.name for subject in subjects}) < len(subjects):
        raise UserError(
            f"two checkpoints are called '{subjects[0].name}': give a file another name, or leave "
            "one out."
        )
    return subjects


def open_generator(source, tokenizer):
    """Open a generator with the tokenizer beside it, or, where its checkpoint holds none, with
    `tokenizer`: a Subject.

    Raises UserError as `load_generator` does, and for a generator of captions or of another number
    of codes.
    """
    checkpoint, generator = open_checkpoint(source), load_generator(source)
    if generator.config.text_slots:
        raise UserError(
            f"'{source}' is conditioned on captions, which images do not have: give a generator of "
            "classes, or ''."
        )
    tokenizer = (
        load_tokenizer(source)
        if {"tokenizer", "tokenizer_ema"} & checkpoint.parts.keys()
        else tokenizer
    )
    if (known := generator.codebook_size) != (there := tokenizer.config.codebook_size):
        raise UserError(
            f"the generator '{source}' knows {known} codes, {tokenizer.source} has {there}: give "
            "the one it reads."
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
    """Return the first `count` images of a DataConfig's source, all splits, and their classes;
    UserError for fewer than 2.
    """
    check_value("count", count, Samples)
    images, labels = data.load(config, "all", count)
    if len(images) < 2:
        raise UserError(
            f"{len(images)} images of '{config.source}' are too few: take 2 at least, better 100."
        )
    return images, labels


@contextlib.contextmanager
def on_device(device, *networks):
    """Have networks on a device for as long as the block lasts: who opened them goes on with them
    on the CPU.
    """
    try:
        yield [network.to(device) for network in networks]
    finally:
        for network in networks:
            network.to("cpu")


def teacher_targets(name, config, images, strides, k, device="auto"):
    """Return {stride: the teacher's features (N, L, C) on the grid of that stride}, each None where
    `name` is "".

    `device` is what computes, here and below: see `open_device`. Raises UserError where the
    teacher's grid is not the tokens', or tokens cannot be cut, or have no k neighbours.
    """
    targets, size = dict.fromkeys(sorted(set(strides))), config.image_size
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
    """Tokenize images (N, 3, H, W), a few at a time; return indices (N, h, w) and a table of
    `COLUMNS` and x.

    Levels: "image" psnr (dB), l1 ([0, 1] units); "codes" usage_entropy, _size, _dead; "rank" the
    mass of the x most used codes; "token" the entropy in nats of softmax(A_i / tau), and at 1:
    assignment_tau, _one, with its "quantile" x; then the features before and after quantisation as
    in `tokenizer_profile`, against the teacher's (None: their maps alone).
    """
    check_value("tau", tau, Tau)
    device = open_device(device)
    quantizer, grid, parts = (
        tokenizer.quantizer,
        [side // tokenizer.config.downsampling for side in images.shape[-2:]],
        [],
    )
    with on_device(device, tokenizer):
        for x in images.split(FEW):
            x = x.to(device)
            features = tokenizer_features(tokenizer, x)
            z = features["pre"].mT.unflatten(2, grid)  # (B, L, D) -> (B, D, h, w)
            indices, affinity = quantizer.indices(z).unflatten(1, grid), quantizer.affinity(z)
            entropy = [codes.row_entropies(affinity.dense, t) for t in (tau, 1.0)]  # (B, L)
            decoded = tokenizer.decode(indices)
            measured = (indices, *features.values(), psnr(decoded, x), l1(decoded, x), *entropy)
            parts.append([values.cpu() for values in measured])
    indices, pre, post, *measured = (torch.cat(part) for part in zip(*parts))
    rows = _usage_rows(codes.usage(indices, tokenizer.config.codebook_size))
    for metric, values in zip(("psnr", "l1", "assignment_tau", "assignment_one"), measured):
        level = "image" if values.ndim == 1 else "token"
        values, row = values.flatten().double(), dict(metric=metric, n=values.numel())
        rows.append(row | dict(level=level, value=float(values.mean()), spread=float(values.std())))
        for share in np.linspace(0, 1, POINTS) if level == "token" else ():
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
        for m in np.unique(np.geomspace(1, len(usage.top_mass), POINTS).round())
    }
    rows = [
        dict(metric=name, level="codes", value=value, n=usage.n) for name, value in values.items()
    ]
    return rows + [
        dict(metric="usage_mass", level="rank", x=m, value=v, n=usage.n) for m, v in curve.items()
    ]


def probe_generator(subject, images, condition, target, k, device="auto"):
    """Return layers 0, tap, middle and last of a generator against the teacher's features (None:
    maps alone): a `profile`.
    """
    config, few = subject.generator.config, zip(images.split(FEW), condition.split(FEW))
    layers = sorted({0, config.tap_layer, config.layers // 2, config.layers})
    device = open_device(device)
    with on_device(device, subject.generator, subject.tokenizer):
        parts = [
            generator_features(subject.generator, subject.tokenizer, x, y, layers) for x, y in few
        ]
    return profile(
        {layer: torch.cat([part[layer] for part in parts]) for layer in layers}, target, k, device
    )
