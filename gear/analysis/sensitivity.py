"""How much the alignments of Table 4 and Fig. 5 depend on choices that the paper leaves open. One
choice is changed at a time.
"""

import pandas as pd

from gear.analysis.features import generator_features, tokenizer_features
from gear.analysis.profiles import CHOICES, COLUMNS, alignments, check_observed, observed
from gear.checkpoints import load_generator, load_tokenizer
from gear.config import UserError
from gear.device import open_device

ONLY = {"k": "cknna", "estimator": "cka"}  # choices that affect one metric only, and that metric


def generator_sensitivity(run, images=1_000, k=10, device="auto"):
    """Align a generator's tap layer and last layer with its teacher under changed choices; the
    table is kept with the run.

    Columns: choice, setting, then those of `layer_profile` (levels "image", "patch", "content");
    `layer` is "tap" or "last". The base is that of `layer_profile`: `images`, `k` and the first of
    each of `CHOICES`. One choice at a time is changed: `images` to an eighth, a quarter, half and
    twice the number (always the first validation images), `k` to half, twice and four times the
    number where an image has more tokens than that, and each of `CHOICES` to its other values. The
    lines of a choice include the base, and only the metrics that the choice affects. The features
    are computed on `device`, see `open_device`. Raises UserError for fewer than 2 x `images`
    validation images, and for fewer than 16 `images`.
    """
    return run.table(
        "generator_sensitivity",
        {"images": images, "k": k},
        lambda: _of_generator(run, images, k, device),
    )


def tokenizer_sensitivity(run, images=1_000, k=10, device="auto"):
    """Align a tokenizer's features with the teacher under changed choices; the table is kept with
    the run.

    See `generator_sensitivity`; `layer` is "pre" or "post" quantisation, and "pairing" is no choice
    here.
    """
    return run.table(
        "tokenizer_sensitivity",
        {"images": images, "k": k},
        lambda: _of_tokenizer(run, images, k, device),
    )


def _of_generator(run, images, k, device):
    device = open_device(device)
    pictures, labels, target = _observe_twice(run, images, k, device)
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
    pictures, _, target = _observe_twice(run, images, k, device)
    choices = {name: values for name, values in CHOICES.items() if name != "pairing"}
    features = tokenizer_features(load_tokenizer(run.name).to(device), pictures)
    return sensitivity_table(features, target, images, k, choices, device)


def _observe_twice(run, images, k, device):
    """Return what `observed` returns for 2 x `images` validation images; raise UserError if the run
    has fewer.
    """
    check_observed(run, images, k, least=16)
    pictures, labels, target = observed(run, "val", 2 * images, device)
    if len(pictures) < 2 * images:
        raise UserError(
            f"'{run.name}' has {len(pictures)} validation images, not 2 x {images}: choose "
            f"-p images {len(pictures) // 2}."
        )
    return pictures, labels, target


def sensitivity_table(features, target, images, k, choices, device="cpu"):
    """Compare {layer: rows (2 images, L, D)} with the teacher's rows (2 images, L, C) under changed
    choices: see `generator_sensitivity`.
    """
    base = {"images": images, "k": k} | {name: values[0] for name, values in choices.items()}
    # the pairing "sees" leaves out one token
    neighbours = [n for n in (k // 2, k, 2 * k, 4 * k) if 0 < n < target.shape[1] - 1]
    settings = {
        "images": [images // 8, images // 4, images // 2, images, 2 * images],
        "k": neighbours,
    } | choices
    table = []
    target = target.to(device)
    for layer, rows in features.items():
        rows = rows.to(device)
        base_lines = _aligned(rows, target, **base)
        for choice, values in settings.items():
            for value in values:
                lines = (
                    base_lines
                    if value == base[choice]
                    else _aligned(rows, target, **base | {choice: value})
                )
                table += [
                    (choice, str(value), layer, *line)
                    for line in lines
                    if ONLY.get(choice, line[0]) == line[0]
                ]
    return pd.DataFrame(table, columns=["choice", "setting", *COLUMNS])


def _aligned(rows, target, images, k, **choices):
    return alignments(rows[:images], target[:images], k, **choices)
