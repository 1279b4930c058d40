"""Measurements of runs and studies: values logged in training, and scores of `gear evaluate`."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from gear.analysis.code_length import code_length, nats_per_image
from gear.config import Count, MissingRuns, UserError, changed_words, check_value, from_dict
from gear.data import DataConfig, open_source
from gear.data.stores import DOWNLOADS
from gear.data.trained import place_of
from gear.evaluation.evaluate import scores
from gear.experiments.studies import Scoring, members, num_real, of_study, space
from gear.generator.sampling import Guidance
from gear.runs.run import Run, open_runs, run_names
from gear.tokenizer.config import token_grid

# A run with these metrics is scored: one metric of samples and one of reconstructions, which every
# evaluation writes.
SCORED = {"fd", "psnr"}
OPTIONAL = {"samples_resized"}  # fields that only some protocols have; a missing one counts as 0
LOGGED = ("ntp_loss", "align_loss", "usage_entropy", "predictable")  # metrics of validation
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
    """Return {metric: value} as a run's validation logged them at `step` (default: the last one).

    "predictable" is H - NTP: usage entropy minus next-token loss, the information in nats per token
    that the generator predicts.
    """
    log = run.metrics()
    log = log[log.step == (step or run.config["steps"])].dropna(axis="columns")
    rows = log.filter(regex="^val/").rename(columns=lambda name: name.removeprefix("val/"))
    values = next(iter(rows.to_dict("records")), {})
    if {"ntp_loss", "usage_entropy"} <= values.keys():
        values["predictable"] = values["usage_entropy"] - values["ntp_loss"]
    return values


def measured(name, preset, scoring=Scoring(), cfg_scale=1.0, step=None):
    """Return {metric of TITLES: value} of a run: its logged losses and its scores in metrics.json.

    Losses and samples are those at `step` (default: the last one). Samples count if they were
    drawn as `scoring` and `cfg_scale` say, with seed 0 and without top-k or top-p. They are
    compared with `num_real(preset)` training images of the run, or with the reference of `scoring`.
    Reconstructions are those of as many validation images at the last step. A source with fewer
    images counts with all of them. A metric without a value is left out.
    """
    run = Run.open(name)
    table = scores(run)
    network = space(preset)
    last_step = run.config["steps"]
    step = step or last_step
    validation = logged(run, step)
    values = {metric: validation[metric] for metric in LOGGED if metric in validation}
    is_inception = network == "inception"
    names = {
        "gfid" if is_inception else f"fd_{network}": "fd",
        "rfid" if is_inception else f"rfd_{network}": "rfd",
    }
    protocol = dict(
        count=scoring.samples(preset),
        cfg_scale=cfg_scale,
        seed=0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        step=step,
        network=network,
    )
    protocol["samples_resized"] = scoring.resized_to(run.config)
    if scoring.reference:
        rows = _where(table, **protocol, reference=Path(scoring.reference).name)
    else:
        rows = _against_training_images(table, protocol, run, preset)
    values |= _scores(rows, names | {"precision": "precision", "recall": "recall"})
    data = replace(from_dict(DataConfig, run.config["data"]), source=place_of(run))
    protocol = dict(split="val", step=last_step)
    rows = _with_count(table, protocol, "images", num_real(preset), data, "val")
    return values | _scores(rows, names | {"psnr": "psnr", "ssim": "ssim"})


def _against_training_images(table, protocol, run, preset):
    """Return the rows of a table of scores that compare samples drawn by `protocol` with training
    images of the run.
    """
    data = from_dict(DataConfig, run.config["data"])
    # the configuration with which an evaluation opens its reference
    reference = DataConfig(place_of(run), data.image_size, val_source=data.val_source)
    protocol = protocol | {"reference": Path(data.source).name}
    return _with_count(table, protocol, "reference_count", num_real(preset), reference, "train")


def _scores(rows, names):
    return {
        names[metric]: value for metric, value in zip(rows.metric, rows.value) if metric in names
    }


def _with_count(table, protocol, column, count, data, split):
    """Return the rows of a table of scores that match `protocol` and whose `column` is `count`
    images or, if the split has fewer, the number of its images.
    """
    rows = _where(table, **protocol, **{column: count})
    has_columns = protocol.keys() - OPTIONAL <= set(table.columns)
    # counting the images of a dataset that torchvision fetches would start a download
    if len(rows) or not has_columns or data.source in DOWNLOADS:
        return rows
    try:
        return _where(table, **protocol, **{column: min(count, _length(data, split))})
    except UserError:  # the source is not on this machine
        return rows


@functools.cache
def _length(data, split):
    return len(open_source(data, split))


def _where(table, **protocol):
    """Return the rows of a table of scores whose columns have the values of `protocol`.

    A missing value in an OPTIONAL column counts as 0. No row matches if the table lacks another
    column.
    """
    absent = [key for key in protocol.keys() - set(table.columns) if key in OPTIONAL]
    table = table.assign(**dict.fromkeys(absent, np.nan))
    if not protocol.keys() <= set(table.columns):
        return table[:0].astype({"metric": str})
    columns = {key: table[key].fillna(0) if key in OPTIONAL else table[key] for key in protocol}
    is_match = [columns[key] == value for key, value in protocol.items()]
    return table[np.logical_and.reduce(is_match)]


def quality(runs, scoring=Scoring(), steps=(), scales=(1.0,)):
    """Return the scores of runs without guidance at `steps`, and at the last step with each of the
    guidance `scales`.

    runs: a pattern of names, or Runs. Columns: run, seed, step, cfg_scale, metric, value. Raises
    MissingRuns for the first score that is missing, with the runs that lack it and the command that
    computes it.
    """
    check_value("steps", tuple(steps), tuple[Count, ...])
    check_value("cfg_scale", tuple(scales), tuple[Guidance, ...])
    lines = []
    lacking = {}  # (words, number of samples, step, scale) of a score -> names of runs without it
    for run in open_runs(runs) if isinstance(runs, str) else runs:
        config = run.config
        preset = config["recipe"]
        settings = {(step, 1.0) for step in steps}
        settings |= {(config["steps"], scale) for scale in scales}
        for step, scale in sorted(settings):
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
        option = f"--steps {step}" if scale == 1 else swept
        command = " ".join(["gear evaluate", *names, *words, option])
        quoted = ", ".join(f"'{name}'" for name in names)
        sentence = (
            f"no run {quoted} with scores of {count} samples at step {step}, guidance {scale:g}"
        )
        raise MissingRuns(sentence, names, command)
    return pd.DataFrame(lines, columns=["run", "seed", "step", "cfg_scale", "metric", "value"])


def scoring_words(preset, config, scoring=Scoring()):
    """Return the words after `gear evaluate RUN` that score a run with `config` (a dict): its
    reconstructions and, if it has a generator, its samples.
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
    """Return the table of `quality` for the runs of the size study, with the columns cell, role and
    width.

    Raises MissingRuns as `results` and `quality` do.
    """
    results("size", preset, seeds, scoring)  # raises if runs are missing
    chosen = members("size", preset, seeds)
    sizes = [(m.name, m.cell.title, m.role, m.planned[-1][1].generator.width) for m in chosen]
    table = quality([Run.open(member.name) for member in chosen], scoring, scales=scales)
    return table.merge(pd.DataFrame(sizes, columns=["run", "cell", "role", "width"]), on="run")


