"""Metrics from pairs of samples in feature space: precision and recall by two protocols, density,
coverage, MMD (Tables 1, 2).

Two sets (N, D) and (M, D) are compared in blocks of rows: memory grows with N + M, never with N M.
"""

import math

import numpy as np
import torch

from gear.config import UserError
from gear.images import check_finite
from gear.measures.frechet import gram

BLOCK = 2**22  # distances held at once: what a cache holds


def squared_distances(x, y, half=False):
    """Return |x_i - y_j|^2, (N, D) and (M, D) -> (N, M) float32 or float64.

    `half` rounds features, norms, products and result to float16, as the ADM evaluator computes; a
    block with a value beyond its range is done in float32 instead.
    """
    if half:
        u, v = x.half().float(), y.half().float()
        norms = [rows.square().half().float().sum(1).half().float() for rows in (u, v)]
        product = (u @ v.T).half().float()
        block = (
            ((norms[0][:, None] - 2 * product).half().float() + norms[1])
            .half()
            .float()
            .clamp_min(0)
        )
        if torch.isfinite(block).all():
            return block
    return (
        torch.addmm(y.square().sum(1), x, y.T, alpha=-2)
        .add_(x.square().sum(1)[:, None])
        .clamp_min_(0)
    )


def _blocks(x, y, half):
    rows = max(1, BLOCK // len(y))
    for start in range(0, len(x), rows):
        yield slice(start, start + rows), squared_distances(x[start : start + rows], y, half)


def radii(x, k, half=False):
    """Return each row's squared distance to its k-th neighbour, itself not counted: (N, D) -> (N,).
    UserError unless k < N.
    """
    if not 1 <= k < len(x):
        limits = (
            f"k has to lie in [1, {len(x) - 1}]"
            if len(x) > 1
            else f"{k + 1} samples at least are needed"
        )
        raise UserError(f"k = {k} neighbours of {len(x)} samples: {limits}.")
    nearest = x.new_full((len(x), k + 1), torch.inf)
    parts = torch.arange(len(x), device=x.device).split(max(1, math.isqrt(BLOCK)))
    for i, rows in enumerate(parts):
        # of both its ends: half of all pairs will do, but for ADM's rounding
        for columns in parts if half else parts[i:]:
            block = squared_distances(x[rows], x[columns], half)
            nearest[rows] = _least(nearest[rows], block)
            if columns is not rows and not half:
                nearest[columns] = _least(nearest[columns], block.T)
    return nearest[:, -1]


def _least(nearest, distances):
    """Keep as many columns as `nearest` has of both, the least, in order."""
    least = distances.topk(min(nearest.shape[1], distances.shape[1]), dim=1, largest=False).values
    return (
        torch.cat([nearest, least.to(nearest)], 1)
        .topk(nearest.shape[1], dim=1, largest=False)
        .values
    )


def _rows(features):
    """Return features as they are; raises UserError unless they are finite rows (N, D)."""
    if features.ndim != 2:
        raise UserError(f"features have shape {tuple(features.shape)}: rows (N, D) are expected.")
    check_finite(features, "the features", "look at the images, or at the feature network")
    return features


def precision_recall(real, fake, k=3, half=True):
    """Return (precision, recall) by the ADM protocol: d <= radius, distances squared and in float16
    unless `half` is false.

    Precision is the share of `fake` (M, D) in the union of the real balls, recall that of `real`
    (N, D) in the union of the fake balls, a ball's radius being the distance to the k-th neighbour
    within its own set. Both depend on N and M.
    """
    real, fake = _rows(real).float(), _rows(fake).float()
    r, f = radii(real, k, half), radii(fake, k, half)
    precise, recalled = torch.zeros(len(fake), dtype=torch.bool, device=fake.device), []
    for rows, block in _blocks(real, fake, half):
        precise |= (block <= r[rows, None]).any(0)
        recalled.append((block <= f).any(1))
    return float(precise.double().mean()), float(torch.cat(recalled).double().mean())


def prdc(real, fake, k=5):
    """Return precision, recall, density and coverage of `fake` (M, D) against `real` (N, D): a dict
    (GPIC protocol).

    Strict d < radius in float64. Density, mean_j #{i: d(r_i, f_j) < R_i} / k, may exceed 1;
    coverage is the share of real balls that hold a fake sample.
    """
    real, fake = _rows(real).double(), _rows(fake).double()
    r, f = radii(real, k), radii(fake, k)
    inside, recalled, covered = torch.zeros(len(fake), dtype=torch.long, device=fake.device), [], []
    for rows, block in _blocks(real, fake, half=False):
        within = block < r[rows, None]
        inside += within.sum(0)
        covered.append(within.any(1))
        recalled.append((block < f).any(1))
    share = lambda flags: float(flags.double().mean())  # noqa: E731
    return {
        "precision": share(inside > 0),
        "recall": share(torch.cat(recalled)),
        "density": share(inside) / k,
        "coverage": share(torch.cat(covered)),
    }


def polynomial_mmd(real, fake, subsets=100, size=1_000, seed=0):
    """Return mean and standard deviation over random subsets of the unbiased MMD^2, kernel (x y / D
    + 1)^3: KID, GPIC's MMD.

    (N, D), (M, D). Each subset draws `size` of each set without replacement. May be negative. Not
    multiplied by 1,000. Raises UserError where a set has fewer than `size` samples.
    """
    real, fake = _rows(real), _rows(fake)
    if min(len(real), len(fake)) < max(size, 2):
        raise UserError(
            f"subsets of {size} need as many samples: there are {len(real)} and {len(fake)}."
        )
    if subsets < 1 or size < 2:
        raise UserError(
            f"{subsets} subsets of {size} samples: one at least, of two at least, is needed."
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (rows[rng.choice(len(rows), size, replace=False)].double() for rows in (fake, real))
        values.append(mmd(x, y))
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def mmd(x, y):
    """Return the unbiased MMD^2 of two sets of equal size m, (m, D) each; the cross term keeps its
    diagonal.
    """
    # in place: fewer copies
    m, kernel = len(x), lambda products: products.div_(x.shape[1]).add_(1).pow_(3)
    within = sum((k.sum() - k.trace()) / (m * (m - 1)) for k in (kernel(gram(x)), kernel(gram(y))))
    return float(within - 2 * kernel(x @ y.T).mean())
