"""From images to scores: features of two sets of images, the metrics that they allow, and the
protocol of each number.

The names FID, KID and IS are kept for Inception. In the space of another network, the metrics are
called `fd_NETWORK`, `mmd_NETWORK` and `score_NETWORK`.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field

import numpy as np
import torch

from gear.config import UserError
from gear.measures.frechet import IS_SPLIT, InceptionScore, Moments, frechet_distance
from gear.measures.neighbours import polynomial_mmd, prdc, precision_recall

BATCH = 64
# fields in which two numbers of one protocol may differ
RUN_FIELDS = ("weights_of", "step", "samples_hash", "spread")
PRDC_ROWS = 10_000  # random rows of each set whose neighbours GPIC compares


class Unavailable(UserError):
    """Two sets do not allow a metric; the message states the reason."""


@dataclass
class FeatureSet:
    """Features of a set of images: rows for neighbours, moments for Fréchet distances, and the
    Inception Score of the logits.
    """

    name: str
    digest: str  # SHA-256 of the images in their order, or of a file's arrays: 12 hex digits
    count: int
    moments: dict = field(default_factory=dict)  # {"pool": (mean, covariance), "spatial": ...}
    rows: torch.Tensor | None = None  # (N, D) float32, on the device that computed them
    inception_score: float | None = None
    file_moments: tuple = ()  # kinds of moments read from a file, of an unknown number of samples
    size: str = "not stated"  # height x width in pixels; a file of statistics does not state it


def extract(name, batches, network, device="cpu", keep_rows=True, split=IS_SPLIT):
    """Compute the FeatureSet of batches of images, uint8 (B, H, W, 3) or float (B, 3, H, W).

    Moments and the Inception Score are accumulated batch by batch. Rows are kept for the metrics
    from neighbours, unless `keep_rows` is false. Raises UserError for no images, for images of
    mixed size, and for features that are not finite.
    """
    moments = {}
    rows = []
    score = InceptionScore(split)
    digest = hashlib.sha256()
    count = 0
    size = None
    for images in batches:
        if size not in (None, images.shape[1:]):
            raise UserError(
                f"'{name}' holds images of mixed size: {tuple(size)} and {tuple(images.shape[1:])}."
            )
        size = images.shape[1:]
        count += len(images)
        digest.update(np.ascontiguousarray(images.cpu().numpy()).tobytes())
        for part in images.split(BATCH):
            features = network(part.to(device))
            for kind in ("pool", "spatial"):
                if kind in features:
                    moments.setdefault(kind, Moments(features[kind].shape[1], device)).update(
                        features[kind]
                    )
            if "logits" in features:
                score.update(features["logits"].cpu())
            if keep_rows:
                rows.append(features["pool"].float())
    if not count:
        raise UserError(f"'{name}' holds no images.")
    height, width = size[:2] if images.dtype == torch.uint8 else size[1:]
    features = FeatureSet(name, digest.hexdigest()[:12], count, size=f"{height} x {width}")
    if count > 1:
        features.moments = {kind: (m.mean.cpu(), m.covariance.cpu()) for kind, m in moments.items()}
    if rows:
        features.rows = torch.cat(rows)
    if score.seen:
        features.inception_score = score.value()
    return features


def compare(
    fake, real, network, names=None, k=None, subsets=100, subset_size=1_000, seed=0, on_missing=None
):
    """Compare a FeatureSet of samples with one of a reference; return {metric: (value, details)}.

    `names` are the metrics to compute; by default, all that both sets allow. `details` are further
    fields of a metric's protocol. Raises UserError, with the reason, for a metric of `names` that
    the sets do not allow, where no metric can be computed, and for a value that is not finite.
    Without `names`, a metric that the sets do not allow is left out, after a call of
    `on_missing(metric, reason)`.
    """
    inception = network.name == "inception"
    fid, kernel = ("gfid", "kid") if inception else (f"fd_{network.name}", f"mmd_{network.name}")
    possible = {
        fid: lambda: _distance(fake, real, "pool", inception),
        "precision_recall": lambda: _pairs(
            precision_recall, ("precision", "recall"), fake, real, k or 3
        ),
        "prdc": lambda: _pairs(prdc, None, fake, real, k or 5, PRDC_ROWS, seed),
        kernel: lambda: _mmd(fake, real, subsets, subset_size, seed),
    }
    if inception:
        possible["sfid"] = lambda: _distance(fake, real, "spatial", inception)
    possible["inception_score" if inception else f"score_{network.name}"] = lambda: (
        _score(fake),
        {"is_split": IS_SPLIT},
    )
    if unknown := set(names or ()) - possible.keys():
        raise UserError(
            f"unknown metrics {', '.join(sorted(unknown))} in this feature space. Known: "
            f"{', '.join(possible)}."
        )
    metrics = {}
    reasons = []
    for name in names or possible:
        try:
            value, details = possible[name]()
        except Unavailable as reason:
            if names:
                raise
            reasons.append(str(reason))
            if on_missing:
                on_missing(name, reason)
            continue
        values = value if isinstance(value, dict) else {name: value}
        metrics |= {metric: (number, details) for metric, number in values.items()}
    for name, (value, _) in metrics.items():
        if not np.isfinite(value):
            raise UserError(
                f"{name} of '{fake.name}' is {value}, which is not finite: check the images and "
                "the reference."
            )
    if not metrics:
        raise UserError(
            f"nothing can be measured of '{fake.name}' against '{real.name}': "
            f"{' '.join(dict.fromkeys(reasons))}"
        )
    return metrics


def report_missing_frechet(metric, reason):
    """Print why a Fréchet distance of Inception is missing, since most evaluations are made for it.

    Other missing metrics are not reported.
    """
    if metric in ("gfid", "rfid"):
        print(f"no {metric}: {reason}", file=sys.stderr)


def _distance(fake, real, kind, inception):
    """Return a Fréchet distance and its details.

    Where a set has no more samples than features, its covariance is singular, and the details say
    so. Distances in Inception's space are compared with published ones, so there such a set raises
    Unavailable: even two sets of one distribution would have a distance of about a hundred.
    """
    pairs = [_moments(features, kind) for features in (fake, real)]
    known_counts = [
        (f.count, f.name) for f in (fake, real) if kind not in f.file_moments and f.count
    ]
    num_features = len(pairs[0][0])
    if not known_counts or min(known_counts)[0] > num_features:
        return frechet_distance(*pairs), {}
    if inception:
        count, name = min(known_counts)
        raise Unavailable(
            f"'{name}' has {count:,} samples: {num_features + 1:,} at least are needed for "
            f"{kind} statistics, and 50,000 for the papers' numbers."
        )
    return frechet_distance(*pairs), {"covariance": "singular: no more samples than features"}


def halves_distance(real, network):
    """Return the Fréchet distance between two random halves of a reference, and the number of
    images in each half: (distance, count).

    This is the distance between two sets of `count` images of one distribution, so it shows how
    much of a distance is due to the number of images. Returns None for a reference without rows or
    with too few, and for one whose statistics come from a file, because they are of other images.
    """
    if real.rows is None or len(real.rows) < 4 or "pool" in real.file_moments:
        return None
    order = torch.randperm(len(real.rows), generator=torch.Generator().manual_seed(0))
    count = len(order) // 2
    halves = []
    for part in order[: 2 * count].to(real.rows.device).split(count):
        moments = Moments(real.rows.shape[1], real.rows.device).update(real.rows[part])
        pool = moments.mean.cpu(), moments.covariance.cpu()
        halves.append(FeatureSet(real.name, "", count, {"pool": pool}))
    try:
        return _distance(*halves, "pool", network.name == "inception")[0], count
    except Unavailable:
        return None


def _moments(features, kind):
    if kind not in features.moments:
        if features.count == 1:
            raise Unavailable(
                f"'{features.name}' has 1 sample: 2 at least are needed for {kind} statistics."
            )
        raise Unavailable(f"'{features.name}' has no {kind} statistics of this feature network.")
    return features.moments[kind]


def _score(features):
    if features.inception_score is None:
        raise Unavailable("this feature network has no logits, which an Inception Score needs.")
    return features.inception_score


def _rows(features):
    if features.rows is None:
        raise Unavailable(
            f"'{features.name}' has statistics only: metrics from neighbours need images or "
            "features."
        )
    return features.rows


def _pairs(function, names, fake, real, k, max_rows=None, seed=0):
    """Return metrics from k neighbours, {name: value}, and their details.

    `function` returns values in the order of `names`, or, where it is None, a dict of values. It
    gets at most `max_rows` rows of each set.
    """
    sets = [_rows(real), _rows(fake)]
    details = {}
    for features in (real, fake):
        if 0 < features.count <= k:
            raise Unavailable(
                f"k = {k} neighbours of {features.count} samples of '{features.name}': more "
                "samples are needed."
            )
    if max_rows and max(map(len, sets)) > max_rows:
        sets = [_random_rows(rows, max_rows, seed) for rows in sets]
        details = {"rows": max_rows, "rows_seed": seed}
    values = function(*sets, k)
    if names is None:
        details |= {"k": k, "distance": "float64, d < r"}
        return {f"prdc_{name}": value for name, value in values.items()}, details
    return dict(zip(names, values)), {"k": k, "distance": "squared, float16, d <= r"}


def _random_rows(rows, count, seed):
    """Return `count` random rows in random order, or all rows if there are fewer."""
    order = np.random.default_rng((seed, len(rows))).permutation(len(rows))[:count]
    return rows[torch.from_numpy(order).to(rows.device)]


def _mmd(fake, real, subsets, size, seed):
    sets = (_rows(real), _rows(fake))
    size = min(size, fake.count, real.count)
    if size < 2:
        raise Unavailable(
            "a kernel distance compares the samples of a set with each other: 2 samples at least "
            "are needed."
        )
    mean, std = polynomial_mmd(*sets, subsets, size, seed)
    return mean, {"subsets": subsets, "subset_size": size, "subset_seed": seed, "spread": std}


# -- records and protocols -------------------------------------------------------------------------


def record(metric, value, protocol):
    """Return one entry of metrics.json: a value and the protocol it depends on.

    A tensor (N,) of values per image or per sample is recorded as its mean with a 95 % interval
    (normal: 1.96 standard errors on both sides). Raises UserError for a value that is not finite.
    """
    interval = {}
    if isinstance(value, torch.Tensor):
        values = value.double()
        value = float(values.mean())
        if len(values) > 1:
            half = 1.959964 * float(values.std()) / len(values) ** 0.5
            interval = {"interval": [_rounded(value - half), _rounded(value + half)]}
    if not np.isfinite(value):
        raise UserError(f"{metric} is {value}: only finite numbers are recorded.")
    return {"metric": metric, "value": _rounded(value), **interval, "protocol": protocol}


def _rounded(value):
    return float(f"{value:.10g}")


def protocol_id(protocol):
    """Return eight hex digits that identify a protocol, whatever its `RUN_FIELDS` are.

    Two numbers share a column of a table only if their digits are equal.
    """
    fields = {key: value for key, value in protocol.items() if key not in RUN_FIELDS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
