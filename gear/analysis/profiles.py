"""Analyses of a run as tables. A table is read from runs/NAME/analysis if one with the same
parameters is kept there, and computed from the weights otherwise.
"""

from functools import partial
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from gear import data
from gear.analysis.features import generator_features, teacher_features, to_grid, tokenizer_features
from gear.checkpoints import load_generator, load_tokenizer
from gear.config import MOST, Count, Range, UserError, check_value, from_dict, given_by, nearest
from gear.device import open_device
from gear.images import to_float
from gear.measures.alignment import Null, cka, cknna, l2_normalise, null, tie_fraction, within_image
from gear.measures.paired import effect
from gear.measures.spatial import high_frequency_ratio, morans_i
from gear.measures.speedup import speedup
from gear.teachers import load_teachers
from gear.tokenizer.config import TokenizerConfig, token_grid

FOLDS = 5
BATCH = 128  # images whose features are in memory at once
LEAST_IMAGES = 4_000  # the least number of training images for the floors of an alignment loss
NAN = float("nan")
# choices that the paper leaves open about Table 4 and Fig. 5; the first of each is the default
CHOICES = {
    # rows of unit length, rows as they are, or each channel with mean 0 and deviation 1
    "normalise": ("l2", "none", "standard"),
    "estimator": ("unbiased", "biased"),  # of CKA; the reference code of CKNNA has only one
    # patch i is paired with the generator's position that predicts token i, or that reads it
    "pairing": ("predicts", "sees"),
}
COLUMNS = ["layer", "metric", "level", "value", "spread", "null", "null_spread", "n"]


def layer_profile(
    run, images=1_000, k=10, normalise="l2", estimator="unbiased", pairing="predicts", device="auto"
):
    """Compare each layer of a generator run with its teacher (Fig. 5); the table is kept with the
    run.

    Columns: layer (-1 is the teacher itself), metric, level, value, spread, null, null_spread and
    n, the number of averaged items (an image whose value is undefined is left out). Levels:
      "image"   compares the mean tokens of all `images`. The spread is over five disjoint folds
                (smaller samples, so it is wider than the spread of the value itself); the null is
                20 random permutations of the images.
      "patch"   compares the tokens within each image. The spread is over images; the null compares
                mismatched images.
      "content" is "patch" after the mean of each position over all images is subtracted on both
                sides. Position alone aligns mismatched images, because a teacher's padding shows
                where a patch lies.
      "map"     describes the spatial maps of a layer, from raw rows. The spread is over images.
    Spreads are standard deviations. `normalise`, `estimator` and `pairing` are explained at
    `CHOICES`; the pairing "sees" leaves out the last patch, which no position reads. The features
    are computed on `device`, see `open_device`; a table does not record it. Raises UserError for an
    unknown choice, and for fewer tokens or images than k neighbours need.
    """
    parameters, choices = table_parameters(
        images, k, normalise=normalise, estimator=estimator, pairing=pairing
    )
    return run.table(
        "layer_profile",
        parameters,
        lambda: _layer_profile(run, images, k, open_device(device), **choices),
    )


def tokenizer_profile(run, images=1_000, k=10, normalise="l2", estimator="unbiased", device="auto"):
    """Compare a tokenizer's features with the teacher's (Table 4); the table is kept with the run.

    Columns and levels are those of `layer_profile`; `layer` is "pre" or "post" quantisation, or
    "teacher". The metric "ties" is the share of tokens whose k-th and (k + 1)-th neighbours are
    equally near: above one half, CKNNA measures little.
    """
    parameters, choices = table_parameters(images, k, normalise=normalise, estimator=estimator)
    return run.table(
        "tokenizer_profile",
        parameters,
        lambda: _tokenizer_profile(run, images, k, open_device(device), **choices),
    )


def alignment_floors(run, per_class=100, device="auto"):
    """Measure alignment losses that need no information about the image; the table is kept with the
    run.

    Columns: predictor, value. A predictor answers with the mean direction of the teacher's features
    over training images: "constant" has one mean, "position" one mean per position, and "class and
    position" one mean per class and position, shrunk toward the mean of the position (see
    `shrunk_class_means`). The means are over `per_class` images per class on average, and at least
    4,000 in all. The value is minus the mean cosine on the run's validation images. A generator
    whose loss is below the lowest of these values has learnt about the content of the image.
    """
    check_value("per_class", per_class, Count)
    return run.table(
        "alignment_floors",
        {"per_class": per_class},
        lambda: _alignment_floors(run, per_class, open_device(device)),
    )


