"""Which layers of a generator are aligned with the teacher above chance: the alignments of Fig. 5
beside their permutation tests, corrected for the choice of the best layer.
"""

from functools import partial

import pandas as pd
import torch

from gear.analysis.features import generator_features
from gear.analysis.profiles import (
    NAN,
    check_observed,
    layer_profile,
    observed,
    sides_of_levels,
    table_parameters,
)
from gear.checkpoints import load_generator, load_tokenizer
from gear.config import Count, MissingRuns, check_value
from gear.device import open_device
from gear.measures.alignment import cka, cknna, image_pairs
from gear.measures.calibration import (
    DRAWS,
    calibrate_pairs,
    calibrate_values,
    permuted_values,
)

PLACE = ["layer", "metric", "level"]  # what a line of a table is about
RESULTS = ["value", "null", "p", "corrected_p", "score", "corrected_score"]  # of a Calibration
COLUMNS = PLACE + RESULTS
METRICS = ("cknna", "cka")


def layer_calibration(
    run,
    images=1_000,
    k=10,
    normalise="l2",
    estimator="unbiased",
    pairing="predicts",
    draws=DRAWS,
    device="auto",
):
    """Test each alignment of `layer_profile` against chance; the table is kept with the run.

    Columns: layer, metric, level, value, null (mean over permutations), p, corrected_p, score and
    corrected_score; see `Calibration`. Value and levels "image", "patch" and "content" are those of
    `layer_profile`. At each level `draws` permutations pair an image's features with the teacher's
    features of another image. Tokens stay with their image, so that what position alone aligns is
    part of chance. The correction is over all layers of one metric and level. An alignment that is
    undefined, because all rows are equal, is missing and does not count. Time grows with the square
    of `images`: about a minute for 1,000 of 64 tokens on one core. Raises UserError as
    `layer_profile` does, and for less than one draw.
    """
    check_value("draws", draws, Count)
    parameters, choices = table_parameters(
        images, k, normalise=normalise, estimator=estimator, pairing=pairing
    )
    return run.table(
        "layer_calibration",
        parameters | {"draws": draws},
        lambda: _layer_calibration(run, images, k, draws, open_device(device), **choices),
    )


def calibrated_profile(run, *choices):
    """Return `layer_profile` with the columns corrected_p and corrected_score of
    `layer_calibration`.

    choices: the arguments of `layer_profile`. Both columns are missing for the levels that have no
    test, and for a run that has neither the table of its tests nor the weights to make it, such as
    a record of an older version.
    """
    profile = layer_profile(run, *choices)
    added = ["corrected_p", "corrected_score"]
    try:
        tests = layer_calibration(run, *choices)
    except MissingRuns:
        return profile.assign(**dict.fromkeys(added, NAN))
    return profile.merge(tests[[*PLACE, *added]], how="left", on=PLACE)


def _layer_calibration(run, images, k, draws, device, **choices):
    check_observed(run, images, k)
    pictures, labels, target = observed(run, "val", images, device)
    tokenizer, generator = (load(run.name).to(device) for load in (load_tokenizer, load_generator))
    layers = list(range(generator.config.layers + 1))
    hidden = generator_features(generator, tokenizer, pictures, labels, layers)
    return calibration_table(hidden, target, k, draws, device, **choices)


def calibration_table(
    features,
    target,
    k,
    draws=DRAWS,
    device="cpu",
    normalise="l2",
    estimator="unbiased",
    pairing="predicts",
):
    """Test {layer: rows (N, L, D)} against the teacher's rows (N, L, C); return a table with the
    columns `COLUMNS`, see `layer_calibration`.

    One layer at a time is on `device`.
    """
    target = target.to(device)
    unbiased = estimator == "unbiased"
    rows = []
    for level in ("image", "patch", "content"):
        measured = []
        for x in features.values():
            sides = sides_of_levels(x.to(device), target, normalise, pairing)[level]
            measured.append(_measure(level, *sides, k, unbiased, draws))
        for i, metric in enumerate(METRICS):
            values = [of_layer[i] for of_layer in measured]
            if level == "image":
                results = calibrate_values(*(torch.cat(part, -1) for part in zip(*values)))
            else:
                results = calibrate_pairs(values, draws)
            rows += [
                (layer, metric, level, *(getattr(result, name) for name in RESULTS))
                for layer, result in zip(features, results)
            ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _measure(level, x, y, k, unbiased, draws):
    """Return what a test of one layer needs, once for CKNNA and once for CKA: values and null at
    the level of images, the table of all pairs of images otherwise.
    """
    if level != "image":
        pairs = image_pairs(x, y, k, unbiased)
        return [pairs.cknna, pairs.cka]
    results = []
    for metric in (partial(cknna, k=k), partial(cka, unbiased=unbiased)):
        try:
            # the same seed for every layer, so the same permutations
            results.append(permuted_values([x], y, metric, draws))
        except ValueError:  # the metric is undefined, because the rows have no variance
            missing = torch.full((1 + draws, 1), NAN, dtype=torch.float64)
            results.append((missing[0], missing[1:]))
    return results
