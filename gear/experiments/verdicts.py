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
verdict stand the p-value of the bound, and the verdict corrected for the number of comparisons made
together: by Holm among the claims on a preset's runs, so that none of those that stay is likely to
be chance; by Benjamini and Hochberg within a study, so that few are. Each table begins with how
many of its comparisons chance alone would decide.
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
    """Judge paired differences (n,) by a claim: `sign` times their mean exceeds `margin`.

    A sign of 0 claims that the mean lies within the margin about zero; None claims nothing, and the
    verdict is "". Returns the columns of a comparison: seeds, difference (the mean), spread (their
    standard deviation), low, high (95 % interval), margin, agree (seeds that go the claimed way), p
    (two-sided, of the claim's nearest bound), verdict.
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
    return sign * difference > margin if sign else abs(difference) < margin


def family(comparisons, correct=holm):
    """Return a table of comparisons (rows of `compare`), corrected for their number.

    Columns more: p_corrected, the p-value by `correct`, and verdict_corrected, the verdict by it.
    """
    table = pd.DataFrame(comparisons, columns=None if comparisons else ["verdict", "p", "margin"])
    table["p_corrected"] = correct(table.p)
    is_lost = table.verdict.isin(DECIDED) & (table.p_corrected > LEVEL)
    return table.assign(verdict_corrected=table.verdict.mask(is_lost, UNDECIDED))


def by_chance(table):
    """Return how many comparisons of a family chance alone would call reproduced, and as many
    contradicted, were there no difference anywhere.

    A claimed direction is met by chance in LEVEL / 2 of the cases. Claims with a margin are not
    counted: without any difference they hold, or fail, for good reason.
    """
    return float(LEVEL / 2 * (table.p.notna() & (table.margin == 0)).sum())


def tally(table, correct=holm):
    """Say how many comparisons of a family chance alone would decide, and count its verdicts,
    before and after correction.
    """
    judged = table[table.verdict != ""]
    reproduced, contradicted = (sum(judged.verdict == verdict) for verdict in DECIDED)
    corrected = [sum(judged.verdict_corrected == verdict) for verdict in DECIDED]
    directed = int((judged.p.notna() & (judged.margin == 0)).sum())
    first = f"Of {directed} claimed directions chance alone would reproduce about"
    first += f" {by_chance(judged):.1f} and contradict as many. Of all {judged.p.notna().sum()}"
    first += f" comparisons {reproduced} are reproduced, {corrected[0]} after"
    words = [f"{first} {CORRECTIONS[correct]} correction"]
    words.append(f"{contradicted} contradicted, {corrected[1]} after it")
    others = judged.verdict[~judged.verdict.isin(DECIDED)].value_counts()
    return "; ".join([*words, *(f"{count} {verdict}" for verdict, count in others.items())])


def claims(preset="scenes", label="", scoring=Scoring()):
    """Judge every claim on the finished runs PRESET-RECIPE-sN (or -sN-LABEL), paired by seed, their
    samples scored by `scoring`.

    Returns a table, one row per claim and baseline: claim, paper, statistic, against, method and
    baseline (means over seeds), the columns of `compare` and `family`, and needs: the command that
    makes what the row lacks, "" if nothing.
    """
    pairs = [(claim, baseline) for claim in CLAIMS for baseline in claim.baselines]
    return family([_claim(claim, baseline, preset, label, scoring) for claim, baseline in pairs])


def _claim(claim, baseline, preset, label, scoring):
    ours = _by_seed(RunName(preset, claim.method, label))
    theirs = _by_seed(RunName(preset, baseline, label)) if baseline else ours
    seeds, needs = sorted(ours.keys() & theirs.keys()), ""
    try:
        pairs = [_values(claim, baseline, ours[seed], theirs[seed], scoring) for seed in seeds]
    except MissingRuns as missing:
        pairs, needs = [], missing.command
    method, other = np.array(pairs, dtype=float).reshape(-1, 2).T
    row = {"claim": claim.sentence.format(against=AGAINST[baseline]), "paper": claim.where}
    row |= {"statistic": claim.statistic, "against": AGAINST[baseline]}
    row |= {"method": method.mean() if pairs else math.nan}
    row |= {"baseline": other.mean() if pairs else math.nan}
    return row | compare(method - other, claim.sign, claim.margin) | {"needs": needs}


def _values(claim, baseline, run, other, scoring):
    """Return a claim's statistic of a run and of its baseline. What is compared with no run, and a
    statistic of both runs together, is compared with zero.
    """
    if claim.statistic in PAIRED:
        return PAIRED[claim.statistic](run, other, scoring), 0.0
    statistic = STATISTICS[claim.statistic]
    return statistic(run, scoring), statistic(other, scoring) if baseline else 0.0


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
    return family(rows, benjamini_hochberg)


def claims_in_words(table):
    """Phrase the table of `claims` in lines for a terminal."""
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
    """Write the table of `claims` as Markdown, after the count of its verdicts."""
    titles = "claim", "paper", "statistic", "difference [95 %]", "seeds", "p", "verdict", "by Holm"
    lines = [f"{tally(table)}.", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
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
    """Write docs/results.md: the table of `claims`, and what every study says, in Markdown.

    Studies are those of the preset's own runs: with a `label` they are left out.
    """
    names = STUDIES if preset in PRESETS and not label else ()
    options = "".join(f" {word}" for word in changed_words(scoring))
    options += f" --label {label}" if label else ""
    return f"""# What the runs say of the paper