def check_neighbours(k, tokens):
    """Raise UserError unless each of an image's `tokens` has k + 1 neighbours among the others.

    The (k + 1)-th neighbour is needed to detect ties.
    """
    with given_by(f"with {tokens} tokens an image"):
        check_value("k", k, Annotated[int, Range(1, tokens - 2)])


def check_observed(run, images, k, least=4):
    """Raise UserError unless each image and each token has k neighbours, and there are at least
    `least` images.
    """
    h, w = token_grid(run.config)
    check_neighbours(k, h * w)
    check_value("images", images, Annotated[int, Range(max(least, k + 1), MOST)])


def table_parameters(images, k, **choices):
    """Return the parameters that identify a table, and the choices.

    A choice at its default is not among the parameters, so that tables which were made before the
    choice existed are still found.
    """
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise UserError(
                f"unknown {name} '{value}'.{nearest(value, CHOICES[name])} Known: "
                f"{', '.join(CHOICES[name])}."
            )
    changed = {name: value for name, value in choices.items() if value != CHOICES[name][0]}
    return {"images": images, "k": k} | changed, choices


def _layer_profile(run, images, k, device, **choices):
    check_observed(run, images, k)
    pictures, labels, target = observed(run, "val", images, device)
    tokenizer, generator = (load(run.name).to(device) for load in (load_tokenizer, load_generator))
    layers = list(range(generator.config.layers + 1))
    hidden = generator_features(generator, tokenizer, pictures, labels, layers)
    return profile({-1: None, **hidden}, target, k, device, **choices)


def _tokenizer_profile(run, images, k, device, **choices):
    check_observed(run, images, k)
    pictures, _, target = observed(run, "val", images, device)
    return tokenizer_table(
        tokenizer_features(load_tokenizer(run.name).to(device), pictures),
        target,
        k,
        device,
        **choices,
    )


def tokenizer_table(features, target, k, device="cpu", **choices):
    """Compare `tokenizer_features` with the teacher's rows, as `tokenizer_profile` does.

    With a `target` of None, only the maps of the features are described.
    """
    ties = torch.tensor(
        [tie_fraction(rows, k) for rows in l2_normalise(features["post"].to(device))]
    )
    row = ("post", "ties", "patch", *_mean_std(ties), NAN, NAN, len(ties))
    table = profile(
        features if target is None else {"teacher": None, **features}, target, k, device, **choices
    )
    return pd.concat([table, pd.DataFrame([row], columns=COLUMNS)], ignore_index=True)


def _alignment_floors(run, per_class, device):
    images = max(LEAST_IMAGES, per_class * run.config["generator"]["num_classes"])
    sums, counts, squares = _sums_of_classes(run, images, device)
    # the mean direction is the constant answer with the largest mean cosine
    position_mean = sums.sum(0) / counts.sum()
    class_means = shrunk_class_means(sums, counts, squares)
    _, labels, target = observed(run, "val", run.config["eval_images"], device)
    answers = {
        "constant": position_mean.mean(0),
        "position": position_mean,
        "class and position": torch.stack([class_means[int(c)] for c in labels]),
    }
    losses = [
        (name, -float(F.cosine_similarity(answer.expand_as(target), target, dim=-1).mean()))
        for name, answer in answers.items()
    ]
    return pd.DataFrame(losses, columns=["predictor", "value"])


def _sums_of_classes(run, count, device):
    """Sum the teacher's unit features of a run's first `count` training images by class.

    Returns the sums (classes, L, C), the number of images per class (classes,), and the sum of all
    squares. Only one batch of features is in memory at a time.
    """
    teacher = first_teacher(run, device)
    images = data.open_trained(run).split("train")
    classes = run.config["generator"]["num_classes"]
    sums = None
    counts = torch.zeros(classes)
    squares = 0.0
    for start in range(0, min(count, len(images)), BATCH):
        positions = np.arange(start, min(start + BATCH, count, len(images)))
        pixels = to_float(torch.from_numpy(images.images(positions)))
        labels = torch.from_numpy(images.labels(positions))
        unit = F.normalize(teacher_features(teacher, pixels), dim=-1)
        sums = torch.zeros(classes, *unit.shape[1:]) if sums is None else sums
        sums.index_add_(0, labels, unit)
        counts += torch.bincount(labels, minlength=classes)
        squares += float(unit.double().square().sum())
    return sums, counts, squares


