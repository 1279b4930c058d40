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

    Columns: layer (-1 is the teacher itself), metric, level, value, spread, null, null_spread. Levels: "image" compares mean
    tokens over all `images`, its spread the standard error from five folds, its null permuted images; "patch" compares
    tokens within each image, its spread the standard deviation over images, its null mismatched images; "map" describes
    one layer's maps, its spread over images. Rows are l2-normalised for the alignments, raw for the maps.
    """
    return run.table("layer_profile", {"images": images, "k": k}, lambda: _layer_profile(run, images, k))


def _layer_profile(run, images, k):
    config = run.config
    pictures, labels = data.load(from_dict(data.DataConfig, config["data"]), "val", images)
    tokenizer, generator = load_tokenizer(run.name), load_generator(run.name)
    target = teacher_features(load_teacher(config["teacher"]), pictures)
    layers = list(range(generator.config.layers + 1))
    rows = [(-1, *row) for row in _maps(target)]
    for layer, hidden in generator_features(generator, tokenizer, pictures, labels, layers).items():
        rows += [(layer, *row) for row in [*_image_level(hidden, target, k), *_patch_level(hidden, target, k), *_maps(hidden)]]
    return pd.DataFrame(rows, columns=["layer", "metric", "level", "value", "spread", "null", "null_spread"])


def _image_level(hidden, target, k):
    """Compare mean tokens: pooled first, then normalised."""
    x, y = (l2_normalise(rows.mean(1)) for rows in (hidden, target))
    for name, metric in (("cknna", lambda a, b: cknna(a, b, k)), ("cka", cka)):
        chance = null(x, y, metric, draws=10)
        folds = torch.tensor([metric(a, b) for a, b in zip(x.chunk(FOLDS), y.chunk(FOLDS))])
        yield name, "image", metric(x, y), float(folds.std() / FOLDS**0.5), chance.mean, chance.std


def _patch_level(hidden, target, k):
    """Compare tokens within each image. The first token of layer 0 is the class alone, equal in every image of a class."""
    result = within_image(l2_normalise(hidden), l2_normalise(target), k)
    for name in ("cknna", "cka"):
        value, chance = getattr(result, name), getattr(result, f"null_{name}")
        yield name, "patch", *_mean_std(value), *_mean_std(chance)


def _maps(rows):
    grid = to_grid(rows)
    for name, statistic in (("moran", morans_i), ("high_frequency", high_frequency_ratio)):
        yield name, "map", *_mean_std(statistic(grid)), float("nan"), float("nan")


def _mean_std(values):
    values = values[values.isfinite()]
    return float(values.mean()), float(values.std())


def speedups(curves, baseline, method, metrics):
    """Say how much sooner `method` reaches `baseline`'s end, per metric, from a tidy table (run, metric, step, value, method).

    Seeds are averaged first. Returns a table: metric, value, low, high; value is missing where it is never reached.
    """
    rows = []
    for metric in metrics:
        one = curves[curves.metric == metric].pivot_table(index="step", columns="method", values="value")
        result = speedup(one.index.to_numpy(), one[baseline].to_numpy(), one[method].to_numpy())
        rows.append((metric, result.value, result.low, result.high))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high"])
