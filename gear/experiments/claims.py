"""The paper's claims as data: which statistic of which runs differs from which others', and how.

As in the paper, "GEAR" is the joint stage's own generator and tokenizer wherever it studies
representations or ablates (Figs. 1a, 4, 5, Tables 4 to 14), and a fresh generator on that tokenizer
in Fig. 3 and Table 1 (Sec. 4.1). Where the paper has no control we ask for more than it does: a
method has to beat the baseline, the control and, where fewer codes alone might do, a tokenizer with
half of them. `verdicts` judges.
"""

import math
from dataclasses import dataclass

import pandas as pd

from gear.analysis.profiles import alignment_floors, layer_profile, tokenizer_profile
from gear.config import MissingRuns
from gear.evaluation.evaluate import scores
from gear.experiments.results import TITLES, logged, measured, scoring_words
from gear.measures.speedup import speedup


@dataclass(frozen=True)
class Claim:
    sentence: str  # {against} stands for the baseline
    where: str  # in the paper, with its value if it prints one; "": the claim is ours
    statistic: str  # a key of STATISTICS, or of PAIRED
    method: str  # recipe whose runs should show it
    baselines: tuple  # recipes they are compared with; "": zero, the statistic being above a floor
    sign: int | None  # of method - baseline, as claimed; 0: equal within `margin`; None: nothing is
    margin: float = 0.0  # the difference the claim is about


# A statistic is a function of a run and of how its samples are scored (Scoring).


def last(metric):
    """Return a statistic that reads what validation logged of a metric at a run's last step."""
    return lambda run, scoring: logged(run)[metric]


def scored(metric):
    """Return a statistic that reads what `gear evaluate` measured of a run at its last step."""

    def statistic(run, scoring):
        preset = run.config["recipe"]
        values = measured(run.name, preset, scoring)
        if metric not in values:
            words = scoring_words(preset, run.config, scoring)
            command = f"gear evaluate {run.name} {' '.join(words)}"
            raise MissingRuns(f"no {TITLES[metric]} of run '{run.name}'", [run.name], command)
        return values[metric]

    return statistic


def above_null(level, metric, profile=layer_profile, layer=None):
    """Return a statistic: alignment to the teacher above its null, at a `layer` of `profile`.

    By default the mean over the generator's mid-to-deep layers, from the tap to the last; "tap" is
    the tap alone.
    """

    def statistic(run, scoring):
        table = profile(run)
        rows = table[(table.level == level) & (table.metric == metric)].set_index("layer")
        return (rows.value - rows.null).loc[_layers(run, layer)].mean()

    return statistic


def distance_to_teacher(metric):
    """Return a statistic of maps: their distance to the teacher's own value, averaged over the
    generator's layers from the tap to the last.
    """

    def statistic(run, scoring):
        table = layer_profile(run).query(f"metric == '{metric}'").set_index("layer").value
        return (table.loc[_layers(run)] - table[-1]).abs().mean()

    return statistic


def _layers(run, layer=None):
    generator = run.config["generator"]
    if layer is None:
        return list(range(generator["tap_layer"], generator["layers"] + 1))
    return [generator["tap_layer"] if layer == "tap" else layer]


def above_floor(run, scoring):
    """Return a run's alignment loss minus the lowest of its floors: what no look at the image
    reaches.
    """
    return logged(run)["align_loss"] - alignment_floors(run).value.min()


def sooner(curve):
    """Return a statistic of a run and its baseline: the logarithm of how many times sooner the
    run's `curve` reaches the end of the baseline's (Fig. 3).

    Where it never does, the value is negative: minus the logarithm of how many times sooner the
    baseline reaches the run's end.
    """

    def statistic(run, baseline, scoring):
        method, other = curve(run, scoring), curve(baseline, scoring)
        steps = method.index.intersection(other.index)
        ahead = speedup(steps, other[steps], method[steps]).value
        if ahead is not None:
            return math.log(ahead)
        return -math.log(speedup(steps, method[steps], other[steps]).value)

    return statistic


def training_curve(metric):
    """Return a function of a run: the losses that it logged of a metric in training, by step."""

    def curve(run, scoring):
        values = run.metrics().set_index("step")[metric].dropna()
        return values[values.index > 0]

    return curve


