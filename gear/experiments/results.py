"""What runs measured, logged while they trained or scored by `gear evaluate`: of a run, a study."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from gear.config import Count, MissingRuns, UserError, changed_words, check_value, from_dict
from gear.data import DataConfig, open_source
from gear.data.stores import DOWNLOADS
from gear.data.trained import place_of
from gear.evaluation.evaluate import scores
from gear.experiments.studies import Scoring, members, num_real, of_study, space
from gear.generator.sampling import Guidance
from gear.runs.run import Run, open_runs, run_names

# what an evaluation of samples and reconstructions leaves whatever they are compared with
SCORED = {"fd", "psnr"}
OPTIONAL = {"samples_resized"}  # fields of a protocol that only some have
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


def measured(name, preset, scoring=Scoring(), cfg_scale=1.0, step=None):
    """Return {metric of TITLES: value} of what a run logged at a step and has in metrics.json.

    Samples are those of `scoring`, `cfg_scale` and seed 0, without top-k or top-p, at `step`
    (default: the last one), against `num_real` images of the run's own, or its reference; as many
    are reconstructed, at the last step. A source with fewer gives all it has.
    """
    run = Run.open(name)
    network, last, table = space(preset), run.config["steps"], scores(run)
    at = step or last
    validation = logged(run, at)
    values = {metric: validation[metric] for metric in LOGGED if metric in validation}
    inception = network == "inception"
    names = {
        "gfid" if inception else f"fd_{network}": "fd",
        "rfid" if inception else f"rfd_{network}": "rfd",
    }
    drawn = dict(
        count=scoring.samples(preset),
        cfg_scale=cfg_scale,
        seed=0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        step=at,
        network=network,
    )
    drawn["samples_resized"] = scoring.resized_to(run.config)
    if scoring.reference:
        rows = _where(table, **drawn, reference=Path(scoring.reference).name)
    else:
        rows = _against_own(table, drawn, run, preset)
    values |= _scores(rows, names | {"precision": "precision", "recall": "recall"})
    data, images = from_dict(DataConfig, run.config["data"]), num_real(preset)
    data = replace(data, source=place_of(run))
    rows = _of_all(table, dict(split="val", step=last), "images", images, data, "val")
    return values | _scores(rows, names | {"psnr": "psnr", "ssim": "ssim"})


def _against_own(table, drawn, run, preset):
    """Return the lines of a table that compare the samples `drawn` with a run's own images."""
    data = from_dict(DataConfig, run.config["data"])
    # as an evaluation opens its reference
    opened = DataConfig(place_of(run), data.image_size, val_source=data.val_source)
    drawn = drawn | {"reference": Path(data.source).name}
    return _of_all(table, drawn, "reference_count", num_real(preset), opened, "train")


def _scores(rows, names):
    return {
        names[metric]: value for metric, value in zip(rows.metric, rows.value) if metric in names
    }


def _of_all(table, wanted, key, count, config, split):
    """Return the lines of a table that have the values `wanted` and, as `key`, `count` images or
    all that the split has.
    """
    rows = _where(table, **wanted, **{key: count})
    if (
        len(rows)
        or not wanted.keys() - OPTIONAL <= set(table.columns)
        or config.source in DOWNLOADS
    ):
        return rows
    try:
        return _where(table, **wanted, **{key: min(count, _length(config, split))})
    except UserError:  # the source is not on this machine
        return rows


@functools.cache
def _length(config, split):
    return len(open_source(config, split))


def _where(table, **wanted):
    """Return the lines of a table that have these values, 0 being none at all; no line where the
    table lacks a column.
    """
    absent = [key for key in wanted.keys() - set(table.columns) if key in OPTIONAL]
    table = table.assign(**dict.fromkeys(absent, np.nan))
    if not wanted.keys() <= set(table.columns):
        return table[:0].astype({"metric": str})
    values = {key: table[key].fillna(0) if key in OPTIONAL else table[key] for key in wanted}
    return table[np.logical_and.reduce([values[key] == value for key, value in wanted.items()])]