def counted(runs):
    """Return how many images the scores of `runs` use, as two texts: training images that samples
    are compared with, and validation images that are reconstructed.

    Where runs differ, a text lists the numbers: "128 and 2000".
    """
    counts = {"reference_count": set(), "images": set()}
    for run in runs:
        table = scores(run)
        source = Path(run.config["data"]["source"]).name
        table = table[(table.reference == source) | (table.metric == "psnr")]
        for column, numbers in counts.items():
            values = table[column]
            numbers.add(values[values <= num_real(run.config["recipe"])].max())
    return tuple(
        " and ".join(f"{number:.0f}" for number in sorted(numbers)) for numbers in counts.values()
    )


def results(name, preset="scenes", seeds=(0, 1, 2), scoring=Scoring(), transfer=False):
    """Return the measurements of a study's runs, one row per run and metric.

    Columns: cell, role, seed, run, metric, value. Raises MissingRuns with the runs that are missing
    or not scored, and the command that trains and scores them.
    """
    chosen = members(name, preset, seeds, transfer=transfer)
    scoring = of_study(name, preset, scoring)
    existing = set(run_names())
    lines = []
    lacking = []
    for member in chosen:
        values = measured(member.name, preset, scoring) if member.name in existing else {}
        if not SCORED | {"ntp_loss"} <= values.keys():
            lacking.append(member.name)
        lines += [
            (member.cell.title, member.role, member.seed, member.name, metric, value)
            for metric, value in values.items()
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
    """Return the table of `results` as "mean +- standard deviation" over seeds, with one row per
    cell and role and one column per metric.
    """
    groups = table.groupby(["cell", "role", "metric"], sort=False).value
    spreads = groups.std().map(lambda spread: "" if np.isnan(spread) else f" +- {spread:.2g}")
    text = groups.mean().map("{:.4g}".format) + spreads
    present = set(table.metric)
    metrics = [metric for metric in TITLES if metric in present]
    return text.unstack("metric")[metrics].rename(columns=TITLES)


# -- rate and distortion ---------------------------------------------------------------------------


def rate_distortion(runs):
    """Return what a generator's run pays for an image and how well its tokenizer draws it, one row
    per run and validated step.

    runs: a pattern of names, or Runs. Columns: run, seed, step, bits, the mean length of an image's
    tokens under the generator (next-token loss times tokens, over ln 2), and psnr, of
    reconstructions in dB. Next-token losses of two tokenizers cannot be compared without it: a
    tokenizer that says less is predicted better.
    """
    lines = []
    for run in open_runs(runs) if isinstance(runs, str) else runs:
        log = run.metrics()
        for row in log.dropna(subset=["val/ntp_loss", "val/psnr"]).itertuples(index=False):
            values = dict(zip(log.columns, row))
            bits = values["val/ntp_loss"] * math.prod(token_grid(run.config)) / math.log(2)
            lines.append((run.name, run.config["seed"], values["step"], bits, values["val/psnr"]))
    return pd.DataFrame(lines, columns=["run", "seed", "step", "bits", "psnr"])


def code_lengths(runs, images=8_000):
    """Return the prequential code length of the tokenizers that runs train or read, one row per
    run: see `gear.analysis.code_length`.

    runs: a pattern of names, or Runs. Columns: run, seed, nats, the mean length per image of the
    first `images` training images. A length is missing where the tokenizer's run has neither the
    kept table nor weights to compute it.
    """
    lines = []
    for run in open_runs(runs) if isinstance(runs, str) else runs:
        source = run if run.config["stage"] != "generator" else run.config["tokenizer_run"]
        try:
            table = code_length(Run.open(source) if isinstance(source, str) else source, images)
            nats = nats_per_image(table)
        except MissingRuns:
            nats = math.nan
        lines.append((run.name, run.config["seed"], nats))
    return pd.DataFrame(lines, columns=["run", "seed", "nats"])
