"""What a study's runs say: every cell's scores over seeds, and whether they move as the paper's table does."""

import functools
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from gear.analysis.profiles import published
from gear.config import Count, MissingRuns, Samples, UserError, check_value, from_dict
from gear.data import DataConfig, open_source
from gear.data.stores import DOWNLOADS
from gear.data.trained import place_of
from gear.evaluation.evaluate import EvaluateOptions, scores
from gear.experiments.claims import MIN_SEEDS, interval
from gear.experiments.studies import SAMPLES, members, space, study
from gear.generator.sampling import Guidance
from gear.runs.run import Run, open_runs, run_names

REFERENCE = EvaluateOptions.reference_count  # images that samples are compared with, and that are reconstructed
DECIDED = "as in the paper", "the other way"
SCORED = {"fd", "precision", "recall", "psnr", "ssim", "rfd"}  # what an evaluation of samples and reconstructions leaves
PUBLISHED = {"fd": "gFID", "precision": "Prec.", "recall": "Rec.", "psnr": "PSNR", "ssim": "SSIM", "rfd": "rFID"}
TITLES = {
    "fd": "Fréchet distance", "precision": "precision", "recall": "recall", "psnr": "PSNR (dB)", "ssim": "SSIM",
    "rfd": "Fréchet, reconstructions", "ntp_loss": "next-token loss (nats)", "predictable": "H - NTP (nats)",
    "align_loss": "alignment loss", "usage_entropy": "usage H (nats)",
}  # fmt: skip


def measured(name, preset, count=SAMPLES, cfg_scale=1.0, step=None):
    """Return {metric of TITLES: value} of a run, whatever of it is there: logged while it trained, and in metrics.json.

    Samples are those of `count`, `cfg_scale` and seed 0, without top-k or top-p, at `step` (default: the last one), against
    REFERENCE images of its own; as many are reconstructed, at the last step. A source with fewer gives all it has.
    """
    run = Run.open(name)
    network, last, log, table = space(preset), run.config["steps"], run.metrics(), scores(run)
    data = from_dict(DataConfig, run.config["data"])
    at, found = step or last, {}
    for row in log[log.step == at].to_dict("records"):
        found = {key: row[f"val/{key}"] for key in ("ntp_loss", "align_loss", "usage_entropy") if f"val/{key}" in row}
    if {"ntp_loss", "usage_entropy"} <= found.keys():
        found["predictable"] = found["usage_entropy"] - found["ntp_loss"]
    inception = network == "inception"
    names = {"gfid" if inception else f"fd_{network}": "fd", "rfid" if inception else f"rfd_{network}": "rfd"}
    drawn = dict(count=count, cfg_scale=cfg_scale, seed=0, temperature=1.0, top_k=0, top_p=1.0, step=at, network=network)
    drawn["reference"] = Path(data.source).name
    data = replace(data, source=place_of(run))
    whole = DataConfig(data.source, data.image_size)  # as an evaluation opens its reference
    rows = _of_all(table, drawn, "reference_count", whole, "train")
    found |= _scores(rows, names | {"precision": "precision", "recall": "recall"})
    rows = _of_all(table, dict(split="val", step=last), "images", data, "val")
    return found | _scores(rows, names | {"psnr": "psnr", "ssim": "ssim"})


def _scores(rows, names):
    return {names[metric]: value for metric, value in zip(rows.metric, rows.value) if metric in names}


def _of_all(table, wanted, key, config, split):
    """Return the lines of a table that have the values `wanted` and, as `key`, REFERENCE images or all that the split has."""
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
    """Return what runs, a pattern or Runs, scored without guidance at `steps`, and at the last one with each of `scales`.

    Columns: run, seed, step, cfg_scale, metric, value. Raises MissingRuns for the first of these scores that is missing,
    naming the runs that lack it and the command that makes them.
    """
    check_value("count", count, Samples)
    check_value("steps", tuple(steps), tuple[Count, ...])
    check_value("cfg_scale", tuple(scales), tuple[Guidance, ...])
    lines, lacking = [], {}
    for run in open_runs(runs) if isinstance(runs, str) else runs:
        config, preset = run.config, run.config["recipe"]
        for step, scale in sorted({*((s, 1.0) for s in steps), *((config["steps"], s) for s in scales)}):
            values = measured(run.name, preset, count, scale, step)
            if "fd" not in values:
                lacking.setdefault((space(preset), step, scale), []).append(run.name)
            lines += [(run.name, config["seed"], step, scale, metric, value) for metric, value in values.items()]
    for (network, step, scale), names in lacking.items():
        what = f"--steps {step}" if scale == 1 else f"--sweep cfg_scale={','.join(f'{s:g}' for s in scales)}"
        command = f"gear evaluate {' '.join(names)} --network {network} --both --count {count} {what}"
        told = ", ".join(f"'{name}'" for name in names)
        sentence = f"no run {told} with scores of {count} samples at step {step}, guidance {scale:g}"
        raise MissingRuns(sentence, names, command)
    return pd.DataFrame(lines, columns=["run", "seed", "step", "cfg_scale", "metric", "value"])


