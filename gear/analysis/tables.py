"""Analyses of a run as tables: read from runs/NAME/analysis where they fit, computed from the weights where not."""

import pandas as pd
import torch

from gear import data
from gear.analysis.alignment import cka, cknna, l2_normalise, null, within_image
from gear.analysis.dynamics import speedup
from gear.analysis.features import generator_features, teacher_features, to_grid
from gear.analysis.spatial import high_frequency_ratio, morans_i
from gear.checkpoints import load_generator, load_tokenizer
from gear.config import from_dict
from gear.teachers import load_teacher

FOLDS = 5


def layer_profile(run, images=1_000, k=10):
    """Measure a generator run's layers against its teacher (Fig. 5): a table of the run, cached with it.

    Columns: layer (-1 is the teacher itself), metric, level, value, spread, null, null_spread, n (what was averaged; an image
    whose value is undefined is left out). Levels: "image" compares mean tokens over all `images`, its spread that of five
    disjoint folds (smaller samples, so a wider band than the value's own), its null 20 draws of permuted images; "patch"
    compares tokens within each image, its spread that of images, its null mismatched images; "map" describes a layer's maps,
    its spread that of images. Spreads are standard deviations. Rows are l2-normalised for the alignments, raw for the maps.
    """
    return run.table("layer_profile", {"images": images, "k": k}, lambda: _layer_profile(run, images, k))


def _layer_profile(run, images, k):
    config = run.config
    source = from_dict(data.DataConfig, config["data"])
    pictures, labels = data.load(source, "val", images)
    tokenizer, generator = load_tokenizer(run.name), load_generator(run.name)
    target = teacher_features(load_teacher(config["teacher"], source, tokenizer.config.downsampling), pictures)
    layers = list(range(generator.config.layers + 1))
    rows = [(-1, *row) for row in _maps(target)]
    for layer, hidden in generator_features(generator, tokenizer, pictures, labels, layers).items():
        rows += [(layer, *row) for row in [*_image_level(hidden, target, k), *_patch_level(hidden, target, k), *_maps(hidden)]]
    return pd.DataFrame(rows, columns=["layer", "metric", "level", "value", "spread", "null", "null_spread", "n"])


def _image_level(hidden, target, k):
    """Compare mean tokens: pooled first, then normalised."""
    x, y = (l2_normalise(rows.mean(1)) for rows in (hidden, target))
    for name, metric in (("cknna", lambda a, b: cknna(a, b, k)), ("cka", cka)):
        chance = null(x, y, metric)
        folds = min(FOLDS, len(x) // (k + 4))  # a fold needs more images than neighbours
        values = torch.tensor([metric(a, b) for a, b in zip(x.chunk(folds), y.chunk(folds))]) if folds > 1 else torch.zeros(1)
        yield name, "image", metric(x, y), float(values.std(correction=int(folds > 1))), chance.mean, chance.std, len(x)


def _patch_level(hidden, target, k):
    """Compare tokens within each image. The first token of layer 0 is the class alone, equal in every image of a class."""
    result = within_image(l2_normalise(hidden), l2_normalise(target), k)
    for name in ("cknna", "cka"):
        value, chance = getattr(result, name), getattr(result, f"null_{name}")
        yield name, "patch", *_mean_std(value), *_mean_std(chance), int(value.isfinite().sum())


def _maps(rows):
    grid = to_grid(rows)
    for name, statistic in (("moran", morans_i), ("high_frequency", high_frequency_ratio)):
        values = statistic(grid)
        yield name, "map", *_mean_std(values), float("nan"), float("nan"), int(values.isfinite().sum())


def _mean_std(values):
    values = values[values.isfinite()]
    return float(values.mean()), float(values.std())


def speedups(curves, baseline, method, metrics):
    """Say how much sooner `method` reaches `baseline`'s end, per metric, from a tidy table (run, metric, step, value, method).

    Seeds are averaged first. Returns a table: metric, value, low, high, all missing where it is never reached, and target,
    the baseline's end: its mean over the last 2 % of its steps.
    """
    rows, tail = [], 0.02
    for metric in metrics:
        one = curves[curves.metric == metric].pivot_table(index="step", columns="method", values="value")
        result = speedup(one.index.to_numpy(), one[baseline].to_numpy(), one[method].to_numpy(), tail)
        target = one[baseline][one.index > (1 - tail) * one.index[-1]].mean()
        rows.append((metric, result.value, result.low, result.high, target))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "target"]).astype(
        {c: float for c in ("value", "low", "high")}
    )
