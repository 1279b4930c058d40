"""Analyses of a run as tables: read from runs/NAME/analysis where they fit, computed from the
weights where not.
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
BATCH = 128  # images of which features are held
LEAST_IMAGES = 4_000  # from which the floors of an alignment loss are computed
NAN = float("nan")
CHOICES = {  # what the paper leaves open about Table 4 and Fig. 5, the default first
    "normalise": (
        "l2",
        "none",
        "standard",
    ),  # of rows: unit length, as they are, each channel's mean 0 and deviation 1
    "estimator": ("unbiased", "biased"),  # CKA's; the reference's CKNNA has but one
    "pairing": (
        "predicts",
        "sees",
    ),  # patch i with the generator's position that predicts token i, or whose input it is
}
COLUMNS = ["layer", "metric", "level", "value", "spread", "null", "null_spread", "n"]


def layer_profile(
    run, images=1_000, k=10, normalise="l2", estimator="unbiased", pairing="predicts", device="auto"
):
    """Measure a generator run's layers against its teacher (Fig. 5): a table of the run, cached
    with it.

    Columns: layer (-1 is the teacher itself), metric, level, value, spread, null, null_spread, n
    (what was averaged; an image whose value is undefined is left out). Levels:
      "image"   compares mean tokens over all `images`; its spread is that of five disjoint folds
                (smaller samples, so a wider band than the value's own), its null 20 draws of
                permuted images;
      "patch"   compares tokens within each image; its spread is that of images, its null mismatched
                images;
      "content" the same after every position's mean over the images is taken away from both sides,
                since position alone aligns mismatched images (a teacher's padding shows where a
                patch lies);
      "map"     describes a layer's maps, its spread that of images.
    Spreads are standard deviations. The alignments take rows normalised by `normalise` and CKA in
    the form `estimator`; with the `pairing` "sees" they leave out the last patch, which no position
    sees (`CHOICES`). Maps are of raw rows. `device` is what computes, see `open_device`; a table
    does not say which. UserError for a choice that is not there, and for an image, or images,
    without k neighbours.
    """
    parameters, choices = _parameters(
        images, k, normalise=normalise, estimator=estimator, pairing=pairing
    )
    return run.table(
        "layer_profile",
        parameters,
        lambda: _layer_profile(run, images, k, open_device(device), **choices),
    )


def tokenizer_profile(run, images=1_000, k=10, normalise="l2", estimator="unbiased", device="auto"):
    """Measure a tokenizer's own features against the teacher (Table 4): a table of the run, cached
    with it.

    The columns and levels of `layer_profile`, with `layer` "pre" or "post" quantisation, or
    "teacher". The metric "ties" is the share of tokens whose k-th and (k + 1)-th neighbours are
    equally near: above one half, CKNNA measures little.
    """
    parameters, choices = _parameters(images, k, normalise=normalise, estimator=estimator)
    return run.table(
        "tokenizer_profile",
        parameters,
        lambda: _tokenizer_profile(run, images, k, open_device(device), **choices),
    )


def alignment_floors(run, per_class=100, device="auto"):
    """Measure the alignment loss that needs no look at the image: a table of the run, cached with
    it.

    Columns: predictor, value. A predictor answers with a mean direction of the teacher's features
    over training images, `per_class` times the classes but at least 4,000: one "constant", one a
    "position", one a "class and position", which is shrunk toward the position's as far as its
    number of images asks for; the value is minus the mean cosine on the run's validation images.
    What a generator reaches beyond the lowest of them is content.
    """
    check_value("per_class", per_class, Count)
    return run.table(
        "alignment_floors",
        {"per_class": per_class},
        lambda: _alignment_floors(run, per_class, open_device(device)),
    )


def check_neighbours(k, tokens):
    """Raise UserError unless a token of an image has a k-th neighbour among the others, and one
    after it to tell ties by.
    """
    with given_by(f"with {tokens} tokens an image"):
        check_value("k", k, Annotated[int, Range(1, tokens - 2)])


def check_observed(run, images, k, least=4):
    """Raise UserError unless `images`, `least` of them or more, and their tokens have k neighbours
    each.
    """
    h, w = token_grid(run.config)
    check_neighbours(k, h * w)
    check_value("images", images, Annotated[int, Range(max(least, k + 1), MOST)])


def _parameters(images, k, **choices):
    """Return the parameters that name a table, and the choices; a default is not named: tables from
    before it still fit.
    """
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise UserError(
                f"unknown {name} '{value}'.{nearest(value, CHOICES[name])} Known: "
                f"{', '.join(CHOICES[name])}."
            )
    return {"images": images, "k": k} | {
        name: value for name, value in choices.items() if value != CHOICES[name][0]
    }, choices


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
    """Compare `tokenizer_features` with the teacher's rows (None: describe their maps alone), as
    `tokenizer_profile` does.
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
    # the best answer to a cosine is the mean direction
    position, of_class = sums.sum(0) / counts.sum(), shrunk_class_means(sums, counts, squares)
    _, labels, target = observed(run, "val", run.config["eval_images"], device)
    both = torch.stack([of_class[int(c)] for c in labels])
    answers = {"constant": position.mean(0), "position": position, "class and position": both}
    losses = [
        (name, -float(F.cosine_similarity(answer.expand_as(target), target, dim=-1).mean()))
        for name, answer in answers.items()
    ]
    return pd.DataFrame(losses, columns=["predictor", "value"])


def _sums_of_classes(run, count, device):
    """Return, of the teacher's unit features of a run's first training images: their sums by class
    (classes, L, C), numbers (classes,), and the sum of all squares. No more than a batch is held.
    """
    teacher = first_teacher(run, device)
    images = data.open_trained(run).split("train")
    classes = run.config["generator"]["num_classes"]
    sums, counts, squares = None, torch.zeros(classes), 0.0
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
    """Return the mean of each class's rows (classes, ...), shrunk toward the mean of all (empirical
    Bayes), from their sums (classes, ...), counts (classes,) and the sum of all squares.

    The mean of n rows of a class keeps the share b / (b + w / n) of its difference from the mean of
    all, w being the variance of rows within a class and b that of the classes' true means: few rows
    tell little of a class, and their noise would hide what position alone predicts. Where no class
    has two rows, w cannot be estimated, and nothing is kept; nor is it of a class without rows.
    """
    num_rows, num_classes = float(counts.sum()), int((counts > 0).sum())
    shape = (-1, *[1] * (sums.ndim - 1))
    overall = sums.sum(0) / num_rows
    if num_rows == num_classes:
        return overall.expand_as(sums)
    means = sums / counts.clamp(min=1).view(shape)
    weighted = counts.double() @ means.double().square().flatten(1).sum(1)
    within = (squares - float(weighted)) / (num_rows - num_classes)
    apart = float(counts.double() @ (means - overall).double().square().flatten(1).sum(1))
    # less what the means of classes that are all alike would differ by
    between = max(0.0, (apart - within * (num_classes - 1)) / num_rows)
    shares = counts * between / (counts * between + within).clamp(min=1e-30)
    return overall + shares.view(shape) * (means - overall)


def observed(run, split, count, device="cpu"):
    """Return a split's first images, their labels and the features (N, L, C) of the run's teacher,
    the first of several.

    All three lie on the CPU; `device` computes.
    """
    source = data.open_trained(run)
    images, labels = data.load(source, split, count)
    return images, labels, teacher_features(first_teacher(run, device), images)


def first_teacher(run, device="cpu"):
    """Return a run's teacher, the first of several, on a device."""
    config = run.config
    stride = from_dict(TokenizerConfig, config["tokenizer"]).downsampling
    return load_teachers(config["teacher"], data.trained_on(run), stride)[0].to(device)


def profile(features, target, k, device="cpu", **choices):
    """Compare {layer: rows (N, L, D)} with the teacher's rows (N, L, C): a table of `COLUMNS`, see
    `layer_profile`.

    Rows of None stand for the teacher itself, whose maps are described; with a target of None all
    are described alone. A layer at a time is on the `device` that compares.
    """
    table, target = [], None if target is None else target.to(device)
    for layer, rows in features.items():
        rows = None if rows is None else rows.to(device)
        alone = rows is None or target is None
        found = [] if alone else alignments(rows, target, k, **choices)
        table += [(layer, *row) for row in [*found, *_maps(target if rows is None else rows)]]
    return pd.DataFrame(table, columns=COLUMNS)


def alignments(rows, target, k, normalise="l2", estimator="unbiased", pairing="predicts"):
    """Return the rows of `COLUMNS`, less the layer, of rows (N, L, D) beside the teacher's (N, L,
    C): see `layer_profile`.
    """
    if pairing == "sees":  # position i + 1 has token i for its input; none sees the last
        rows, target = rows[:, 1:], target[:, :-1]
    rows, target = rows.double(), target.double()
    unbiased = estimator == "unbiased"
    levels = {"patch": (rows, target), "content": (rows - rows.mean(0), target - target.mean(0))}
    table = _image_level(*(_normalised(z.mean(1), normalise) for z in (rows, target)), k, unbiased)
    for level, sides in levels.items():
        table += _patch_level(level, *(_normalised(z, normalise) for z in sides), k, unbiased)
    return table


def _normalised(rows, how):
    """Normalise (.., D), a channel's mean and deviation over all rows. A zero row, a constant
    channel stay zero.
    """
    if how == "standard":
        every = rows.flatten(0, -2)
        return (rows - every.mean(0)) / every.std(0).clamp(min=1e-12)
    return F.normalize(rows, dim=-1) if how == "l2" else rows


def _image_level(x, y, k, unbiased):
    """Compare mean tokens: pooled first, then normalised. Missing where every image is alike, as
    after a collapse.
    """
    table = []
    for name, metric in (("cknna", partial(cknna, k=k)), ("cka", partial(cka, unbiased=unbiased))):
        value, chance = (
            _or_missing(NAN, metric, x, y),
            _or_missing(Null(NAN, NAN), null, x, y, metric),
        )
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
    """Compare tokens within each image. The first token of layer 0 is the class alone, equal in
    every image of a class.
    """
    result, table = within_image(x, y, k, unbiased=unbiased), []
    for name in ("cknna", "cka"):
        value, chance = getattr(result, name), getattr(result, f"null_{name}")
        table.append(
            (name, level, *_mean_std(value), *_mean_std(chance), int(value.isfinite().sum()))
        )
    return table


def _or_missing(missing, function, *arguments):
    try:
        return function(*arguments)
    except ValueError:  # undefined: no variance
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
    """Say how much sooner `method` reaches `baseline`'s end, per metric, from a tidy table (run,
    metric, step, value, method).

    Seeds are averaged first. Returns a table: metric, value, low, high, all missing where it is
    never reached, and target, the baseline's end: its mean over the last 2 % of its steps.
    """
    rows, tail = [], 0.02
    for metric in metrics:
        one = curves[curves.metric == metric].pivot_table(
            index="step", columns="method", values="value"
        )
        result = speedup(
            one.index.to_numpy(), one[baseline].to_numpy(), one[method].to_numpy(), tail
        )
        target = one[baseline][one.index > (1 - tail) * one.index[-1]].mean()
        rows.append((metric, result.value, result.low, result.high, target))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "target"]).astype(
        {c: float for c in ("value", "low", "high")}
    )


def speedups_by_seed(curves, baseline, method, metrics):
    """Return `speedups` of each seed, from a tidy table with a column seed: seed, metric, value,
    target, over.

    `over` says that the end is reached at the first step there is or before: the value is a lower
    bound.
    """
    tables = [
        speedups(group, baseline, method, metrics).assign(seed=seed)
        for seed, group in curves.groupby("seed")
    ]
    table = pd.concat(tables, ignore_index=True)
    most = curves.step.max() / curves.step.min()
    return table.assign(over=table.value >= most)[["seed", "metric", "value", "target", "over"]]


def speedups_over_seeds(by_seed):
    """Average a table of `speedups_by_seed` over its seeds: metric, seeds, value, low, high.

    The geometric mean and its 95 % interval (Student's t, of logarithms); missing where a seed
    never reaches the end, or reaches it before the first step there is. One seed has no interval.
    """
    rows = []
    for metric, group in by_seed.groupby("metric", sort=False):
        is_known = group.value.notna() & ~group.over
        size = effect(np.log(group.value.astype(float)) if is_known.all() else [])
        rows.append((metric, len(group), *np.exp([size.mean, size.low, size.high])))
    return pd.DataFrame(rows, columns=["metric", "seeds", "value", "low", "high"])
