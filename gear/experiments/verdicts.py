"""Verdicts on the paper's claims and ablations, computed from our runs by one rule.

A comparison is the mean difference of a statistic between the runs of a method and those of a
baseline, paired by seed. A claim places this difference in a region: beyond a bound on one side
(zero, or a margin from zero), or within a margin around zero. The verdict compares the 95 %
interval of the mean (Student's t) with the region:

  reproduced    the interval lies entirely inside the claimed region
  contradicted  the interval lies entirely outside the claimed region
  undecided     the interval contains a bound of the region
  not testable  there are fewer than three seeds

With three seeds the interval extends 2.5 standard deviations to either side. Only a large effect is
decided then, and all seeds of a decided comparison agree (also with four seeds; with five, one may
disagree). Each verdict comes with the p-value of the nearest bound, and with a verdict corrected
for the number of comparisons in its family. The claims on a preset's runs are one family, corrected
by Holm: probably none of its corrected verdicts is due to chance. Each study is one family,
corrected by Benjamini and Hochberg: few of its corrected verdicts are due to chance. Each table
begins with the number of comparisons that chance alone would decide.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd

from gear.config import MissingRuns, changed_words
from gear.experiments.claims import AGAINST, CLAIMS, PAIRED, STATISTICS
from gear.experiments.published import printed
from gear.experiments.recipes import run_name
from gear.experiments.results import TITLES, results
from gear.experiments.studies import PRESETS, STUDIES, Scoring, study
from gear.measures.paired import (
    LEVEL,
    Effect,
    benjamini_hochberg,
    effect,
    equivalence,
    holm,
    p_value,
)
from gear.runs.names import RunName
from gear.runs.run import Run, run_names

MIN_SEEDS = 3
CORRECTIONS = {holm: "Holm's", benjamini_hochberg: "Benjamini and Hochberg's"}
DECIDED = REPRODUCED, CONTRADICTED = "reproduced", "contradicted"
UNDECIDED = "undecided"


def compare(differences, sign, margin=0.0):
    """Judge paired differences (n,) by the claim that `sign` times their mean exceeds `margin`.

    A `sign` of 0 claims that the mean lies within `margin` of zero; None claims nothing, and the
    verdict is "". Returns a comparison as a dict: seeds, difference (the mean), spread (standard
    deviation of the differences), low and high (the 95 % interval), margin, agree (number of seeds
    that agree with the claim), p (two-sided, of the nearest bound of the claim), verdict.
    """
    row = dict(zip(("seeds", "difference", "spread", "low", "high"), effect(differences)))
    row["margin"] = margin
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
    """Return whether a difference lies in the claimed region."""
    return sign * difference > margin if sign else abs(difference) < margin


def family(comparisons, correct=holm):
    """Return the table of a family of comparisons (rows of `compare`), corrected for their number.

    It has two more columns: p_corrected, the p-value corrected by `correct`, and verdict_corrected,
    the verdict by that p-value.
    """
    table = pd.DataFrame(comparisons, columns=None if comparisons else ["verdict", "p", "margin"])
    table["p_corrected"] = correct(table.p)
    loses_verdict = table.verdict.isin(DECIDED) & (table.p_corrected > LEVEL)
    return table.assign(verdict_corrected=table.verdict.mask(loses_verdict, UNDECIDED))


def by_chance(table):
    """Return the expected number of comparisons in a family that are reproduced by chance if no
    statistic differs; as many are contradicted.

    A claimed direction is reproduced by chance with probability LEVEL / 2. Claims with a margin are
    not counted: if nothing differs, their verdict is correct and not chance.
    """
    return float(LEVEL / 2 * (table.p.notna() & (table.margin == 0)).sum())


def contradictions_as_markdown(table):
    """List what the paper claims and the runs contradict, with intervals, as Markdown; claims of
    ours are left out.
    """
    rows = table.fillna({"paper": ""})
    rows = rows[(rows.verdict == "contradicted") & (rows.paper != "")]
    if rows.empty:
        return "Nothing that the paper claims is contradicted."
    return "\n".join(
        f"- {row.claim} ({row.paper}). Here the {row.statistic} differs by {_size(row)}; "
        f"{row.verdict_corrected} after Holm's correction."
        for row in rows.itertuples()
    )


def tally(table, correct=holm):
    """Return a sentence that counts the verdicts of a family, before and after correction, and the
    number that chance alone would decide.
    """
    judged = table[table.verdict != ""]
    reproduced, contradicted = (sum(judged.verdict == verdict) for verdict in DECIDED)
    corrected = [sum(judged.verdict_corrected == verdict) for verdict in DECIDED]
    directed = int((judged.p.notna() & (judged.margin == 0)).sum())
    first = f"Of {directed} claimed directions chance alone would reproduce about"
    first += f" {by_chance(judged):.1f} and contradict as many. Of all {judged.p.notna().sum()}"
    first += f" comparisons {reproduced} are reproduced, {corrected[0]} after"
    parts = [f"{first} {CORRECTIONS[correct]} correction"]
    parts.append(f"{contradicted} contradicted, {corrected[1]} after it")
    rest = judged.verdict[~judged.verdict.isin(DECIDED)].value_counts()
    return "; ".join([*parts, *(f"{count} {verdict}" for verdict, count in rest.items())])


def claims(preset="scenes", label="", scoring=Scoring()):
    """Judge every claim on the finished runs PRESET-METHOD-sN (or -sN-LABEL), paired by seed, with
    samples scored by `scoring`.

    Returns a table with one row per claim and compared recipe. Columns: claim, paper, statistic,
    against, method and baseline (means over seeds), the columns of `compare` and `family`, and
    needs: the command that computes a missing score, "" if none is missing.
    """
    pairs = [(claim, baseline) for claim in CLAIMS for baseline in claim.baselines]
    return family([_claim(claim, baseline, preset, label, scoring) for claim, baseline in pairs])


def _claim(claim, baseline, preset, label, scoring):
    """Return the row of `claims` for a claim and one of its baselines."""
    method_runs = _by_seed(RunName(preset, claim.method, label))
    baseline_runs = _by_seed(RunName(preset, baseline, label)) if baseline else method_runs
    seeds = sorted(method_runs.keys() & baseline_runs.keys())
    needs = ""
    try:
        pairs = [
            _values(claim, baseline, method_runs[seed], baseline_runs[seed], scoring)
            for seed in seeds
        ]
    except MissingRuns as missing:
        pairs = []
        needs = missing.command
    method_values, baseline_values = np.array(pairs, dtype=float).reshape(-1, 2).T
    row = {
        "claim": claim.sentence.format(against=AGAINST[baseline]),
        "paper": claim.paper,
        "statistic": claim.statistic,
        "against": AGAINST[baseline],
        "method": method_values.mean() if pairs else math.nan,
        "baseline": baseline_values.mean() if pairs else math.nan,
    }
    comparison = compare(method_values - baseline_values, claim.sign, claim.margin)
    return row | comparison | {"needs": needs}


def _values(claim, baseline, run, baseline_run, scoring):
    """Return a claim's statistic of a run and the value to compare it with.

    That value is the statistic of the baseline's run. It is zero if the claim has no baseline, or
    if the statistic is one of both runs together.
    """
    if claim.statistic in PAIRED:
        return PAIRED[claim.statistic](run, baseline_run, scoring), 0.0
    statistic = STATISTICS[claim.statistic]
    return statistic(run, scoring), statistic(baseline_run, scoring) if baseline else 0.0


def _by_seed(unseeded):
    """Return {seed: run} of the finished runs whose RunName is `unseeded` with any seed."""
    names = {name: run_name(name) for name in run_names()}
    seeded = [
        name
        for name, parts in names.items()
        if parts.seed is not None and replace(parts, seed=None) == unseeded
    ]
    runs = [Run.open(name) for name in seeded]
    return {run.config["seed"]: run for run in runs if run.logged_step >= run.config["steps"]}


def directions(table, name, preset="scenes"):
    """Judge whether the differences in the `results` of a study have the signs of the paper's.

    A difference is that between a cell and the study's reference cell or, if each cell has its own
    baseline, that between GEAR and this baseline. If the paper's table prints one baseline for all
    cells, the difference between GEAR and that baseline is judged too.

    Returns a table with one row per comparison and metric. Columns: cell, against, metric, paper
    (the paper's difference; NaN claims nothing), and the columns of `compare` and `family`.
    """
    chosen = study(name)
    cells = chosen.cells(preset)
    reference = next((cell.title for cell in cells if cell.published == chosen.reference), None)
    key = ["metric", "cell", "role"]
    measured = table.pivot_table(index="seed", columns=key, values="value")
    published = printed(name, preset).set_index(key).value
    rows = []
    for cell in cells:
        compared = {reference: (reference, "gear")}  # name -> (cell, role)
        if chosen.own_baseline:
            compared = {"its baseline": (cell.title, "baseline")}
        if chosen.published_baseline:
            compared["LlamaGen-REPA"] = ("LlamaGen-REPA", "baseline")
        for (against, cell_and_role), metric in itertools.product(compared.items(), TITLES):
            gear = (metric, cell.title, "gear")
            baseline = (metric, *cell_and_role)
            if gear == baseline or not {gear, baseline} <= set(measured.columns):
                continue
            paper = published.get(gear, math.nan) - published.get(baseline, math.nan)
            sign = None if math.isnan(paper) or paper == 0 else np.sign(paper)
            row = {"cell": cell.title, "against": against, "metric": metric, "paper": paper}
            rows.append(row | compare((measured[gear] - measured[baseline]).dropna(), sign))
    return family(rows, benjamini_hochberg)


def claims_in_words(table):
    """Return the table of `claims` as lines of text for a terminal."""
    lines = []
    for row in table.itertuples():
        lines.append(f"{row.verdict:24} {row.claim}" + (f" ({row.paper})" if row.paper else ""))
        if row.seeds:
            values = f"{row.statistic}: {row.method:.4g} against {row.baseline:.4g}, {_size(row)}"
            agree = "" if row.verdict == "" else f", {row.agree:.0f} of {row.seeds} seeds agree"
            lines.append(f"{'':24} {values}{agree}{_tested(row)}")
        if row.needs:
            lines.append(f"{'':24} needs: {row.needs}")
    return "\n".join(lines)


def _size(row):
    return str(Effect(row.seeds, row.difference, row.spread, row.low, row.high))


def _tested(row):
    if math.isnan(row.p):
        return ""
    return f", p = {row.p:.2g}, {row.verdict_corrected} after Holm's correction"


def claims_as_markdown(table):
    """Return the table of `claims` in Markdown."""
    titles = ["claim", "paper", "statistic", "difference [95 % interval]", "seeds that agree", "p"]
    titles += ["verdict", "corrected by Holm"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in table.fillna({"paper": ""}).itertuples():
        cells = [row.claim, row.paper, row.statistic]
        if row.seeds == 0:
            cells += ["", "", "", f"needs `{row.needs}`" if row.needs else row.verdict, ""]
        elif row.verdict == "":
            cells += [_size(row), f"{row.seeds}", "", "", ""]
        else:
            cells += [_size(row), f"{row.agree:.0f} of {row.seeds}", f"{row.p:.2g}"]
            cells += [row.verdict, row.verdict_corrected]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def results_page(table, preset="scenes", label="", scoring=Scoring()):
    """Return the text of docs/results.md: the table of `claims` and the verdicts of every study.

    A study has no runs with a `label`, so that studies are left out if there is one.
    """
    names = STUDIES if preset in PRESETS and not label else ()
    options = "".join(f" {word}" for word in changed_words(scoring))
    options += f" --label {label}" if label else ""
    return f"""# Which of the paper's claims hold in our runs

This page is for you if you want to know which of the paper's claims hold at a small scale.
`gear claims {preset}{options} --out docs/results.md` wrote it from small-scale runs of `{preset}`.

{tally(table)}.

## What the paper claims and these runs contradict

{contradictions_as_markdown(table)}

## How a claim is judged

A claim is about the difference of a statistic between two kinds of runs, paired by seed. The 95 %
interval of the mean difference gives the verdict:

- *reproduced*: the whole interval lies where the paper claims that the difference lies;
- *contradicted*: the whole interval lies elsewhere;
- *undecided*: the interval contains a bound of the claimed region;
- *not testable*: there are fewer than three seeds.

With three seeds only a large effect is decided. The p-value is two-sided and belongs to the nearest
bound of the claimed region. A claim without an entry in the column "paper" is ours.

Names of runs:

- *GEAR's generator* and *GEAR's tokenizer* are those of the joint stage.
- *A fresh generator on GEAR's tokenizer* is trained from random weights on the frozen tokenizer, as
  in the paper's Tables 1 to 3 and Fig. 3.
- *The warm-up tokenizer* is the tokenizer from which GEAR and the control start.
- *The control tokenizer* is the warm-up tokenizer, trained further without guidance for as many
  steps as GEAR.
- *The tokenizer with half the codes* has K / 2 codes and trains from random weights for as many
  steps as warm-up and control together.
- *The baseline (LlamaGen-REPA)* is a generator trained on the warm-up tokenizer, for as many steps
  as GEAR's generator and at the same learning rates.

## Claims

{claims_as_markdown(table)}

## Ablations

The same rule judges each difference that the paper's tables print. Each study is one family for
Benjamini and Hochberg's correction. The column "by chance" gives the number of differences, out of
all, that chance alone would reproduce; it would contradict as many.

{studies_as_markdown(names, preset, scoring)}

Metrics: Fréchet distance, precision and recall of samples (`fd`, `precision`, `recall`), PSNR, SSIM
and Fréchet distance of reconstructions (`psnr`, `ssim`, `rfd`). The comparison of GEAR with the
baseline (LlamaGen-REPA) at the preset's own setting appears in several of the paper's tables and is
counted in each.
"""


def directions_in_words(table):
    """Return the table of `directions` as text: the count of its verdicts, and the decided
    comparisons with their intervals.
    """
    lines = [f"{tally(table, benjamini_hochberg)} (differences that the paper prints)"]
    for verdict, rows in table[table.verdict != ""].groupby("verdict", sort=True):
        if verdict in DECIDED:
            sizes = [f" {_size(row)}" for row in rows.itertuples()]
            rows = rows.assign(metric=rows.metric + sizes)
            lines.append(f"  {verdict} ({len(rows)}): {_named(rows)}")
    return "\n".join(lines)


def studies_as_markdown(names, preset="scenes", scoring=Scoring()):
    """Judge studies on the seeds 0, 1, 2; returns a Markdown table with one row per study."""
    titles = ["study", "in the paper", "by chance", *DECIDED, UNDECIDED]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in names:
        cells = [f"`{name}`", f"Table {study(name).table}"]
        try:
            table = directions(results(name, preset, scoring=scoring), name, preset)
        except MissingRuns as missing:
            lines.append(f"| {' | '.join(cells)} | needs `{missing.command}` | | | |")
            continue
        judged = table[table.verdict != ""]
        cells.append(f"{by_chance(judged):.1f} of {len(judged)}")
        for verdict in DECIDED:
            rows = table[table.verdict == verdict]
            corrected = sum(rows.verdict_corrected == verdict)
            subjects = _named(rows, table.against.nunique() > 1)
            cells.append(f"{len(rows)}, {corrected} corrected ({subjects})" if len(rows) else "0")
        lines.append(f"| {' | '.join(cells)} | {sum(table.verdict == UNDECIDED)} |")
    return "\n".join(lines)


def _named(rows, against=True):
    """Return the cells and metrics of rows of `directions` as text, grouped by cell.

    With `against`, the text also names what each cell is compared with.
    """
    names = []
    for (cell, compared), part in rows.groupby(["cell", "against"], sort=False):
        subject = f"{cell} against {compared}" if against else cell
        names.append(f"{subject}: {', '.join(part.metric)}")
    return "; ".join(names)