def sample_curve(run, scoring):
    """Return the Fréchet distances of a run's samples, by the steps at which it was scored.

    Raises MissingRuns where there are fewer than three.
    """
    preset, steps = run.config["recipe"], scores(run)
    steps = sorted(steps.step.dropna().astype(int).unique()) if "step" in steps else []
    values = {step: measured(run.name, preset, scoring, step=step) for step in steps}
    curve = pd.Series({step: v["fd"] for step, v in values.items() if "fd" in v}, dtype=float)
    if len(curve) < 3:
        quarters = [f"{run.config['steps'] * k // 4}" for k in (1, 2, 3, 4)]
        words = [*scoring_words(preset, run.config, scoring), "--steps", *quarters]
        command = f"gear evaluate {run.name} {' '.join(words)}"
        raise MissingRuns(f"run '{run.name}' is not scored at three steps", [run.name], command)
    return curve


STATISTICS = {
    "next-token loss (nats a token)": last("ntp_loss"),
    "alignment loss": last("align_loss"),
    "alignment loss minus the floor": above_floor,
    "H - NTP (nats a token)": last("predictable"),
    "Fréchet distance of samples": scored("fd"),
    "PSNR (dB)": last("psnr"),
    "SSIM": scored("ssim"),
    "Fréchet distance of reconstructions": scored("rfd"),
    "posterior entropy at tau (nats)": last("assignment_tau_entropy"),
    "posterior top-1 mass at tau": last("assignment_tau_top1"),
    "posterior top-10 mass at tau": last("assignment_tau_top10"),
    "usage entropy (nats)": last("usage_entropy"),
    "patch CKNNA above null": above_null("patch", "cknna"),
    "patch CKA above null": above_null("patch", "cka"),
    "content CKA above null": above_null("content", "cka"),
    "patch CKA above null, layer 0": above_null("patch", "cka", layer=0),
    "image CKNNA above null": above_null("image", "cknna"),
    "image CKA above null": above_null("image", "cka"),
    "image CKNNA above null, tap": above_null("image", "cknna", layer="tap"),
    "image CKA above null, tap": above_null("image", "cka", layer="tap"),
    "Moran's I, distance to teacher": distance_to_teacher("moran"),
    "high-frequency ratio, distance to teacher": distance_to_teacher("high_frequency"),
} | {
    f"tokenizer's {level} {title}, {words}": above_null(level, metric, tokenizer_profile, side)
    for title, metric in (("CKNNA", "cknna"), ("CKA", "cka"))
    for level in ("image", "patch")
    for side, words in (("pre", "before"), ("post", "after"))
}
PAIRED = {  # statistics of a run and its baseline together; a claim is about their mean
    "log speed-up of next-token loss": sooner(training_curve("ntp_loss")),
    "log speed-up of alignment loss": sooner(training_curve("align_loss")),
    "log speed-up of samples": sooner(sample_curve),
}

