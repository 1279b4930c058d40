"""The paper's claims as data: which statistic of which runs differs from which others', and how.

Where the paper has no control we ask for more than it does: a method has to beat the warm-up, the
control and, where fewer codes alone might do, a tokenizer with half of them. `verdicts` judges.
"""

from dataclasses import dataclass

from gear.analysis.profiles import alignment_floors, layer_profile, tokenizer_profile
from gear.experiments.results import logged


@dataclass(frozen=True)
class Claim:
    sentence: str  # {against} stands for the baseline
    where: str  # in the paper, with its value if it prints one; "": the claim is ours
    statistic: str  # a key of STATISTICS
    method: str  # recipe whose runs should show it
    baselines: tuple  # recipes they are compared with; "": zero, the statistic being above a floor
    sign: int  # of method - baseline, as claimed; 0: they should be equal within `margin`
    margin: float = 0.0  # the difference the claim is about


def last(metric):
    """Return a statistic that reads what validation logged of a metric at a run's last step."""
    return lambda run: logged(run)[metric]


def above_null(level, metric, profile=layer_profile, layer=None):
    """Return a statistic of a layer (default: the last): alignment to the teacher above null."""

    def statistic(run):
        table = profile(run)
        at = table.layer.max() if layer is None else layer
        row = table[(table.layer == at) & (table.level == level) & (table.metric == metric)].iloc[0]
        return row.value - row.null

    return statistic


def distance_to_teacher(metric):
    """Return a statistic of the last layer's maps: their distance to the teacher's own value."""

    def statistic(run):
        table = layer_profile(run).query(f"metric == '{metric}'").set_index("layer").value
        return abs(table[table.index.max()] - table[-1])

    return statistic


def above_floor(run):
    """Return a run's alignment loss minus what class and position alone reach."""
    floors = alignment_floors(run).set_index("predictor").value
    return logged(run)["align_loss"] - floors["class and position"]


STATISTICS = {
    "next-token loss (nats a token)": last("ntp_loss"),
    "alignment loss": last("align_loss"),
    "alignment loss minus the floor": above_floor,
    "H - NTP (nats a token)": last("predictable"),
    "PSNR (dB)": last("psnr"),
    "usage entropy (nats)": last("usage_entropy"),
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

AGAINST = {  # what a baseline is called
    "llamagen-repa": "the warm-up", "llamagen-repa-control": "the control",
    "llamagen-repa-half": "one with half the codes", "tokenizer": "the warm-up",
    "control": "the control", "joint": "the soft bridge", "": "the floor",
}  # fmt: skip
SETTLED = ("llamagen-repa", "llamagen-repa-control")
ALL = (*SETTLED, "llamagen-repa-half")
TOKENIZERS = ("tokenizer", "control")
CLAIMS = [
    Claim("Next-token loss of a fresh generator is lower on GEAR's tokenizer than on {against}",
          "Fig. 3a", "next-token loss (nats a token)", "gear", ALL, -1),
    Claim("H - NTP of a fresh generator is higher on GEAR's tokenizer than on {against}",
          "Fig. 3a", "H - NTP (nats a token)", "gear", ALL, +1),
    Claim("Alignment loss of a fresh generator is lower on GEAR's tokenizer than on {against}",
          "Fig. 3b", "alignment loss", "gear", ALL, -1),
    Claim("Alignment loss on GEAR's tokenizer is lower than {against} of class and position",
          "", "alignment loss minus the floor", "gear", ("",), -1),
    Claim("Usage entropy of GEAR's codes is lower than that of {against}",
          "Fig. 4d", "usage entropy (nats)", "gear", SETTLED, -1),
    Claim("PSNR of GEAR's tokenizer is within 0.3 dB of that of {against}",
          "Table 8: -0.28 dB", "PSNR (dB)", "gear", SETTLED, 0, 0.3),
    Claim("Patch CKNNA of last layer and teacher is higher on GEAR's tokenizer than on {against}",
          "Fig. 5d", "patch CKNNA above null", "gear", ALL, +1),
    Claim("Patch CKA of last layer and teacher is higher on GEAR's tokenizer than on {against}",
          "Fig. 5e", "patch CKA above null", "gear", ALL, +1),
    Claim("Content CKA of last layer and teacher is higher on GEAR's tokenizer than on {against}",
          "Fig. 5e", "content CKA above null", "gear", ALL, +1),
    Claim("Image CKA of last layer and teacher on GEAR's tokenizer is within 0.05 of that on "
          "{against}", "Fig. 5b", "image CKA above null", "gear", SETTLED, 0, 0.05),
    Claim("Moran's I of the last layer is nearer the teacher's on GEAR's tokenizer than on "
          "{against}", "Fig. 5c", "Moran's I, distance to teacher", "gear", SETTLED, -1),
    Claim("High-frequency ratio of the last layer is nearer the teacher's on GEAR's tokenizer than "
          "on {against}",
          "Fig. 5f", "high-frequency ratio, distance to teacher", "gear", SETTLED, -1),
    Claim("Patch CKA of GEAR's tokenizer and teacher before quantisation is lower than {against}'s",
          "Table 4", "tokenizer's patch CKA, before", "joint", TOKENIZERS, -1),
    Claim("Patch CKA of GEAR's tokenizer and teacher after quantisation is lower than {against}'s",
          "Table 4", "tokenizer's patch CKA, after", "joint", TOKENIZERS, -1),
    Claim("Image CKA of GEAR's tokenizer and teacher after quantisation is lower than {against}'s",
          "Table 4", "tokenizer's image CKA, after", "joint", TOKENIZERS, -1),
    Claim("Usage entropy with NTP through inputs and targets is over 1 nat lower than {against}'s",
          "Fig. 1", "usage entropy (nats)", "joint-naive", ("joint",), -1, 1.0),
    Claim("PSNR with NTP through inputs and targets is over 3 dB lower than {against}'s",
          "Table 7: -8 dB", "PSNR (dB)", "joint-naive", ("joint",), -1, 3.0),
    Claim("Usage entropy with NTP through inputs alone is over 1 nat lower than {against}'s",
          "Fig. 1", "usage entropy (nats)", "joint-naive-inputs", ("joint",), -1, 1.0),
    Claim("Usage entropy with straight-through alignment is over 1 nat lower than {against}'s",
          "Table 7", "usage entropy (nats)", "joint-straight-through", ("joint",), -1, 1.0),
]  # fmt: skip