For those who want to know what holds at this scale. Written by
`gear claims {preset}{options} --out docs/results.md` from small-scale runs of `{preset}`.

Differences are paired by seed, and the 95 % interval of their mean judges. *Reproduced*: all of the
interval lies on the side that the paper claims. *Contradicted*: all of it lies on the other side.
*Undecided*: it reaches to both sides. *Not testable*: there are fewer than three seeds. With three
seeds it takes a large effect. The p-value is that of the bound, two-sided.

"GEAR" is the joint stage's own generator and tokenizer; "a fresh generator on GEAR's tokenizer" is
trained anew, as in the paper's Tables 1 to 3 and Fig. 3. "The warm-up" is the tokenizer that both
start from, "the control" the warm-up trained on for as long as GEAR, unguided (of generators: a
generator on that), "half the codes" a tokenizer with K / 2, trained as long as the control.
LlamaGen-REPA is a generator on the warm-up, trained for as long as GEAR's at the same rates.

## Claims

{claims_as_markdown(table)}

## Ablations

Each difference that the paper's tables print, by the same rule; each study is one family for
Benjamini and Hochberg's correction. "By chance" is how many directions of how many comparisons
chance alone would meet, and as many the other way.

{studies_as_markdown(names, preset, scoring)}

Metrics: Fréchet distance, precision and recall of samples (`fd`, `precision`, `recall`), PSNR, SSIM
and Fréchet distance of reconstructions (`psnr`, `ssim`, `rfd`). GEAR against LlamaGen-REPA at the
preset's own setting is one comparison and stands in several of the paper's tables: it is counted in
each.
"""


def directions_in_words(table):
    """Count the verdicts of `directions`, and name those that are decided, with their intervals."""
    lines = [f"{tally(table, benjamini_hochberg)} (differences that the paper prints)"]
    for verdict, rows in table[table.verdict != ""].groupby("verdict", sort=True):
        if verdict in DECIDED:
            sizes = [f" {_size(row)}" for row in rows.itertuples()]
            rows = rows.assign(metric=rows.metric + sizes)
            lines.append(f"  {verdict} ({len(rows)}): {_named(rows)}")
    return "\n".join(lines)


def studies_as_markdown(names, preset="scenes", scoring=Scoring()):
    """Judge studies over seeds 0, 1, 2: a Markdown table of verdicts, one line per study."""
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
    """Name lines of `directions`, those of a cell together."""
    names = []
    for (cell, other), part in rows.groupby(["cell", "against"], sort=False):
        subject = f"{cell} against {other}" if against else cell
        names.append(f"{subject}: {', '.join(part.metric)}")
    return "; ".join(names)
