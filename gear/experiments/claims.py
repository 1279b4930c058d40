"""The paper's claims as data: which statistic differs between which runs, and in which direction.

As in the paper (Sec. 4.1), "GEAR" has two meanings. Where the paper studies representations or
ablates (Figs. 1a, 4, 5, Tables 4 to 14), it is the generator and the tokenizer of the joint stage.
In Fig. 3 and Table 1 it is a fresh generator trained on GEAR's tokenizer. Our claims are stricter
than the paper's: beside the baseline (LlamaGen-REPA), a method has to beat the control, whose
tokenizer is trained for as long without guidance, and, where fewer codes alone could explain a
difference, a tokenizer with half the codes. `gear.experiments.verdicts` judges the claims.
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
    """One sentence of the paper, or of ours, that runs can confirm or contradict."""

    sentence: str  # with {against} where the name of the compared runs goes
    paper: str  # figure or table, with the printed value if there is one; "": the claim is ours
    statistic: str  # a key of STATISTICS or of PAIRED
    method: str  # the recipe whose runs should show the claim
    baselines: tuple  # the recipes to compare with; "" compares the statistic with zero
    # claimed sign of method minus baseline; 0: equal within `margin`; None: no claim
    sign: int | None
    margin: float = 0.0  # the least size of the difference, or the largest if `sign` is 0


# A statistic is a function of a run and of the Scoring of its samples. It returns one number.


def last_logged(metric):
    """Return a statistic: a metric as validation logged it at a run's last step."""
    return lambda run, scoring: logged(run)[metric]


def last_scored(metric):
    """Return a statistic: a metric as `gear evaluate` measured it at a run's last step."""

    def statistic(run, scoring):
        preset = run.config["recipe"]
        values = measured(run.name, preset, scoring)
        if metric not in values:
            words = scoring_words(preset, run.config, scoring)
            command = f"gear evaluate {run.name} {' '.join(words)}"
            raise MissingRuns(f"run '{run.name}' has no {TITLES[metric]}", [run.name], command)
        return values[metric]

    return statistic


def above_null(level, metric, profile=layer_profile, layer=None):
    """Return a statistic: the alignment to the teacher minus its null, at one `layer` of `profile`.

    `layer` None averages over the generator's mid-to-deep layers, from the tap layer to the last;
    "tap" is the tap layer alone.
    """

    def statistic(run, scoring):
        table = profile(run)
        rows = table[(table.level == level) & (table.metric == metric)].set_index("layer")
        return (rows.value - rows.null).loc[_layers(run, layer)].mean()

    return statistic


def distance_to_teacher(metric):
    """Return a statistic: the distance between the generator's value of a spatial metric and the
    teacher's, averaged over the generator's layers from the tap layer to the last.
    """

    def statistic(run, scoring):
        table = layer_profile(run).query(f"metric == '{metric}'").set_index("layer").value
        teacher_value = table[-1]  # layer -1 of the table is the teacher
        return (table.loc[_layers(run)] - teacher_value).abs().mean()

    return statistic


def _layers(run, layer=None):
    """List the rows of a profile to average; see `above_null`."""
    generator = run.config["generator"]
    if layer is None:
        return list(range(generator["tap_layer"], generator["layers"] + 1))
    return [generator["tap_layer"] if layer == "tap" else layer]


def above_floor(run, scoring):
    """Return a run's alignment loss minus the floor: the lowest loss that a predictor reaches
    without seeing the image.
    """
    return logged(run)["align_loss"] - alignment_floors(run).value.min()


def log_speedup(curve):
    """Return a statistic of a run and its baseline: the logarithm of how many times fewer steps the
    run's `curve` takes to reach the end of the baseline's (Fig. 3).

    If the run never reaches it, the value is negative: minus the logarithm of how many times fewer
    steps the baseline takes to reach the end of the run's curve.
    """

    def statistic(run, baseline, scoring):
        run_curve = curve(run, scoring)
        baseline_curve = curve(baseline, scoring)
        steps = run_curve.index.intersection(baseline_curve.index)
        ratio = speedup(steps, baseline_curve[steps], run_curve[steps]).value
        if ratio is not None:
            return math.log(ratio)
        return -math.log(speedup(steps, run_curve[steps], baseline_curve[steps]).value)

    return statistic


def training_curve(metric):
    """Return a function of a run: the training losses that it logged of a metric, indexed by
    step.
    """

    def curve(run, scoring):
        values = run.metrics().set_index("step")[metric].dropna()
        return values[values.index > 0]

    return curve


def sample_curve(run, scoring):
    """Return the Fréchet distances of a run's samples, indexed by the step that drew them.

    Raises MissingRuns if the run is scored at fewer than three steps.
    """
    preset = run.config["recipe"]
    table = scores(run)
    steps = sorted(table.step.dropna().astype(int).unique()) if "step" in table else []
    values = {step: measured(run.name, preset, scoring, step=step) for step in steps}
    curve = pd.Series({step: v["fd"] for step, v in values.items() if "fd" in v}, dtype=float)
    if len(curve) < 3:
        quarters = [f"{run.config['steps'] * k // 4}" for k in (1, 2, 3, 4)]
        words = [*scoring_words(preset, run.config, scoring), "--steps", *quarters]
        command = f"gear evaluate {run.name} {' '.join(words)}"
        raise MissingRuns(
            f"run '{run.name}' needs scores at three steps or more", [run.name], command
        )
    return curve


