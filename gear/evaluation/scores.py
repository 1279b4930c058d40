"""From images to numbers: features of two sets, the metrics their features allow, and the protocol
that travels with each.

Outside Inception nothing is called FID, KID or IS: those are `fd_NETWORK`, `mmd_NETWORK` and
`score_NETWORK`.
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
# what two numbers of one protocol may differ in
OF_ONE_RUN = ("weights_of", "step", "samples_hash", "spread")
PRDC_ROWS = 10_000  # of each set, drawn at random, that GPIC compares by neighbours


class Unavailable(UserError):
    """Say why two sets do not allow a metric."""


@dataclass
class FeatureSet:
    """What is kept of a set of images: rows for neighbours, moments for Fréchet distances, the
    score of its logits.
    """

    name: str
    pixels: str  # SHA-256 of what was looked at, in order: 12 hex digits
    count: int
    moments: dict = field(default_factory=dict)  # {"pool": (mean, covariance), "spatial": ...}
    rows: torch.Tensor | None = None  # (N, D) float32, on the device that computed them
    inception_score: float | None = None
    given: tuple = ()  # kinds of moments that a file brought, of as many samples as its author had
    size: str = "not stated"  # height x width in pixels, which statistics alone do not say


def extract(name, batches, network, device="cpu", keep_rows=True, split=IS_SPLIT):
    """Run a feature network over batches of images (uint8 (B, H, W, 3), or float (B, 3, H, W)): a
    FeatureSet.

    Moments and the score are streamed; rows are kept for the metrics from neighbours unless
    `keep_rows` is false. Raises UserError for no images, images of mixed size, and features that
    are not finite.
    """
    moments, rows, score, digest, count, size = (
        {},
        [],
        InceptionScore(split),
        hashlib.sha256(),
        0,
        None,
    )
    for images in batches:
        if size not in (None, images.shape[1:]):
            raise UserError(
                f"'{name}' holds images of mixed size: {tuple(size)} and {tuple(images.shape[1:])}."
            )
        size, count = images.shape[1:], count + len(images)
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
    moments = (
        {kind: (m.mean.cpu(), m.covariance.cpu()) for kind, m in moments.items()}
        if count > 1
        else {}
    )
    kept = torch.cat(rows) if rows else None
    height, width = size[:2] if images.dtype == torch.uint8 else size[1:]
    score = score.value() if score.seen else None
    return FeatureSet(
        name, digest.hexdigest()[:12], count, moments, kept, score, size=f"{height} x {width}"
    )


def compare(
    fake, real, network, wanted=None, k=None, subsets=100, subset_size=1_000, seed=0, tell=None
):
    """Return {metric: (value, what else its protocol says)} of a FeatureSet of samples against a
    reference.

    `wanted` names the metrics (default: all that both sets allow); a metric asked for by name that
    cannot be had raises UserError saying why, and one that was not is left out, unless none is
    left, and told: `tell(metric, reason)`. So does one that comes out not finite.
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
    if unknown := set(wanted or ()) - possible.keys():
        raise UserError(
            f"unknown metrics {', '.join(sorted(unknown))} in this feature space. Known: "
            f"{', '.join(possible)}."
        )
    found, reasons = {}, []
    for name in wanted or possible:
        try:
            value, details = possible[name]()
        except Unavailable as reason:
            if wanted:
                raise
            reasons.append(str(reason))
            if tell:
                tell(name, reason)
            continue
        found |= (
            {key: (v, details) for key, v in value.items()}
            if isinstance(value, dict)
            else {name: (value, details)}
        )
    for name, (value, _) in found.items():
        if not np.isfinite(value):
            raise UserError(
                f"{name} of '{fake.name}' is {value}, which is no number: look at the images and "
                "the reference."
            )
    if not found:
        raise UserError(
            f"nothing can be measured of '{fake.name}' against '{real.name}': "
            f"{' '.join(dict.fromkeys(reasons))}"
        )
    return found


def tell_frechet(metric, reason):
    """Say why there is no Fréchet distance, which is what an evaluation is asked for most; of
    other metrics that cannot be had say nothing.
    """
    if metric in ("gfid", "rfid"):
        print(f"no {metric}: {reason}", file=sys.stderr)


