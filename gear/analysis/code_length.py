"""The prequential code length of a tokenizer's tokens: what they cost while a generator learns them
from nothing.

A next-token loss compares tokenizers only under generators that have converged, and a tokenizer can
lower it by saying less, or by saying everything twice. The prequential code of Dawid (1984) counts
learning as part of the price: each image is first coded with the generator learnt from the images
before it, and then learnt. One small generator, with fixed size and learning rate, serves for every
tokenizer, so that the lengths of two alphabets can be compared.
"""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from gear.checkpoints import load_tokenizer
from gear.config import require
from gear.data import Source, load, trained_on
from gear.device import open_device
from gear.generator.config import GeneratorConfig
from gear.generator.model import Generator

BATCH = 16  # images that are coded before the generator learns from them
LEARNING_RATE = 3e-3
LEARNER = dict(
    width=64, layers=3, heads=2, tap_layer=1, projector_dim=64, dropout=0.0, embed_std=0.1
)
POINTS = 20  # of the learning curve


def code_length(run, images=8_000, device="auto"):
    """Code the tokens of a run's first training images prequentially; the table is kept with the
    run.

    Columns: images, the number of images coded so far, and nats, the mean length per image of those
    after the previous line. The code length of all, in nats per image, is the mean of `nats`
    weighted by the differences of `images`; see `nats_per_image`. The generator is conditioned on
    the class. Raises UserError for fewer training images than `images`.
    """
    return run.table(
        "code_length", {"images": images}, lambda: _coded(run, images, open_device(device))
    )


def nats_per_image(table):
    """Return the mean code length of a table of `code_length`, in nats per image."""
    return float(np.average(table.nats, weights=np.diff(table.images, prepend=0)))


def _coded(run, count, device):
    source = Source(trained_on(run))
    present = len(source.split("train"))
    require(present >= count, f"images is {count}: the run has {present} training images.")
    images, labels = load(source, "train", count)
    tokenizer = load_tokenizer(run.name).to(device)
    with torch.no_grad():
        indices = torch.cat([tokenizer.encode(x.to(device)).flatten(1) for x in images.split(64)])
    lengths = prequential(
        indices,
        labels.to(device),
        tokenizer.config.codebook_size,
        len(source.split("train").classes),
    )
    ends = np.unique(np.linspace(0, len(lengths), POINTS + 1).astype(int)[1:])
    parts = np.split(lengths.numpy(), ends[:-1])
    return pd.DataFrame({"images": ends, "nats": [part.mean() for part in parts]})


def prequential(indices, labels, codebook_size, num_classes):
    """Return the length of each image's tokens in nats, (N,) float64, each under the generator
    learnt from the batches before.

    indices: (N, L), in the order in which they are coded. labels: (N,) classes.
    """
    side = round(indices.shape[1] ** 0.5)
    lengths = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GeneratorConfig(num_classes=num_classes, class_dropout=0.0, **LEARNER)
        learner = Generator(config, codebook_size, grid=(side, side)).to(indices.device)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for tokens, classes in zip(indices.split(BATCH), labels.split(BATCH)):
        losses = F.cross_entropy(
            learner(tokens, classes).transpose(1, 2), tokens, reduction="none"
        ).sum(1)
        lengths.append(losses.detach().double().cpu())
        optimizer.zero_grad()
        (losses.mean() / tokens.shape[1]).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
    return torch.cat(lengths)