STATISTICS = {
    "next-token loss (nats per token)": last_logged("ntp_loss"),
    "alignment loss": last_logged("align_loss"),
    "alignment loss minus the floor": above_floor,
    "H - NTP (nats per token)": last_logged("predictable"),
    "Fréchet distance of samples": last_scored("fd"),
    "PSNR (dB)": last_logged("psnr"),
    "SSIM": last_scored("ssim"),
    "Fréchet distance of reconstructions": last_scored("rfd"),
    "posterior entropy at tau (nats)": last_logged("assignment_tau_entropy"),
    "posterior top-1 mass at tau": last_logged("assignment_tau_top1"),
    "posterior top-10 mass at tau": last_logged("assignment_tau_top10"),
    "usage entropy (nats)": last_logged("usage_entropy"),
    "patch CKNNA above null": above_null("patch", "cknna"),
    "patch CKA above null": above_null("patch", "cka"),
    "content CKA above null": above_null("content", "cka"),
    "patch CKA above null, layer 0": above_null("patch", "cka", layer=0),
    "image CKNNA above null": above_null("image", "cknna"),
    "image CKA above null": above_null("image", "cka"),
    "image CKNNA above null, tap layer": above_null("image", "cknna", layer="tap"),
    "image CKA above null, tap layer": above_null("image", "cka", layer="tap"),
    "Moran's I, distance to teacher": distance_to_teacher("moran"),
    "high-frequency ratio, distance to teacher": distance_to_teacher("high_frequency"),
} | {
    f"tokenizer's {level} {title} above null, {side} quantisation": above_null(
        level, metric, tokenizer_profile, layer
    )
    for title, metric in (("CKNNA", "cknna"), ("CKA", "cka"))
    for level in ("image", "patch")
    for layer, side in (("pre", "before"), ("post", "after"))
}
PAIRED = {  # statistics of a run and its baseline together; a claim is about their mean
    "log speed-up of next-token loss": log_speedup(training_curve("ntp_loss")),
    "log speed-up of alignment loss": log_speedup(training_curve("align_loss")),
    "log speed-up of Fréchet distance": log_speedup(sample_curve),
}