def by_size(preset, seeds, count=SAMPLES, scales=(1.0,)):
    """Return `quality` of the runs of the size study: its columns, and cell, role and width. Raises as `results` does, too."""
    results("size", preset, seeds, count)
    found = members("size", preset, seeds)
    sizes = [(m.name, m.cell.title, m.role, m.planned[-1][1].generator.width) for m in found]
    table = quality([Run.open(member.name) for member in found], count, scales=scales)
    return table.merge(pd.DataFrame(sizes, columns=["run", "cell", "role", "width"]), on="run")


def counted(runs):
    """Say how many images scores count, in words: (training images compared with, validation images reconstructed)."""
    own = []
    for run in runs:
        table, source = scores(run), Path(run.config["data"]["source"]).name
        own.append(table[(table.reference == source) | (table.metric == "psnr")])
    numbers = [sorted({t[key][t[key] <= REFERENCE].max() for t in own}) for key in ("reference_count", "images")]
    return tuple(" and ".join(f"{number:.0f}" for number in found) for found in numbers)


def results(name, preset="scenes", seeds=(0, 1, 2), count=SAMPLES):
    """Return what a study's runs measured, a line each: cell, role, seed, run, metric, value.

    Raises MissingRuns naming the runs that are missing, or not scored, and the command that makes them.
    """
    check_value("count", count, Samples)
    found = members(name, preset, seeds)
    there, lacking = set(run_names()), []
    lines = []
    for member in found:
        values = measured(member.name, preset, count) if member.name in there else {}
        lacking += [member.name] if not SCORED | {"ntp_loss"} <= values.keys() else []
        lines += [(member.cell.title, member.role, member.seed, member.name, m, v) for m, v in values.items()]
    if lacking:
        command = f"gear sweep {name} --preset {preset} --seeds {','.join(map(str, seeds))}"
        command += f" --count {count}" if count != SAMPLES else ""
        raise MissingRuns(f"the study '{name}' needs {', '.join(lacking)}, trained and scored", lacking, command)
    return pd.DataFrame(lines, columns=["cell", "role", "seed", "run", "metric", "value"])


def printed(name, preset="scenes"):
    """Return what the paper prints of a study's cells, a line a value: cell, role, metric (ours), value."""
    chosen = study(name)
    table = published(chosen.table)
    values = {(row.row, row.column.removesuffix(" w/o CFG")): float(row.value) for row in table.itertuples()}
    lines = []
    for cell in chosen.cells(preset):
        rows = {"gear": cell.published}
        if chosen.own_baseline:
            rows["baseline"] = cell.published.removesuffix(", +GEAR")
        lines += [
            (cell.title, role, metric, values[row, column])
            for role, row in rows.items()
            for metric, column in PUBLISHED.items()
            if (row, column) in values
        ]
    if chosen.published_baseline:
        shared = ((metric, values.get((chosen.published_baseline, column))) for metric, column in PUBLISHED.items())
        lines += [("LlamaGen-REPA", "baseline", metric, value) for metric, value in shared if value is not None]
    return pd.DataFrame(lines, columns=["cell", "role", "metric", "value"])


