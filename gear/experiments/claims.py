"""The paper's claims as data, each evaluated on our runs: value, spread, paired difference, null or floor, verdict.

A claim compares one statistic of two sets of runs, seed by seed. Its verdict is computed: "reproduced" when the paired
difference goes the claimed way on every seed, by more than the claim's margin, and its 95 % interval (Student's t) excludes
zero; where two things should be alike, when the interval lies within the margin; "not testable" with fewer than three seeds;
otherwise "not reproduced". With three seeds the interval is 2.5 standard deviations either way: it takes a large effect.
Where the paper has no control we ask for more than it does: a method has to beat the warm-up, the control and, where fewer
codes alone might do, a tokenizer with half of them: each a row.
"""

import math
from dataclasses import dataclass, replace

import pandas as pd

from gear.analysis.profiles import alignment_floors, layer_profile, tokenizer_profile
from gear.experiments.recipes import run_name
from gear.runs.names import RunName
from gear.runs.run import Run, run_names

MIN_SEEDS = 3
AGAINST = {  # what a baseline is called
    "llamagen-repa": "warm-up", "llamagen-repa-control": "control", "llamagen-repa-half": "half the codes",
    "tokenizer": "warm-up", "control": "control", "joint": "soft bridge", "": "floor",
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    name: str
    where: str  # in the paper
    statistic: str  # a key of STATISTICS
    method: str  # recipe whose runs should show it
    baseline: str  # recipe they are compared with, seed by seed; "": with zero, the statistic holds its own floor
    sign: int  # of method - baseline, as claimed; 0: they should be equal within `margin`
    margin: float = 0.0  # the difference the claim is about


def last(metric):
    """Return a statistic that reads the last logged value of a run's metric."""
    return lambda run: run.metrics()[metric].dropna().iloc[-1]


def above_null(level, metric, profile=layer_profile, layer=None):
    """Return a statistic of a layer (by default the last): alignment to the teacher above its null."""

    def statistic(run):
        table = profile(run)
        at = table.layer.max() if layer is None else layer
        row = table[(table.layer == at) & (table.level == level) & (table.metric == metric)].iloc[0]
        return row.value - row.null

    return statistic


def distance_to_teacher(metric):
    """Return a statistic of the last layer's maps: how far from the teacher's own value they are."""

    def statistic(run):
        table = layer_profile(run).query(f"metric == '{metric}'").set_index("layer").value
        return abs(table[table.index.max()] - table[-1])

    return statistic


def above_floor(run):
    """Return a run's alignment loss minus what class and position alone reach."""
    return last("val/align_loss")(run) - alignment_floors(run).set_index("predictor").value["class and position"]


STATISTICS = {
    "next-token loss (nats a token)": last("val/ntp_loss"),
    "alignment loss": last("val/align_loss"),
    "alignment loss minus the floor": above_floor,
    "H - NTP (nats a token)": lambda run: last("val/usage_entropy")(run) - last("val/ntp_loss")(run),
    "PSNR (dB)": last("val/psnr"),
    "usage entropy (nats)": last("val/usage_entropy"),
    "patch CKNNA above null": above_null("patch", "cknna"),
    "patch CKA above null": above_null("patch", "cka"),
    "content CKA above null": above_null("content", "cka"),
    "image CKA above null": above_null("image", "cka"),
    "Moran's I, distance to teacher": distance_to_teacher("moran"),
    "high-frequency ratio, distance to teacher": distance_to_teacher("high_frequency"),
    "tokenizer's patch CKA, before": above_null("patch", "cka", tokenizer_profile, "pre"),
    "tokenizer's patch CKA, after": above_null("patch", "cka", tokenizer_profile, "post"),
    "tokenizer's image CKA, after": above_null("image", "cka", tokenizer_profile, "post"),
}

SETTLED, ALL = ("llamagen-repa", "llamagen-repa-control"), ("llamagen-repa", "llamagen-repa-control", "llamagen-repa-half")
CLAIMS = [
    Claim(name, where, statistic, method, baseline, sign, margin)
    for name, where, statistic, method, baselines, sign, margin in [
        ("a fresh generator predicts tokens better", "Fig. 3a", "next-token loss (nats a token)", "gear", ALL, -1, 0.0),
        ("and not only because tokens carry less", "Fig. 3a", "H - NTP (nats a token)", "gear", ALL, +1, 0.0),
        ("a fresh generator aligns better", "Fig. 3b", "alignment loss", "gear", ALL, -1, 0.0),
        ("and by more than class and position give", "", "alignment loss minus the floor", "gear", [""], -1, 0.0),
        ("code usage sharpens", "Fig. 4d", "usage entropy (nats)", "gear", SETTLED, -1, 0.0),
        ("reconstruction is kept, within .3 dB (the paper's loses .28)", "Table 8", "PSNR (dB)", "gear", SETTLED, 0, 0.3),
        ("per patch, deep layers are nearer the teacher", "Fig. 5d", "patch CKNNA above null", "gear", ALL, +1, 0.0),
        ("and by the other measure", "Fig. 5e", "patch CKA above null", "gear", ALL, +1, 0.0),
        ("the same without each position's mean", "Fig. 5e", "content CKA above null", "gear", ALL, +1, 0.0),
        ("per image, they are alike, within .05", "Fig. 5b", "image CKA above null", "gear", SETTLED, 0, 0.05),
        ("locality moves toward the teacher", "Fig. 5c", "Moran's I, distance to teacher", "gear", SETTLED, -1, 0.0),
        ("high frequencies too", "Fig. 5f", "high-frequency ratio, distance to teacher", "gear", SETTLED, -1, 0.0),
        ("the tokenizer itself is less like the teacher, per patch", "Table 4", "tokenizer's patch CKA, before", "joint",
         ("tokenizer", "control"), -1, 0.0),
        ("and after quantisation", "Table 4", "tokenizer's patch CKA, after", "joint", ("tokenizer", "control"), -1, 0.0),
        ("and per image", "Table 4", "tokenizer's image CKA, after", "joint", ("tokenizer", "control"), -1, 0.0),
    ]
    for baseline in baselines
] + [
    Claim(name, where, statistic, method, "joint", -1, margin)
    for name, where, statistic, method, margin in [
        ("NTP through inputs and targets collapses the codes, by a nat on every seed", "Fig. 1", "usage entropy (nats)",
         "joint-naive", 1.0),
        ("and reconstruction, by 3 dB on every seed (the paper's loses 8)", "Table 7", "PSNR (dB)", "joint-naive", 3.0),
        ("NTP through inputs alone collapses the codes, by a nat", "Fig. 1", "usage entropy (nats)", "joint-naive-inputs", 1.0),
        ("straight-through alignment does, by a nat", "Table 7", "usage entropy (nats)", "joint-straight-through", 1.0),
    ]
]  # fmt: skip


def evaluate(preset="scenes", label=""):
    """Evaluate every claim on the finished runs PRESET-RECIPE-sN (or -sN-LABEL), pairing runs of one seed.

    Returns a table, a row a claim and baseline: claim, paper, statistic, against, seeds, agree (seeds that go the claimed
    way), method and baseline (means over seeds), difference, its spread (standard deviation over seeds), low, high (95 %
    interval), verdict.
    """
    return pd.DataFrame([_evaluate(claim, preset, label) for claim in CLAIMS])


def _evaluate(claim, preset, label):
    ours = _by_seed(RunName(preset, claim.method, label))
    theirs = _by_seed(RunName(preset, claim.baseline, label)) if claim.baseline else ours
    statistic, seeds = STATISTICS[claim.statistic], sorted(ours.keys() & theirs.keys())
    method = pd.Series([statistic(ours[s]) for s in seeds], dtype=float)
    baseline = pd.Series([statistic(theirs[s]) if claim.baseline else 0.0 for s in seeds], dtype=float)
    difference = method - baseline
    mean, spread, low, high = interval(difference)
    row = {"claim": claim.name, "paper": claim.where, "statistic": claim.statistic, "against": AGAINST[claim.baseline]}
    agree = (claim.sign * difference > claim.margin) if claim.sign else (abs(difference) < claim.margin)
    row |= {"seeds": len(seeds), "agree": int(agree.sum()), "method": method.mean(), "baseline": baseline.mean()}
    row |= {"difference": mean, "spread": spread, "low": low, "high": high}
    return row | {"verdict": verdict(claim, difference)}


def interval(difference):
    """Return mean, standard deviation and the 95 % interval (Student's t) of paired differences, a Series, one a seed."""
    import scipy.special  # .2 s, which a figure without an interval does not wait for

    n, mean, spread = len(difference), difference.mean(), difference.std()
    half = scipy.special.stdtrit(n - 1, 0.975) * spread / math.sqrt(n) if n > 1 else math.nan
    return mean, spread, mean - half, mean + half


def verdict(claim, difference):
    """Judge a claim by its paired differences (a Series, one a seed): see the module's first lines."""
    n = len(difference)
    if n < MIN_SEEDS:
        return f"not testable: {n} seed{'' if n == 1 else 's'}"
    _, _, low, high = interval(difference)
    if claim.sign == 0:
        holds = max(-low, high) < claim.margin
    else:
        holds = (claim.sign * difference > claim.margin).all() and not low <= 0 <= high
    return "reproduced" if holds else "not reproduced"


def markdown(table):
    """Write the table of `evaluate` as Markdown, a row a claim and a column a baseline: verdict, difference [95 %], seeds."""
    columns = ["warm-up", "control", "half the codes", "other"]
    lines = [
        "| claim: *statistic* | paper | against the warm-up | the control | half the codes | other |",
        "|---|---|---|---|---|---|",
    ]
    for (claim, statistic, paper), rows in table.fillna({"paper": ""}).groupby(["claim", "statistic", "paper"], sort=False):
        cells = dict.fromkeys(columns, "")
        for row in rows.itertuples():
            place = row.against if row.against in columns else "other"
            where = f" ({row.against})" if place == "other" else ""
            interval = f" [{row.low:+.3g}, {row.high:+.3g}]" if row.seeds > 1 else ""
            cells[place] = f"{row.verdict}: {row.difference:+.3g}{interval}, {row.agree} of {row.seeds}{where}"
        lines.append(f"| {claim}: *{statistic}* | {paper} | " + " | ".join(cells.values()) + " |")
    return "\n".join(lines)


def _by_seed(wanted):
    """Return {seed: run} of the finished runs that a RunName without a seed stands for."""
    named = {name: run_name(name) for name in run_names()}
    seeded = [name for name, parts in named.items() if parts.seed is not None and replace(parts, seed=None) == wanted]
    runs = [Run.open(name) for name in seeded]
    return {run.config["seed"]: run for run in runs if run.logged_step >= run.config["steps"]}


def told(table):
    """Phrase the table of `evaluate` in lines for a terminal."""
    lines = []
    for row in table.itertuples():
        lines.append(f"{row.verdict:24} {row.claim}, against {row.against}" + (f" ({row.paper})" if row.paper else ""))
        if row.seeds:
            interval = f" [{row.low:+.3g}, {row.high:+.3g}]" if row.seeds > 1 else ""
            difference = f"{row.method:.4g} against {row.baseline:.4g}, {row.difference:+.3g}{interval}"
            lines.append(f"{'':24} {row.statistic}: {difference}, {row.agree} of {row.seeds} seeds agree")
    return "\n".join(lines)