def _distance(fake, real, kind, inception):
    """Return a Fréchet distance, and that it is of singular covariances where one set has no more
    samples than features. In Inception's space, whose distances are compared with others', that is
    Unavailable: two sets of one distribution would be a hundred apart.
    """
    pairs = [_moments(features, kind) for features in (fake, real)]
    counted = [(f.count, f.name) for f in (fake, real) if kind not in f.given and f.count]
    features = len(pairs[0][0])
    if not counted or min(counted)[0] > features:
        return frechet_distance(*pairs), {}
    if inception:
        count, name = min(counted)
        raise Unavailable(
            f"'{name}' has {count:,} samples: {features + 1:,} at least are needed for "
            f"{kind} statistics, and 50,000 for the papers' numbers."
        )
    return frechet_distance(*pairs), {"covariance": "singular: no more samples than features"}


def halves_distance(real, network):
    """Return the Fréchet distance between two halves of a reference's images, drawn at random, and
    how many images each has: (distance, count).

    That is what sets of so many images of one distribution are apart: the part of a distance that
    their size alone makes. None where no images are there, too few, or statistics of more.
    """
    if real.rows is None or len(real.rows) < 4 or "pool" in real.given:
        return None
    order = torch.randperm(len(real.rows), generator=torch.Generator().manual_seed(0))
    count, halves = len(order) // 2, []
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
        raise Unavailable(f"'{features.name}' brings no {kind} statistics of this feature network.")
    return features.moments[kind]


def _score(features):
    if features.inception_score is None:
        raise Unavailable("this feature network has no logits: an Inception Score needs some.")
    return features.inception_score


def _rows(features):
    if features.rows is None:
        raise Unavailable(
            f"'{features.name}' brings statistics, but no images or features: neighbours need "
            "those."
        )
    return features.rows


def _pairs(function, names, fake, real, k, most=None, seed=0):
    sets, details = [_rows(real), _rows(fake)], {}
    for features in (real, fake):
        if 0 < features.count <= k:
            raise Unavailable(
                f"k = {k} neighbours of {features.count} samples of '{features.name}': more are "
                "needed."
            )
    if most and max(map(len, sets)) > most:
        sets = [_drawn(rows, most, seed) for rows in sets]
        details = {"rows": most, "rows_seed": seed}
    values = function(*sets, k)
    if names is None:
        details |= {"k": k, "distance": "float64, d < r"}
        return {f"prdc_{name}": value for name, value in values.items()}, details
    return dict(zip(names, values)), {"k": k, "distance": "squared, float16, d <= r"}


def _drawn(rows, most, seed):
    """Return `most` random rows, in an order of their own, or all that there are."""
    order = np.random.default_rng((seed, len(rows))).permutation(len(rows))[:most]
    return rows[torch.from_numpy(order).to(rows.device)]


def _mmd(fake, real, subsets, size, seed):
    sets, size = (_rows(real), _rows(fake)), min(size, fake.count, real.count)
    if size < 2:
        raise Unavailable(
            "one sample has no distance to others of its set: two at least are needed."
        )
    mean, std = polynomial_mmd(*sets, subsets, size, seed)
    return mean, {"subsets": subsets, "subset_size": size, "subset_seed": seed, "spread": std}


# -- what travels with a number --------------------------------------------------------------------


def record(metric, value, protocol):
    """Return one entry of metrics.json: the value and everything it depends on.

    A tensor (N,) of the values of images or samples is their mean with its 95 % interval: normal,
    two standard errors or so.
    """
    interval = {}
    if isinstance(value, torch.Tensor):
        each, value = value.double(), float(value.double().mean())
        if len(each) > 1:
            half = 1.959964 * float(each.std()) / len(each) ** 0.5
            interval = {"interval": [_rounded(value - half), _rounded(value + half)]}
    if not np.isfinite(value):
        raise UserError(f"{metric} is {value}: nothing is written that is no number.")
    return {"metric": metric, "value": _rounded(value), **interval, "protocol": protocol}


def _rounded(value):
    return float(f"{value:.10g}")


def protocol_id(protocol):
    """Return eight hex digits that tell protocols apart: two numbers share a column only if theirs
    are equal.
    """
    kept = {key: value for key, value in protocol.items() if key not in OF_ONE_RUN}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]
