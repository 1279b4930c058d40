"""The paper's claims as data, each evaluated on our runs: value, spread, paired difference, floor, verdict.

A claim compares one statistic of two sets of runs, seed by seed. Its verdict is computed: "reproduced" when the paired
difference goes the claimed way on every seed, by more than the claim's margin, and its 95 % interval (Student's t) excludes
zero; where two things should be alike, when the interval lies within the margin; "not testable" with fewer than three seeds;
otherwise "not reproduced". With three seeds the interval is 2.5 standard deviations either way: it takes a large effect.
Where the paper has no control we ask for more than it does: a method has to beat the warm-up and the control, each a row.
"""

import math
from dataclasses import dataclass

import pandas as pd
from scipy import stats

from gear.analysis.tables import layer_profile
from gear.run import open_runs, run_names

MIN_SEEDS = 3


@dataclass(frozen=True)
class Claim:
    name: str
    where: str  # in the paper
    statistic: str  # a key of STATISTICS
    method: str  # recipe whose runs should show it
    baseline: str  # recipe they are compared with, seed by seed
    sign: int  # of method - baseline, as claimed; 0: they should be equal within `margin`
    margin: float = 0.0  # the difference the claim is about


def last(metric, scale=1.0):
    """Return a statistic that reads the last logged value of a run's metric."""
    return lambda run: scale * run.metrics()[metric].dropna().iloc[-1]


def above_null(level, metric):
    """Return a statistic of the last layer: alignment to the teacher above its null."""

    def statistic(run):
        table = layer_profile(run)
        row = table[(table.layer == table.layer.max()) & (table.level == level) & (table.metric == metric)].iloc[0]
        return row.value - row.null

    return statistic


def distance_to_teacher(metric):
    """Return a statistic of the last layer's maps: how far from the teacher's own value they are."""

    def statistic(run):
        table = layer_profile(run).query(f"metric == '{metric}'").set_index("layer").value
        return abs(table[table.index.max()] - table[-1])

    return statistic


STATISTICS = {
    "next-token loss (nats a token)": last("val/ntp_loss"),
    "alignment loss": last("val/align_loss"),
    "H - NTP (nats a token)": lambda run: last("val/usage_entropy")(run) - last("val/ntp_loss")(run),
    "PSNR (dB)": last("val/psnr"),
    "usage entropy (nats)": last("val/usage_entropy"),
    "used codes, effective": last("val/usage_size"),
    "patch CKNNA above null": above_null("patch", "cknna"),
    "patch CKA above null": above_null("patch", "cka"),
    "image CKA above null": above_null("image", "cka"),
    "Moran's I, distance to teacher": distance_to_teacher("moran"),
    "high-frequency ratio, distance to teacher": distance_to_teacher("high_frequency"),
}

BASELINES = {"llamagen-repa": "the warm-up", "llamagen-repa-control": "the control"}
CLAIMS = [
    Claim(f"{name}, against {who}", where, statistic, "gear", baseline, sign, margin)
    for name, where, statistic, sign, margin in [
        ("a fresh generator predicts tokens better", "Fig. 3a", "next-token loss (nats a token)", -1, 0.0),
        ("and not only because tokens carry less", "Fig. 3a", "H - NTP (nats a token)", +1, 0.0),
        ("a fresh generator aligns better", "Fig. 3b", "alignment loss", -1, 0.0),
        ("code usage sharpens", "Fig. 4d", "usage entropy (nats)", -1, 0.0),
        ("reconstruction is kept, within .3 dB (the paper's loses .28)", "Table 8", "PSNR (dB)", 0, 0.3),
        ("per patch, deep layers are nearer the teacher (CKNNA)", "Fig. 5d", "patch CKNNA above null", +1, 0.0),
        ("per patch, deep layers are nearer the teacher (CKA)", "Fig. 5e", "patch CKA above null", +1, 0.0),
        ("per image, they are alike, within .05", "Fig. 5b", "image CKA above null", 0, 0.05),
        ("locality moves toward the teacher", "Fig. 5c", "Moran's I, distance to teacher", -1, 0.0),
        ("high frequencies move toward the teacher", "Fig. 5f", "high-frequency ratio, distance to teacher", -1, 0.0),
    ]
    for baseline, who in BASELINES.items()
] + [
    Claim(
        "the naive bridge collapses, by more than a nat",
        "Fig. 1, Table 7",
        "usage entropy (nats)",
        "joint-naive",
        "joint",
        -1,
        1.0,
    ),
]


def evaluate(preset="scenes"):
    """Evaluate every claim on the runs PRESET-RECIPE-sN that exist, pairing runs of one seed.

    Returns a table, a row a claim: claim, paper, statistic, seeds, agree (seeds that go the claimed way), method and baseline
    (means over seeds), difference, its spread (standard deviation over seeds), low, high (95 % interval), verdict.
    """
    return pd.DataFrame([_evaluate(claim, preset) for claim in CLAIMS])


def _evaluate(claim, preset):
    ours, theirs = (_by_seed(f"{preset}-{recipe}") for recipe in (claim.method, claim.baseline))
    statistic, seeds = STATISTICS[claim.statistic], sorted(ours.keys() & theirs.keys())
    method, baseline = (pd.Series([statistic(runs[s]) for s in seeds], dtype=float) for runs in (ours, theirs))
    difference = method - baseline
    mean, spread = difference.mean(), difference.std()
    half = stats.t.ppf(0.975, len(seeds) - 1) * spread / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan
    row = {"claim": claim.name, "paper": claim.where, "statistic": claim.statistic, "seeds": len(seeds)}
    row["agree"] = int((claim.sign * difference > claim.margin).sum() if claim.sign else (abs(difference) < claim.margin).sum())
    row |= {"method": method.mean(), "baseline": baseline.mean(), "difference": mean, "spread": spread}
    return row | {"low": mean - half, "high": mean + half, "verdict": verdict(claim, difference)}


def verdict(claim, difference):
    """Judge a claim by its paired differences (a Series, one a seed): see the module's first lines."""
    n = len(difference)
    if n < MIN_SEEDS:
        return f"not testable: {n} seed{'' if n == 1 else 's'}"
    half = stats.t.ppf(0.975, n - 1) * difference.std() / math.sqrt(n)
    if claim.sign == 0:
        holds = abs(difference.mean()) + half < claim.margin
    else:
        signed = claim.sign * difference
        holds = (signed > claim.margin).all() and signed.mean() - half > 0
    return "reproduced" if holds else "not reproduced"


def _by_seed(recipe):
    return {run.config["seed"]: run for name in run_names(f"{recipe}-s[0-9]") for run in open_runs(name)}
