"""How far the alignments of Table 4 and Fig. 5 hang on what the paper leaves open: one choice
changed at a time.
"""

import pandas as pd

from gear.analysis.features import generator_features, tokenizer_features
from gear.analysis.profiles import CHOICES, COLUMNS, alignments, check_observed, observed
from gear.checkpoints import load_generator, load_tokenizer
from gear.config import UserError
from gear.device import open_device

ONLY = {"k": "cknna", "estimator": "cka"}  # the metric that a choice bears on, where it is not both


def generator_sensitivity(run, images=1_000, k=10, device="auto"):
    """Align a generator's tap and last layer with its teacher under other choices: a table of the
    run, cached with it.

    Columns: choice, setting, then those of `layer_profile` (levels image, patch, content), `layer`
    "tap" or "last". The base is `layer_profile`'s: `images`, `k` and the first of each of
    `CHOICES`. One choice at a time is changed: images to an eighth, a quarter, half and twice as
    many (of the validation images, from the first on), k to half, twice and four times as many
    where an image has more tokens, and each of `CHOICES`. A choice's lines hold its base too, and
    only the metrics that it bears on. `device` is what computes, see `open_device`. Raises
    UserError where there are not twice as many images, or an eighth is fewer than two.
    """
    return run.table(
        "generator_sensitivity",
        {"images": images, "k": k},
        lambda: _of_generator(run, images, k, device),
    )


def tokenizer_sensitivity(run, images=1_000, k=10, device="auto"):
    """The same of a tokenizer's features, `layer` "pre" or "post" quantisation, for which there is
    no choice of pairing.
    """
    return run.table(
        "tokenizer_sensitivity",
        {"images": images, "k": k},
        lambda: _of_tokenizer(run, images, k, device),
    )


def _of_generator(run, images, k, device):
    device = open_device(device)
    pictures, labels, target = _twice(run, images, k, device)
    generator, tokenizer = (load(run.name).to(device) for load in (load_generator, load_tokenizer))
    layers = {"tap": generator.config.tap_layer, "last": generator.config.layers}
    hidden = generator_features(
        generator, tokenizer, pictures, labels, sorted(set(layers.values()))
    )
    return sensitivity_table(
        {name: hidden[layer] for name, layer in layers.items()}, target, images, k, CHOICES, device
    )


def _of_tokenizer(run, images, k, device):
    device = open_device(device)
    pictures, _, target = _twice(run, images, k, device)
    choices = {name: values for name, values in CHOICES.items() if name != "pairing"}
    features = tokenizer_features(load_tokenizer(run.name).to(device), pictures)
    return sensitivity_table(features, target, images, k, choices, device)


def _twice(run, images, k, device):
    """Return twice as many validation images as asked for, as `observed` does: UserError if there
    are not as many.
    """
    check_observed(run, images, k, least=16)
    seen = observed(run, "val", 2 * images, device)
    if len(seen[0]) < 2 * images:
        raise UserError(
            f"'{run.name}' has {len(seen[0])} validation images, not 2 x {images}: -p images "
            f"{len(seen[0]) // 2}."
        )
    return seen


def sensitivity_table(features, target, images, k, choices, device="cpu"):
    """Compare {layer: rows (2 images, L, D)} with the teacher's rows (2 images, L, C): see
    `generator_sensitivity`.
    """
    base = {"images": images, "k": k} | {name: values[0] for name, values in choices.items()}
    # with one token left out
    neighbours = [n for n in (k // 2, k, 2 * k, 4 * k) if 0 < n < target.shape[1] - 1]
    settings = {
        "images": [images // 8, images // 4, images // 2, images, 2 * images],
        "k": neighbours,
    } | choices
    table, target = [], target.to(device)
    for layer, rows in features.items():
        rows = rows.to(device)
        known = _aligned(rows, target, **base)
        for choice, values in settings.items():
            for value in values:
                found = (
                    known
                    if value == base[choice]
                    else _aligned(rows, target, **base | {choice: value})
                )
                table += [
                    (choice, str(value), layer, *row)
                    for row in found
                    if ONLY.get(choice, row[0]) == row[0]
                ]
    return pd.DataFrame(table, columns=["choice", "setting", *COLUMNS])


def _aligned(rows, target, images, k, **choices):
    return alignments(rows[:images], target[:images], k, **choices)
