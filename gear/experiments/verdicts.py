"""Verdicts on the paper's claims and ablations, computed from our runs by one judge.

A comparison is the mean difference of a statistic between a method's runs and a baseline's, paired
by seed. The paper says on which side of a bound it lies (zero, or a margin beyond it), or that it
lies within a margin about zero. The 95 % interval of the mean (Student's t) judges:

  reproduced    it lies wholly where the paper says
  contradicted  it lies wholly elsewhere
  undecided     a bound lies inside it
  not testable  there are fewer than three seeds

With three seeds the interval reaches 2.5 standard deviations either way: it takes a large effect,
and the seeds of a decided comparison all agree (so do four; of five, one may not). Beside the
verdict stand the p-value of the bound, and the verdict after Holm's correction for a family of
comparisons: the claims judged on a preset's runs, or a study's differences that the paper prints.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd

from gear.experiments.claims import AGAINST, CLAIMS, STATISTICS
from gear.experiments.published import printed
from gear.experiments.recipes import run_name
from gear.experiments.results import TITLES, results
from gear.experiments.studies import SAMPLES, study
from gear.measures.paired import LEVEL, Effect, effect, equivalence, holm, p_value
from gear.runs.names import RunName
from gear.runs.run import Run, run_names

MIN_SEEDS = 3
DECIDED = REPRODUCED, CONTRADICTED = "reproduced", "contradicted"
UNDECIDED = "undecided"


def compare(differences, sign, margin=0.0):
    """Judge paired differences (n,) by a claim: `sign` times their mean exceeds `margin`.

    A sign of 0 claims that the mean lies within the margin about zero; None claims nothing, and the
    verdict is "". Returns the columns of a comparison: seeds, difference (the mean), spread (their
    standard deviation), low, high (95 % interval), agree (seeds that go the claimed way), p
    (two-sided, of the claim's nearest bound), verdict.
    """
    row = dict(zip(("seeds", "difference", "spread", "low", "high"), effect(differences)))
    seeds = row["seeds"]
    if sign is None:
        return row | {"agree": math.nan, "p": math.nan, "verdict": ""}
    row["agree"] = sum(_is_claimed(difference, sign, margin) for difference in differences)
    if seeds < MIN_SEEDS:
        reason = f"not testable: {seeds} seed{'' if seeds == 1 else 's'}"
        return row | {"p": math.nan, "verdict": reason}
    p = p_value(differences, sign * margin) if sign else equivalence(differences, margin)
    decided = REPRODUCED if _is_claimed(row["difference"], sign, margin) else CONTRADICTED
    return row | {"p": p, "verdict": decided if p <= LEVEL else UNDECIDED}


def _is_claimed(difference, sign, margin):
    return sign * difference > margin if sign else abs(difference) < margin


def family(comparisons):
    """Return a table of comparisons (rows of `compare`), corrected for their number.

    Columns more: p_holm, the corrected p-value, and verdict_holm, the verdict by it.
    """
    table = pd.DataFrame(comparisons, columns=None if comparisons else ["verdict", "p"])
    table["p_holm"] = holm(table.p)
    is_lost = table.verdict.isin(DECIDED) & (table.p_holm > LEVEL)
    return table.assign(verdict_holm=table.verdict.mask(is_lost, UNDECIDED))


def tally(table):
    """Count the verdicts of a family in words, before and after Holm's correction."""
    judged = table[table.verdict != ""]
    reproduced, contradicted = (sum(judged.verdict == verdict) for verdict in DECIDED)
    by_holm = [sum(judged.verdict_holm == verdict) for verdict in DECIDED]
    words = [f"{reproduced} of {len(judged)} reproduced, {by_holm[0]} after Holm's correction"]
    words.append(f"{contradicted} contradicted, {by_holm[1]} after it")
    others = judged.verdict[~judged.verdict.isin(DECIDED)].value_counts()
    return "; ".join([*words, *(f"{count} {verdict}" for verdict, count in others.items())])


def claims(preset="scenes", label=""):
    """Judge every claim on the finished runs PRESET-RECIPE-sN (or -sN-LABEL), paired by seed.

    Returns a table, one row per claim and baseline: claim, paper, statistic, against, method and
    baseline (means over seeds), and the columns of `compare` and `family`.
    """
    pairs = [(claim, baseline) for claim in CLAIMS for baseline in claim.baselines]
    return family([_claim(claim, baseline, preset, label) for claim, baseline in pairs])


def _claim(claim, baseline, preset, label):
    statistic, against = STATISTICS[claim.statistic], AGAINST[baseline]
    ours = _by_seed(RunName(preset, claim.method, label))
    theirs = _by_seed(RunName(preset, baseline, label)) if baseline else ours
    seeds = sorted(ours.keys() & theirs.keys())
    method = pd.Series([statistic(ours[seed]) for seed in seeds], dtype=float)
    other = pd.Series([statistic(theirs[seed]) if baseline else 0.0 for seed in seeds], dtype=float)
    row = {"claim": claim.sentence.format(against=against), "paper": claim.where}
    row |= {"statistic": claim.statistic, "against": against}
    row |= {"method": method.mean(), "baseline": other.mean()}
    return row | compare(method - other, claim.sign, claim.margin)


def _by_seed(unseeded):
    """Return {seed: run} of the finished runs whose name is a RunName, but for its seed."""
    names = {name: run_name(name) for name in run_names()}
    seeded = [
        name
        for name, parts in names.items()
        if parts.seed is not None and replace(parts, seed=None) == unseeded
    ]
    runs = [Run.open(name) for name in seeded]
    return {run.config["seed"]: run for run in runs if run.logged_step >= run.config["steps"]}


def directions(table, name, preset="scenes"):
    """Judge a study by the table of its `results`: does each difference go the paper's way?

    Returns a table, one row per cell and metric: cell, against, metric, paper (its difference; if
    it prints none, nothing is claimed), and the columns of `compare` and `family`. A difference is
    that of a cell from the study's reference or, where each cell has a baseline, of GEAR from that;
    where the paper's table prints one baseline for all cells, of GEAR from that, too.
    """
    chosen = study(name)
    cells = chosen.cells(preset)
    reference = next((c.title for c in cells if c.published == chosen.reference), None)
    ours = table.pivot_table(index="seed", columns=["metric", "cell", "role"], values="value")
    theirs = printed(name, preset).set_index(["metric", "cell", "role"]).value
    rows = []
    for cell in cells:
        others = {reference: (reference, "gear")}
        if chosen.own_baseline:
            others = {"its baseline": (cell.title, "baseline")}
        if chosen.published_baseline:
            others["LlamaGen-REPA"] = ("LlamaGen-REPA", "baseline")
        for (against, other), metric in itertools.product(others.items(), TITLES):
            gear, baseline = (metric, cell.title, "gear"), (metric, *other)
            if gear == baseline or not {gear, baseline} <= set(ours.columns):
                continue
            paper = theirs.get(gear, math.nan) - theirs.get(baseline, math.nan)
            sign = None if math.isnan(paper) or paper == 0 else np.sign(paper)
            row = {"cell": cell.title, "against": against, "metric": metric, "paper": paper}
            rows.append(row | compare((ours[gear] - ours[baseline]).dropna(), sign))
    return family(rows)


def claims_in_words(table):
    """Phrase the table of `claims` in lines for a terminal."""
    lines = []
    for row in table.itertuples():
        lines.append(f"{row.verdict:24} {row.claim}" + (f" ({row.paper})" if row.paper else ""))
        if row.seeds:
            values = f"{row.statistic}: {row.method:.4g} against {row.baseline:.4g}, {_size(row)}"
            lines.append(f"{'':24} {values}, {row.agree} of {row.seeds} seeds agree{_tested(row)}")
    return "\n".join(lines)


def _size(row):
    return str(Effect(row.seeds, row.difference, row.spread, row.low, row.high))


def _tested(row):
    if math.isnan(row.p):
        return ""
    return f", p = {row.p:.2g}, {row.verdict_holm} after Holm's correction"


def claims_as_markdown(table):
    """Write the table of `claims` as Markdown, and count its verdicts."""
    titles = "claim", "paper", "statistic", "difference [95 %]", "seeds", "p", "verdict", "by Holm"
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in table.fillna({"paper": ""}).itertuples():
        cells = [row.claim, row.paper, row.statistic, _size(row), f"{row.agree} of {row.seeds}"]
        cells += [f"{row.p:.2g}", row.verdict, row.verdict_holm]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{tally(table)}."])


def directions_in_words(table):
    """Count the verdicts of `directions`, and name those that are decided, with their intervals."""
    lines = [f"Differences that the paper prints: {tally(table)}"]
    for verdict, rows in table[table.verdict != ""].groupby("verdict", sort=True):
        if verdict in DECIDED:
            sizes = [f" {_size(row)}" for row in rows.itertuples()]
            rows = rows.assign(metric=rows.metric + sizes)
        lines.append(f"  {verdict} ({len(rows)}): {_named(rows)}")
    return "\n".join(lines)


def studies_as_markdown(names, preset="scenes", count=SAMPLES):
    """Judge studies over seeds 0, 1, 2: a Markdown table of verdicts, one line per study."""
    titles = ["study", "in the paper", *DECIDED, UNDECIDED]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in names:
        table = directions(results(name, preset, count=count), name, preset)
        cells = [f"`{name}`", f"Table {study(name).table}"]
        for verdict in DECIDED:
            rows, corrected = table[table.verdict == verdict], sum(table.verdict_holm == verdict)
            subjects = _named(rows, table.against.nunique() > 1)
            cells.append(f"{len(rows)}, {corrected} after Holm ({subjects})" if len(rows) else "0")
        lines.append(f"| {' | '.join(cells)} | {sum(table.verdict == UNDECIDED)} |")
    return "\n".join(lines)


def _named(rows, against=True):
    """Name lines of `directions`, those of a cell together."""
    names = []
    for (cell, other), part in rows.groupby(["cell", "against"], sort=False):
        subject = f"{cell} against {other}" if against else cell
        names.append(f"{subject}: {', '.join(part.metric)}")
    return "; ".join(names)
