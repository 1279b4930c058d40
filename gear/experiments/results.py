"""What runs measured, logged while they trained or scored by `gear evaluate`: of a run, a study."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from gear.config import Count, MissingRuns, Samples, UserError, check_value, from_dict
from gear.data import DataConfig, open_source
from gear.data.stores import DOWNLOADS
from gear.data.trained import place_of
from gear.evaluation.evaluate import EvaluateOptions, scores
from gear.experiments.studies import SAMPLES, members, space
from gear.generator.sampling import Guidance
from gear.runs.run import Run, open_runs, run_names

# images that samples are compared with, and that are reconstructed
REFERENCE = EvaluateOptions.reference_count
# what an evaluation of samples and reconstructions leaves
SCORED = {"fd", "precision", "recall", "psnr", "ssim", "rfd"}
LOGGED = "ntp_loss", "align_loss", "usage_entropy", "predictable"  # what validation logs
TITLES = {
    "fd": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "rfd": "Fréchet, reconstructions",
    "ntp_loss": "next-token loss (nats)",
    "predictable": "H - NTP (nats)",
    "align_loss": "alignment loss",
    "usage_entropy": "usage H (nats)",
}


def logged(run, step=None):
    """Return {metric: value} of what a run's validation logged at a step (default: the last).

    "predictable" is H - NTP, what the generator predicts of a token, in nats.
    """
    log = run.metrics()
    log = log[log.step == (step or run.config["steps"])].dropna(axis="columns")
    rows = log.filter(regex="^val/").rename(columns=lambda name: name.removeprefix("val/"))
    values = next(iter(rows.to_dict("records")), {})
    if {"ntp_loss", "usage_entropy"} <= values.keys():
        values["predictable"] = values["usage_entropy"] - values["ntp_loss"]
    return values


def measured(name, preset, count=SAMPLES, cfg_scale=1.0, step=None):
    """Return {metric of TITLES: value} of what a run logged at a step and has in metrics.json.

    Samples are those of `count`, `cfg_scale` and seed 0, without top-k or top-p, at `step`
    (default: the last one), against REFERENCE images of its own; as many are reconstructed, at the
    last step. A source with fewer gives all it has.
    """
    run = Run.open(name)
    network, last, table = space(preset), run.config["steps"], scores(run)
    data = from_dict(DataConfig, run.config["data"])
    at = step or last
    validation = logged(run, at)
    values = {metric: validation[metric] for metric in LOGGED if metric in validation}
    inception = network == "inception"
    names = {
        "gfid" if inception else f"fd_{network}": "fd",
        "rfid" if inception else f"rfd_{network}": "rfd",
    }
    drawn = dict(
        count=count,
        cfg_scale=cfg_scale,
        seed=0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        step=at,
        network=network,
    )
    drawn["reference"] = Path(data.source).name
    data = replace(data, source=place_of(run))
    whole = DataConfig(data.source, data.image_size)  # as an evaluation opens its reference
    rows = _of_all(table, drawn, "reference_count", whole, "train")
    values |= _scores(rows, names | {"precision": "precision", "recall": "recall"})
    rows = _of_all(table, dict(split="val", step=last), "images", data, "val")
    return values | _scores(rows, names | {"psnr": "psnr", "ssim": "ssim"})


def _scores(rows, names):
    return {
        names[metric]: value for metric, value in zip(rows.metric, rows.value) if metric in names
    }


def _of_all(table, wanted, key, config, split):
    """Return the lines of a table that have the values `wanted` and, as `key`, REFERENCE images or
    all that the split has.
    """
    rows = _where(table, **wanted, **{key: REFERENCE})
    if len(rows) or not wanted.keys() <= set(table.columns) or config.source in DOWNLOADS:
        return rows
    try:
        return _where(table, **wanted, **{key: min(REFERENCE, _length(config, split))})
    except UserError:  # the source is not on this machine
        return rows


@functools.cache
def _length(config, split):
    return len(open_source(config, split))


def _where(table, **wanted):
    """Return the lines of a table that have these values; none where it lacks a column."""
    if not wanted.keys() <= set(table.columns):
        return table[:0].astype({"metric": str})
    return table[np.logical_and.reduce([table[key] == value for key, value in wanted.items()])]


def quality(runs, count=SAMPLES, steps=(), scales=(1.0,)):
    """Return what runs, a pattern or Runs, scored without guidance at `steps`, and at the last one
    with each of `scales`.

    Columns: run, seed, step, cfg_scale, metric, value. Raises MissingRuns for the first of these
    scores that is missing, naming the runs that lack it and the command that makes them.
    """
    check_value("count", count, Samples)
    check_value("steps", tuple(steps), tuple[Count, ...])
    check_value("cfg_scale", tuple(scales), tuple[Guidance, ...])
    lines, lacking = [], {}
    for run in open_runs(runs) if isinstance(runs, str) else runs:
        config, preset = run.config, run.config["recipe"]
        for step, scale in sorted(
            {*((s, 1.0) for s in steps), *((config["steps"], s) for s in scales)}
        ):
            values = measured(run.name, preset, count, scale, step)
            if "fd" not in values:
                lacking.setdefault((space(preset), step, scale), []).append(run.name)
            lines += [
                (run.name, config["seed"], step, scale, metric, value)
                for metric, value in values.items()
            ]
    for (network, step, scale), names in lacking.items():
        what = (
            f"--steps {step}"
            if scale == 1
            else f"--sweep cfg_scale={','.join(f'{s:g}' for s in scales)}"
        )
        command = (
            f"gear evaluate {' '.join(names)} --network {network} --both --count {count} {what}"
        )
        told = ", ".join(f"'{name}'" for name in names)
        sentence = (
            f"no run {told} with scores of {count} samples at step {step}, guidance {scale:g}"
        )
        raise MissingRuns(sentence, names, command)
    return pd.DataFrame(lines, columns=["run", "seed", "step", "cfg_scale", "metric", "value"])


def by_size(preset, seeds, count=SAMPLES, scales=(1.0,)):
    """Return `quality` of the runs of the size study: its columns, and cell, role and width. Raises
    as `results` does, too.
    """
    results("size", preset, seeds, count)
    found = members("size", preset, seeds)
    sizes = [(m.name, m.cell.title, m.role, m.planned[-1][1].generator.width) for m in found]
    table = quality([Run.open(member.name) for member in found], count, scales=scales)
    return table.merge(pd.DataFrame(sizes, columns=["run", "cell", "role", "width"]), on="run")


def counted(runs):
    """Say how many images scores count, in words: (training images compared with, validation images
    reconstructed).
    """
    own = []
    for run in runs:
        table, source = scores(run), Path(run.config["data"]["source"]).name
        own.append(table[(table.reference == source) | (table.metric == "psnr")])
    numbers = [
        sorted({t[key][t[key] <= REFERENCE].max() for t in own})
        for key in ("reference_count", "images")
    ]
    return tuple(" and ".join(f"{number:.0f}" for number in found) for found in numbers)


def results(name, preset="scenes", seeds=(0, 1, 2), count=SAMPLES):
    """Return what a study's runs measured, a line each: cell, role, seed, run, metric, value.

    Raises MissingRuns naming the runs that are missing, or not scored, and the command that makes
    them.
    """
    check_value("count", count, Samples)
    found = members(name, preset, seeds)
    there, lacking = set(run_names()), []
    lines = []
    for member in found:
        values = measured(member.name, preset, count) if member.name in there else {}
        lacking += [member.name] if not SCORED | {"ntp_loss"} <= values.keys() else []
        lines += [
            (member.cell.title, member.role, member.seed, member.name, m, v)
            for m, v in values.items()
        ]
    if lacking:
        command = f"gear sweep {name} --preset {preset} --seeds {','.join(map(str, seeds))}"
        command += f" --count {count}" if count != SAMPLES else ""
        raise MissingRuns(
            f"the study '{name}' needs {', '.join(lacking)}, trained and scored", lacking, command
        )
    return pd.DataFrame(lines, columns=["cell", "role", "seed", "run", "metric", "value"])


def summary(table):
    """Return the table of `results` as mean +- standard deviation over seeds, a row a cell and
    role, a column a metric.
    """
    groups = table.groupby(["cell", "role", "metric"], sort=False).value
    mean, spread = groups.mean(), groups.std()
    text = mean.map("{:.4g}".format) + spread.map(lambda s: "" if s != s else f" +- {s:.2g}")
    return text.unstack("metric")[[m for m in TITLES if m in set(table.metric)]].rename(
        columns=TITLES
    )