AGAINST = {  # a recipe that claims compare with: its name in a claim's sentence
    "llamagen-repa": "the baseline (LlamaGen-REPA)",
    "llamagen-repa-control": "LlamaGen-REPA on the control tokenizer",
    "llamagen-repa-half": "LlamaGen-REPA on a tokenizer with half the codes",
    "tokenizer": "the warm-up tokenizer",
    "control": "the control tokenizer",
    "joint": "the soft bridge (GEAR)",
    "": "the floor",
}
BASELINE = ("llamagen-repa",)
GENERATORS = ("llamagen-repa", "llamagen-repa-control")  # with as many codes as GEAR
ALL_GENERATORS = (*GENERATORS, "llamagen-repa-half")
TOKENIZERS = ("tokenizer", "control")
FRESH = "a fresh generator on GEAR's tokenizer"
MIDDLE = "between mid-to-deep layers and the teacher"
CLAIMS = [
    Claim("Fréchet distance of samples is lower for GEAR's generator than for {against}",
          "Fig. 1a", "Fréchet distance of samples", "joint", GENERATORS, -1),
    Claim("Fréchet distance of samples reaches the final value of {against} in fewer steps with "
          "GEAR's generator",
          "Fig. 1a: up to 10 times", "log speed-up of Fréchet distance", "joint", BASELINE, +1),
    Claim(f"Fréchet distance of samples is lower for {FRESH} than for {{against}}",
          "Table 1", "Fréchet distance of samples", "gear", GENERATORS, -1),
    Claim(f"Next-token loss is lower for {FRESH} than for {{against}}",
          "Fig. 3a", "next-token loss (nats per token)", "gear", ALL_GENERATORS, -1),
    Claim(f"Next-token loss reaches the final value of {{against}} in fewer steps with {FRESH}",
          "Fig. 3a", "log speed-up of next-token loss", "gear", BASELINE, +1),
    Claim("H - NTP (usage entropy minus next-token loss) is higher for "
          f"{FRESH} than for {{against}}",
          "", "H - NTP (nats per token)", "gear", ALL_GENERATORS, +1),
    Claim(f"Alignment loss is lower for {FRESH} than for {{against}}",
          "Fig. 3b", "alignment loss", "gear", ALL_GENERATORS, -1),
    Claim(f"Alignment loss reaches the final value of {{against}} in fewer steps with {FRESH}",
          "Fig. 3b", "log speed-up of alignment loss", "gear", BASELINE, +1),
    Claim(f"Alignment loss of {FRESH} is below {{against}}, the lowest loss of the predictors that "
          "see no image",
          "", "alignment loss minus the floor", "gear", ("",), -1),
    Claim("PSNR differs by less than 0.3 dB between GEAR's tokenizer and {against}",
          "Table 8: -0.28 dB", "PSNR (dB)", "joint", TOKENIZERS, 0, 0.3),
    Claim("SSIM differs by less than 0.01 between GEAR's tokenizer and {against}",
          "Table 8: -0.007", "SSIM", "joint", TOKENIZERS, 0, 0.01),
    Claim("Fréchet distance of reconstructions is lower for GEAR's tokenizer than for {against}",
          "Table 8: -0.08", "Fréchet distance of reconstructions", "joint", TOKENIZERS, -1),
    Claim("Posterior entropy at tau is lower for GEAR's tokenizer than for {against}",
          "Fig. 4d", "posterior entropy at tau (nats)", "joint", TOKENIZERS, -1),
    Claim("Posterior mass of the most likely code at tau is higher for GEAR's tokenizer than for "
          "{against}",
          "Fig. 4a", "posterior top-1 mass at tau", "joint", TOKENIZERS, +1),
    Claim("Posterior mass of the ten most likely codes at tau is higher for GEAR's tokenizer than "
          "for {against}",
          "Fig. 4b", "posterior top-10 mass at tau", "joint", TOKENIZERS, +1),
    Claim("Usage entropy of the hard indices is lower for GEAR's tokenizer than for {against}",
          "", "usage entropy (nats)", "joint", TOKENIZERS, -1),
    Claim(f"Patch CKNNA {MIDDLE} is higher for GEAR's generator than for {{against}}",
          "Fig. 5d", "patch CKNNA above null", "joint", GENERATORS, +1),
    Claim(f"Patch CKA {MIDDLE} is higher for GEAR's generator than for {{against}}",
          "Fig. 5e", "patch CKA above null", "joint", GENERATORS, +1),
    Claim("Content CKA (patch CKA without the mean of each position) "
          f"{MIDDLE} is higher for GEAR's generator than for {{against}}",
          "", "content CKA above null", "joint", GENERATORS, +1),
    Claim("Patch CKA between layer 0 (the token embeddings alone) and the teacher differs between "
          "GEAR's generator and {against}; no direction is claimed",
          "", "patch CKA above null, layer 0", "joint", GENERATORS, None),
    Claim(f"Image CKNNA {MIDDLE} differs by less than 0.05 between GEAR's generator and "
          "{against}",
          "Fig. 5a", "image CKNNA above null", "joint", GENERATORS, 0, 0.05),
    Claim(f"Image CKA {MIDDLE} differs by less than 0.05 between GEAR's generator and {{against}}",
          "Fig. 5b", "image CKA above null", "joint", GENERATORS, 0, 0.05),
    Claim("Image CKNNA between the tap layer and the teacher differs by less than 0.05 between "
          "GEAR's generator and {against}",
          "Fig. 5a", "image CKNNA above null, tap layer", "joint", GENERATORS, 0, 0.05),
    Claim("Image CKA between the tap layer and the teacher differs by less than 0.05 between "
          "GEAR's generator and {against}",
          "Fig. 5b", "image CKA above null, tap layer", "joint", GENERATORS, 0, 0.05),
    Claim("Moran's I of mid-to-deep layers is nearer to the teacher's for GEAR's generator than "
          "for {against}",
          "Fig. 5c", "Moran's I, distance to teacher", "joint", GENERATORS, -1),
    Claim("High-frequency ratio of mid-to-deep layers is nearer to the teacher's for GEAR's "
          "generator than for {against}",
          "Fig. 5f", "high-frequency ratio, distance to teacher", "joint", GENERATORS, -1),
    *(Claim(f"{level.capitalize()} {metric} between the teacher and tokenizer features {side} "
            "quantisation is lower for GEAR's tokenizer than for {against}",
            "Table 4", f"tokenizer's {level} {metric} above null, {side} quantisation", "joint",
            TOKENIZERS, -1)
      for metric in ("CKNNA", "CKA") for level in ("image", "patch")
      for side in ("before", "after")),
    Claim("Usage entropy with NTP gradients through inputs and targets is more than 1 nat lower "
          "than with {against}",
          "Fig. 1", "usage entropy (nats)", "joint-naive", ("joint",), -1, 1.0),
    Claim("PSNR with NTP gradients through inputs and targets is more than 3 dB lower than with "
          "{against}",
          "Table 7: -8 dB", "PSNR (dB)", "joint-naive", ("joint",), -1, 3.0),
    Claim("Usage entropy with NTP gradients through inputs alone is more than 1 nat lower than "
          "with {against}",
          "Fig. 1", "usage entropy (nats)", "joint-naive-inputs", ("joint",), -1, 1.0),
    Claim("Usage entropy with straight-through alignment gradients is more than 1 nat lower than "
          "with {against}",
          "Table 7", "usage entropy (nats)", "joint-straight-through", ("joint",), -1, 1.0),
]  # fmt: skip