def quality(runs, scoring=Scoring(), steps=(), scales=(1.0,)):
    """Return what runs, a pattern or Runs, scored without guidance at `steps`, and at the last one
    with each of `scales`.

    Columns: run, seed, step, cfg_scale, metric, value. Raises MissingRuns for the first of these
    scores that is missing, naming the runs that lack it and the command that makes them.
    """
    check_value("steps", tuple(steps), tuple[Count, ...])
    check_value("cfg_scale", tuple(scales), tuple[Guidance, ...])
    lines, lacking = [], {}
    for run in open_runs(runs) if isinstance(runs, str) else runs:
        config, preset = run.config, run.config["recipe"]
        for step, scale in sorted(
            {*((s, 1.0) for s in steps), *((config["steps"], s) for s in scales)}
        ):
            values = measured(run.name, preset, scoring, scale, step)
            if "fd" not in values:
                words = tuple(scoring_words(preset, config, scoring))
                lacking.setdefault((words, scoring.samples(preset), step, scale), []).append(
                    run.name
                )
            lines += [
                (run.name, config["seed"], step, scale, metric, value)
                for metric, value in values.items()
            ]
    for (words, count, step, scale), names in lacking.items():
        swept = f"--sweep cfg_scale={','.join(f'{s:g}' for s in scales)}"
        what = f"--steps {step}" if scale == 1 else swept
        command = " ".join(["gear evaluate", *names, *words, what])
        told = ", ".join(f"'{name}'" for name in names)
        sentence = (
            f"no run {told} with scores of {count} samples at step {step}, guidance {scale:g}"
        )
        raise MissingRuns(sentence, names, command)
    return pd.DataFrame(lines, columns=["run", "seed", "step", "cfg_scale", "metric", "value"])


def scoring_words(preset, config, scoring=Scoring()):
    """Return what follows `gear evaluate RUN` to score a run of a preset by its configuration, a
    dict: its reconstructions, and its samples where it has a generator.
    """
    words = ["--network", space(preset)]
    if config["stage"] == "tokenizer":
        words.append("--reconstruction")
    else:
        words += ["--both", "--count", f"{scoring.samples(preset)}"]
    if size := scoring.resized_to(config):
        words += ["--sample-size", f"{size}"]
    return words + changed_words(replace(scoring, count=0, sample_size=0))


def by_size(preset, seeds, scoring=Scoring(), scales=(1.0,)):
    """Return `quality` of the runs of the size study: its columns, and cell, role and width. Raises
    as `results` does, too.
    """
    results("size", preset, seeds, scoring)
    runs = members("size", preset, seeds)
    sizes = [(m.name, m.cell.title, m.role, m.planned[-1][1].generator.width) for m in runs]
    table = quality([Run.open(member.name) for member in runs], scoring, scales=scales)
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
        sorted(
            {t[key][t[key] <= num_real(run.config["recipe"])].max() for t, run in zip(own, runs)}
        )
        for key in ("reference_count", "images")
    ]
    return tuple(" and ".join(f"{number:.0f}" for number in column) for column in numbers)


def results(name, preset="scenes", seeds=(0, 1, 2), scoring=Scoring(), transfer=False):
    """Return what a study's runs measured, a line each: cell, role, seed, run, metric, value.

    Raises MissingRuns naming the runs that are missing, or not scored, and the command that makes
    them.
    """
    chosen = members(name, preset, seeds, transfer=transfer)
    scoring, names, lacking = of_study(name, preset, scoring), set(run_names()), []
    lines = []
    for member in chosen:
        values = measured(member.name, preset, scoring) if member.name in names else {}
        lacking += [member.name] if not SCORED | {"ntp_loss"} <= values.keys() else []
        lines += [
            (member.cell.title, member.role, member.seed, member.name, m, v)
            for m, v in values.items()
        ]
    if lacking:
        command = f"gear sweep {name} --preset {preset} --seeds {','.join(map(str, seeds))}"
        options = changed_words(replace(scoring, sample_size=0))
        command += " ".join(["", *options]) + " --transfer" * transfer
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