def shrunk_class_means(sums, counts, squares):
    """Return the mean of each class's rows, shrunk toward the mean of all rows (empirical Bayes).

    The input is the sums of rows per class (classes, ...), the counts (classes,), and the sum of
    all squares; the result has the shape of the sums. The mean of a class with n rows keeps the
    share b / (b + w / n) of its difference from the mean of all rows, where w is the variance of
    rows within a class and b the variance of the true class means. Few rows say little about a
    class, and their noise would hide what position alone predicts. A class without rows has the
    mean of all rows; so has every class where no class has two rows, since w is unknown then.
    """
    num_rows = float(counts.sum())
    num_classes = int((counts > 0).sum())
    shape = (-1, *[1] * (sums.ndim - 1))
    overall = sums.sum(0) / num_rows
    if num_rows == num_classes:
        return overall.expand_as(sums)
    means = sums / counts.clamp(min=1).view(shape)
    weighted = counts.double() @ means.double().square().flatten(1).sum(1)
    within = (squares - float(weighted)) / (num_rows - num_classes)
    differences = float(counts.double() @ (means - overall).double().square().flatten(1).sum(1))
    # the noise of the means alone makes them differ by the subtracted term
    between = max(0.0, (differences - within * (num_classes - 1)) / num_rows)
    shares = counts * between / (counts * between + within).clamp(min=1e-30)
    return overall + shares.view(shape) * (means - overall)


def observed(run, split, count, device="cpu"):
    """Return a split's first `count` images, their labels and the teacher's features (N, L, C).

    The teacher is the first one of the run. It computes on `device`; all three results are on the
    CPU.
    """
    source = data.open_trained(run)
    images, labels = data.load(source, split, count)
    return images, labels, teacher_features(first_teacher(run, device), images)


def first_teacher(run, device="cpu"):
    """Return the first teacher of a run, on a device."""
    config = run.config
    stride = from_dict(TokenizerConfig, config["tokenizer"]).downsampling
    return load_teachers(config["teacher"], data.trained_on(run), stride)[0].to(device)


def profile(features, target, k, device="cpu", **choices):
    """Compare {layer: rows (N, L, D)} with the teacher's rows (N, L, C); return a table with the
    columns `COLUMNS`, see `layer_profile`.

    Rows of None stand for the teacher itself, of which only the maps are described. With a `target`
    of None, only the maps of each layer are described. One layer at a time is on `device`.
    """
    table = []
    target = None if target is None else target.to(device)
    for layer, rows in features.items():
        rows = None if rows is None else rows.to(device)
        has_both_sides = rows is not None and target is not None
        comparisons = alignments(rows, target, k, **choices) if has_both_sides else []
        descriptions = _maps(target if rows is None else rows)
        table += [(layer, *row) for row in [*comparisons, *descriptions]]
    return pd.DataFrame(table, columns=COLUMNS)


def alignments(rows, target, k, normalise="l2", estimator="unbiased", pairing="predicts"):
    """Align rows (N, L, D) with the teacher's rows (N, L, C); return lines of `COLUMNS` without the
    layer, see `layer_profile`.
    """
    sides = sides_of_levels(rows, target, normalise, pairing)
    unbiased = estimator == "unbiased"
    table = _image_level(*sides.pop("image"), k, unbiased)
    for level, (x, y) in sides.items():
        table += _patch_level(level, x, y, k, unbiased)
    return table


def sides_of_levels(rows, target, normalise="l2", pairing="predicts"):
    """Return what each level compares, {level: (x, y)} in float64, of rows (N, L, D) and the
    teacher's rows (N, L, C).

    The mean tokens (N, D) and (N, C) for "image", all tokens for "patch" and "content"; see
    `layer_profile`. The pairing "sees" leaves N x (L - 1) tokens.
    """
    if pairing == "sees":  # position i + 1 reads token i; no position reads the last token
        rows = rows[:, 1:]
        target = target[:, :-1]
    both = (rows.double(), target.double())
    levels = {
        "image": [z.mean(1) for z in both],
        "patch": both,
        "content": [z - z.mean(0) for z in both],
    }
    return {level: [_normalised(z, normalise) for z in sides] for level, sides in levels.items()}


