"""Linear probes: what can be read by a linear map from the tokenizer's features before and after
quantisation, and from each layer of the generator.

An alignment says that two networks order images alike; a probe says which factor of an image a
layer states (Alain and Bengio 2016). A probe that does no better than the most frequent value has
read nothing.
"""

from typing import Annotated

import numpy as np
import pandas as pd
import torch

from gear.analysis.features import generator_features, tokenizer_features
from gear.checkpoints import load_generator, load_tokenizer
from gear.config import MOST, Range, check_value
from gear.data import load, open_trained
from gear.data.scenes import FACTORS, Scenes
from gear.device import open_device

COLUMNS = ["layer", "factor", "accuracy", "low", "high", "chance", "n"]


def probes(run, images=2_000, device="auto"):
    """Probe the tokenizer of a run and, where it has one, each layer of its generator; the table is
    kept with the run.

    Columns: layer, "pre" or "post" quantisation or the number of a generator's layer as text;
    factor; accuracy on images that the probe was not fitted to, in [0, 1], with its 95 % interval
    over images (normal), low and high; chance, the accuracy of always answering the most frequent
    value of the fitted images; and n, the number of images tested. The factor "class" is read from
    the mean token of an image. For scenes, "shape", "texture", "colour" and "ground" of each patch
    are read from its token; see `Scenes.factors`. A probe is fitted to every other one of the first
    `images` validation images and tested on those between.

    The generator reads no class, because its layers would otherwise repeat the answer. Row i of a
    layer is the position that predicts token i, as in `layer_profile`, and has not seen patch i.
    The features are computed on `device`, see `open_device`. Raises UserError for fewer than 8
    images.
    """
    check_value("images", images, Annotated[int, Range(8, MOST)])
    return run.table(
        "probes", {"images": images}, lambda: _probes(run, images, open_device(device))
    )


def _probes(run, count, device):
    source = open_trained(run)
    images, labels = load(source, "val", count)
    tokenizer = load_tokenizer(run.name).to(device)
    features = tokenizer_features(tokenizer, images)
    if run.config["stage"] != "tokenizer":
        generator = load_generator(run.name).to(device)
        no_class = torch.full_like(labels, generator.condition.no_class)
        layers = list(range(generator.config.layers + 1))
        hidden = generator_features(generator, tokenizer, images, no_class, layers)
        features |= {str(layer): rows for layer, rows in hidden.items()}
    scenes = source.split("val")
    factors = {}
    if isinstance(scenes, Scenes):
        patches = scenes.factors(np.arange(len(images)), tokenizer.config.downsampling)
        factors = dict(
            zip(FACTORS, patches.reshape(len(images), -1, len(FACTORS)).transpose(2, 0, 1))
        )
    return probe_table(features, labels.numpy(), factors)


def probe_table(features, labels, factors):
    """Probe {layer: rows (N, L, D)} for classes (N,) and {factor: values (N, L)}; return a table
    with the columns `COLUMNS`, see `probes`.
    """
    table = []
    for layer, rows in features.items():
        rows = rows.double().numpy()
        tasks = {"class": (rows.mean(1, keepdims=True), labels[:, None])}
        tasks |= {factor: (rows, values) for factor, values in factors.items()}
        for factor, (inputs, values) in tasks.items():
            accuracy, chance = linear_probe(inputs, values)
            mean = accuracy.mean()
            half = 1.96 * accuracy.std(ddof=1) / len(accuracy) ** 0.5
            # a normal interval does not know that a share ends at 0 and 1
            low, high = np.clip([mean - half, mean + half], 0, 1)
            table.append((layer, factor, mean, low, high, chance, len(accuracy)))
    return pd.DataFrame(table, columns=COLUMNS)


def linear_probe(rows, values):
    """Fit a linear classifier to every other image and test it on those between; return the
    accuracy of each tested image (N // 2,) and that of the most frequent fitted value.

    rows: (N, L, D) float. values: (N, L) whole numbers. The classifier is ridge regression on
    indicators of the values, from channels of mean 0 and deviation 1: its solution is unique and
    in closed form, where a logistic fit would depend on when it stops.
    """
    import sklearn.linear_model

    fitted = rows[::2].reshape(-1, rows.shape[-1])
    mean = fitted.mean(0)
    deviation = fitted.std(0)
    # a channel is constant where rounding is all that moves it
    scale = np.where(deviation > 1e-9 * (1 + np.abs(mean)), deviation, np.inf)
    known, counts = np.unique(values[::2], return_counts=True)
    most_frequent = known[counts.argmax()]
    is_frequent = values[1::2] == most_frequent
    if len(known) == 1:  # the only answer that a classifier can have learnt
        return is_frequent.mean(1), float(is_frequent.mean())
    classifier = sklearn.linear_model.RidgeClassifier(alpha=1.0, solver="cholesky")
    classifier.fit((fitted - mean) / scale, values[::2].ravel())
    tested = (rows[1::2].reshape(-1, rows.shape[-1]) - mean) / scale
    answers = classifier.predict(tested).reshape(values[1::2].shape)
    return (answers == values[1::2]).mean(1), float(is_frequent.mean())