def directions(table, name, preset="scenes"):
    """Compare a study's differences with the paper's: a line a cell and metric, from the table of `results`.

    Columns: cell, against, metric, paper (its difference), seeds, agree (seeds that move as the paper does), difference, low,
    high (mean and 95 % interval over seeds, paired, Student's t), verdict: "as in the paper" if all seeds agree and the
    interval excludes zero, "the other way" if it excludes zero on the other side, else "undecided". A difference is that of a
    cell from the study's reference, or where each cell has a baseline, of GEAR from that; where the paper's table prints one
    baseline for all, from that, too.
    """
    chosen = study(name)
    reference = next((c.title for c in chosen.cells(preset) if c.published == chosen.reference), None)
    ours = table.pivot_table(index="seed", columns=["metric", "cell", "role"], values="value")
    theirs = printed(name, preset).set_index(["metric", "cell", "role"]).value
    lines = []
    for cell in chosen.cells(preset):
        others = {"its baseline": (cell.title, "baseline")} if chosen.own_baseline else {reference: (reference, "gear")}
        if chosen.published_baseline:
            others["LlamaGen-REPA"] = ("LlamaGen-REPA", "baseline")
        for (against, other), metric in itertools.product(others.items(), TITLES):
            own = metric, cell.title, "gear"
            if other == own[1:] or own not in ours or (metric, *other) not in ours:
                continue
            paper = theirs.get(own, math.nan) - theirs.get((metric, *other), math.nan)
            difference = (ours[own] - ours[(metric, *other)]).dropna()
            mean, _, low, high = interval(difference)
            agree = int((np.sign(difference) == np.sign(paper)).sum()) if paper == paper else math.nan
            line = cell.title, against, metric, paper, len(difference), agree, mean, low, high
            lines.append((*line, _verdict(paper, difference, low, high)))
    columns = ["cell", "against", "metric", "paper", "seeds", "agree", "difference", "low", "high", "verdict"]
    return pd.DataFrame(lines, columns=columns)


def _verdict(paper, difference, low, high):
    if not paper or paper != paper:
        return ""
    if len(difference) < MIN_SEEDS:
        return f"not testable: {len(difference)} seed{'' if len(difference) == 1 else 's'}"
    if low <= 0 <= high:
        return "undecided"
    agrees = bool((np.sign(difference) == np.sign(paper)).all())
    return DECIDED[0] if agrees else DECIDED[1] if np.sign(difference.mean()) != np.sign(paper) else "undecided"


def summary(table):
    """Return the table of `results` as mean +- standard deviation over seeds, a row a cell and role, a column a metric."""
    groups = table.groupby(["cell", "role", "metric"], sort=False).value
    mean, spread = groups.mean(), groups.std()
    text = mean.map("{:.4g}".format) + spread.map(lambda s: "" if s != s else f" +- {s:.2g}")
    return text.unstack("metric")[[m for m in TITLES if m in set(table.metric)]].rename(columns=TITLES)


def told(found):
    """Count verdicts of `directions` in words, and name what goes as in the paper and what the other way, with its interval."""
    judged = found[found.verdict != ""]
    lines = [f"{len(judged)} differences that the paper's table has, too, each tested by itself:"]
    for verdict, rows in judged.groupby("verdict", sort=True):
        sized = verdict in DECIDED
        values = [f" {r.difference:+.2g} [{r.low:+.2g}, {r.high:+.2g}]" if sized else "" for r in rows.itertuples()]
        lines.append(f"  {verdict} ({len(rows)}): {_named(rows.assign(metric=rows.metric + values))}")
    return "\n".join(lines)


def _named(rows, against=True):
    """Name lines of `directions`, those of a cell together."""
    groups = rows.groupby(["cell", "against"], sort=False)
    return "; ".join(
        f"{cell}{f' against {other}' if against else ''}: {', '.join(part.metric)}" for (cell, other), part in groups
    )


def markdown(studies, preset="scenes", count=SAMPLES):
    """Return how the differences of `studies` went over seeds 0, 1, 2, as a Markdown table, a study a line: the README's."""
    lines = [f"| study | in the paper | {' | '.join(DECIDED)} | undecided |", "|---|---|---|---|---|"]
    for name in studies:
        found = directions(results(name, preset, count=count), name, preset)
        parts = [found[found.verdict == verdict] for verdict in DECIDED]
        words = [f"{len(part)} ({_named(part, found.against.nunique() > 1)})" if len(part) else "0" for part in parts]
        lines.append(f"| `{name}` | Table {study(name).table} | {' | '.join(words)} | {sum(found.verdict == 'undecided')} |")
    return "\n".join(lines)