def _normalised(rows, normalise):
    """Normalise rows (.., D) as `CHOICES` describes it.

    Means and deviations of channels are over all rows. A zero row and a constant channel become
    zero.
    """
    if normalise == "standard":
        all_rows = rows.flatten(0, -2)
        return (rows - all_rows.mean(0)) / all_rows.std(0).clamp(min=1e-12)
    return F.normalize(rows, dim=-1) if normalise == "l2" else rows


def _image_level(x, y, k, unbiased):
    """Compare mean tokens (N, D), which are pooled first and then normalised.

    A value is missing where all images have the same mean token, as after a collapse.
    """
    table = []
    for name, metric in (("cknna", partial(cknna, k=k)), ("cka", partial(cka, unbiased=unbiased))):
        value = _or_missing(NAN, metric, x, y)
        chance = _or_missing(Null(NAN, NAN), null, x, y, metric)
        folds = min(FOLDS, len(x) // (k + 4))  # a fold needs more images than neighbours
        parts = zip(x.chunk(folds), y.chunk(folds)) if folds > 1 else ()
        spread = (
            float(torch.tensor([_or_missing(NAN, metric, *part) for part in parts]).std())
            if folds > 1
            else 0.0
        )
        table.append((name, "image", value, spread, chance.mean, chance.std, len(x)))
    return table


def _patch_level(level, x, y, k, unbiased):
    """Compare the tokens within each image.

    The first row of layer 0 is the embedding of the class, the same for all images of a class.
    """
    result = within_image(x, y, k, unbiased=unbiased)
    table = []
    for name in ("cknna", "cka"):
        values = getattr(result, name)
        nulls = getattr(result, f"null_{name}")
        table.append(
            (name, level, *_mean_std(values), *_mean_std(nulls), int(values.isfinite().sum()))
        )
    return table


def _or_missing(missing, function, *arguments):
    try:
        return function(*arguments)
    except ValueError:  # the metric is undefined, because the rows have no variance
        return missing


def _maps(rows):
    grid = to_grid(rows)
    for name, statistic in (("moran", morans_i), ("high_frequency", high_frequency_ratio)):
        values = statistic(grid)
        yield name, "map", *_mean_std(values), NAN, NAN, int(values.isfinite().sum())


def _mean_std(values):
    values = values[values.isfinite()]
    return float(values.mean()), float(values.std()) if len(values) > 1 else NAN


def speedups(curves, baseline, method, metrics):
    """Measure how many times sooner `method` reaches the final value of `baseline`, per metric.

    `curves` is a tidy table with the columns run, metric, step, value and method; seeds are
    averaged first. Returns a table: metric, value, low, high (all missing where the final value is
    never reached) and target, the mean of the baseline over the last 2 % of its steps.
    """
    rows = []
    tail = 0.02
    for metric in metrics:
        table = curves[curves.metric == metric].pivot_table(
            index="step", columns="method", values="value"
        )
        result = speedup(
            table.index.to_numpy(), table[baseline].to_numpy(), table[method].to_numpy(), tail
        )
        target = table[baseline][table.index > (1 - tail) * table.index[-1]].mean()
        rows.append((metric, result.value, result.low, result.high, target))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "target"]).astype(
        {c: float for c in ("value", "low", "high")}
    )


def speedups_by_seed(curves, baseline, method, metrics):
    """Return the `speedups` of each seed, from a tidy table with a column seed.

    Columns: seed, metric, value, target, over. `over` is true where the target is reached at or
    before the first logged step, so that the value is a lower bound.
    """
    tables = [
        speedups(group, baseline, method, metrics).assign(seed=seed)
        for seed, group in curves.groupby("seed")
    ]
    table = pd.concat(tables, ignore_index=True)
    largest = curves.step.max() / curves.step.min()
    return table.assign(over=table.value >= largest)[["seed", "metric", "value", "target", "over"]]


def speedups_over_seeds(by_seed):
    """Average a table of `speedups_by_seed` over its seeds; return metric, seeds, value, low, high.

    The value is the geometric mean, low and high its 95 % interval (Student's t of the logarithms).
    All three are missing where a seed never reaches the target or has `over`. One seed has no
    interval.
    """
    rows = []
    for metric, group in by_seed.groupby("metric", sort=False):
        is_known = group.value.notna() & ~group.over
        size = effect(np.log(group.value.astype(float)) if is_known.all() else [])
        rows.append((metric, len(group), *np.exp([size.mean, size.low, size.high])))
    return pd.DataFrame(rows, columns=["metric", "seeds", "value", "low", "high"])