AGAINST = {  # what a baseline is called
    "llamagen-repa": "LlamaGen-REPA", "llamagen-repa-control": "the control",
    "llamagen-repa-half": "half the codes", "tokenizer": "the warm-up",
    "control": "the control", "joint": "the soft bridge", "": "the floor",
}  # fmt: skip
SETTLED = ("llamagen-repa", "llamagen-repa-control")
ALL = (*SETTLED, "llamagen-repa-half")
TOKENIZERS = ("tokenizer", "control")
FRESH = "a fresh generator on GEAR's tokenizer"
MIDDLE = "mid-to-deep layers and teacher"
CLAIMS = [
    Claim("Fréchet distance of samples is lower for GEAR than for {against}",
          "Fig. 1a", "Fréchet distance of samples", "joint", SETTLED, -1),
    Claim("Fréchet distance of samples reaches the end of {against} sooner for GEAR",
          "Fig. 1a: up to 10 times", "log speed-up of samples", "joint", SETTLED[:1], +1),
    Claim(f"Fréchet distance of samples is lower for {FRESH} than for {{against}}",
          "Table 1", "Fréchet distance of samples", "gear", SETTLED, -1),
    Claim(f"Next-token loss is lower for {FRESH} than for {{against}}",
          "Fig. 3a", "next-token loss (nats a token)", "gear", ALL, -1),
    Claim(f"Next-token loss reaches the end of {{against}} sooner for {FRESH}",
          "Fig. 3a", "log speed-up of next-token loss", "gear", SETTLED[:1], +1),
    Claim(f"H - NTP is higher for {FRESH} than for {{against}}",
          "", "H - NTP (nats a token)", "gear", ALL, +1),
    Claim(f"Alignment loss is lower for {FRESH} than for {{against}}",
          "Fig. 3b", "alignment loss", "gear", ALL, -1),
    Claim(f"Alignment loss reaches the end of {{against}} sooner for {FRESH}",
          "Fig. 3b", "log speed-up of alignment loss", "gear", SETTLED[:1], +1),
    Claim(f"Alignment loss of {FRESH} is lower than {{against}} of what sees no image",
          "", "alignment loss minus the floor", "gear", ("",), -1),
    Claim("PSNR of GEAR's tokenizer is within 0.3 dB of that of {against}",
          "Table 8: -0.28 dB", "PSNR (dB)", "joint", TOKENIZERS, 0, 0.3),
    Claim("SSIM of GEAR's tokenizer is within 0.01 of that of {against}",
          "Table 8: -0.007", "SSIM", "joint", TOKENIZERS, 0, 0.01),
    Claim("Fréchet distance of reconstructions is lower for GEAR's tokenizer than for {against}",
          "Table 8: -0.08", "Fréchet distance of reconstructions", "joint", TOKENIZERS, -1),
    Claim("Posterior entropy at tau is lower in GEAR's tokenizer than in {against}",
          "Fig. 4d", "posterior entropy at tau (nats)", "joint", TOKENIZERS, -1),
    Claim("Posterior top-1 mass at tau is higher in GEAR's tokenizer than in {against}",
          "Fig. 4a", "posterior top-1 mass at tau", "joint", TOKENIZERS, +1),
    Claim("Posterior top-10 mass at tau is higher in GEAR's tokenizer than in {against}",
          "Fig. 4b", "posterior top-10 mass at tau", "joint", TOKENIZERS, +1),
    Claim("Usage entropy of hard indices is lower in GEAR's tokenizer than in {against}",
          "", "usage entropy (nats)", "joint", TOKENIZERS, -1),
    Claim(f"Patch CKNNA of {MIDDLE} is higher in GEAR than with {{against}}",
          "Fig. 5d", "patch CKNNA above null", "joint", SETTLED, +1),
    Claim(f"Patch CKA of {MIDDLE} is higher in GEAR than with {{against}}",
          "Fig. 5e", "patch CKA above null", "joint", SETTLED, +1),
    Claim(f"Content CKA of {MIDDLE}, position taken away, is higher in GEAR than with {{against}}",
          "", "content CKA above null", "joint", SETTLED, +1),
    Claim("Patch CKA of layer 0, the tokens' embeddings alone, differs between GEAR and {against}",
          "", "patch CKA above null, layer 0", "joint", SETTLED, None),
    Claim(f"Image CKNNA of {MIDDLE} is within 0.05 of that with {{against}}",
          "Fig. 5a", "image CKNNA above null", "joint", SETTLED, 0, 0.05),
    Claim(f"Image CKA of {MIDDLE} is within 0.05 of that with {{against}}",
          "Fig. 5b", "image CKA above null", "joint", SETTLED, 0, 0.05),
    Claim("Image CKNNA of the aligned layer and teacher is within 0.05 of that with {against}",
          "Fig. 5a", "image CKNNA above null, tap", "joint", SETTLED, 0, 0.05),
    Claim("Image CKA of the aligned layer and teacher is within 0.05 of that with {against}",
          "Fig. 5b", "image CKA above null, tap", "joint", SETTLED, 0, 0.05),
    Claim("Moran's I of mid-to-deep layers is nearer the teacher's in GEAR than with {against}",
          "Fig. 5c", "Moran's I, distance to teacher", "joint", SETTLED, -1),
    Claim("High-frequency ratio of mid-to-deep layers is nearer the teacher's in GEAR than with "
          "{against}",
          "Fig. 5f", "high-frequency ratio, distance to teacher", "joint", SETTLED, -1),
    *(Claim(f"{level.capitalize()} {metric} of GEAR's tokenizer and teacher {side} quantisation is "
            "lower than with {against}",
            "Table 4", f"tokenizer's {level} {metric}, {side}", "joint", TOKENIZERS, -1)
      for metric in ("CKNNA", "CKA") for level in ("image", "patch")
      for side in ("before", "after")),
    Claim("Usage entropy with NTP through inputs and targets is over 1 nat lower than {against}'s",
          "Fig. 1", "usage entropy (nats)", "joint-naive", ("joint",), -1, 1.0),
    Claim("PSNR with NTP through inputs and targets is over 3 dB lower than {against}'s",
          "Table 7: -8 dB", "PSNR (dB)", "joint-naive", ("joint",), -1, 3.0),
    Claim("Usage entropy with NTP through inputs alone is over 1 nat lower than {against}'s",
          "Fig. 1", "usage entropy (nats)", "joint-naive-inputs", ("joint",), -1, 1.0),
    Claim("Usage entropy with straight-through alignment is over 1 nat lower than {against}'s",
          "Table 7", "usage entropy (nats)", "joint-straight-through", ("joint",), -1, 1.0),
]  # fmt: skip
