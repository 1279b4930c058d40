"""Metrics from pairwise distances in feature space: precision and recall by two protocols, density,
coverage and MMD (Tables 1, 2).

Two sets (N, D) and (M, D) are compared in blocks of rows: memory grows with N + M, not with N M.
"""

import math

import numpy as np
import torch

from gear.config import UserError
from gear.images import check_finite
from gear.measures.frechet import gram

BLOCK = 2**22  # distances in memory at a time: about the size of a cache


def squared_distances(x, y, half=False):
    """Return |x_i - y_j|^2: (N, D) and (M, D) -> (N, M), float32 or float64.

    half: round features, norms, products and the result to float16, as the ADM evaluator does. A
    block with a value beyond the range of float16 is computed in float32 instead.
    """
    if half:
        u = x.half().float()
        v = y.half().float()
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
    """Return each row's squared distance to its k-th neighbour: (N, D) -> (N,).

    A row is not its own neighbour. half: see `squared_distances`. Raises UserError unless
    1 <= k < N.
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
        # distances are symmetric, so half of the pairs suffice; ADM's rounding is not symmetric
        for columns in parts if half else parts[i:]:
            block = squared_distances(x[rows], x[columns], half)
            nearest[rows] = _least(nearest[rows], block)
            if columns is not rows and not half:
                nearest[columns] = _least(nearest[columns], block.T)
    return nearest[:, -1]


def _least(nearest, distances):
    """Merge `nearest` (N, k) with `distances` (N, m): the k smallest of each row, ascending."""
    least = distances.topk(min(nearest.shape[1], distances.shape[1]), dim=1, largest=False).values
    return (
        torch.cat([nearest, least.to(nearest)], 1)
        .topk(nearest.shape[1], dim=1, largest=False)
        .values
    )


def _rows(features):
    """Return `features` unchanged; raises UserError unless they are (N, D) and finite."""
    if features.ndim != 2:
        raise UserError(f"features have shape {tuple(features.shape)}: rows (N, D) are expected.")
    check_finite(features, "the features", "look at the images, or at the feature network")
    return features


def precision_recall(real, fake, k=3, half=True):
    """Return (precision, recall) by the ADM protocol.

    A ball around each sample has the distance to its k-th neighbour within its own set as radius.
    Precision is the share of `fake` (M, D) inside any ball of `real` (N, D); recall is the share of
    `real` inside any ball of `fake`; the boundary counts as inside. Both depend on N and M. half:
    compute squared distances in float16, as ADM does. Raises UserError as `radii` does, and for
    features that are not finite.
    """
    real = _rows(real).float()
    fake = _rows(fake).float()
    real_radii = radii(real, k, half)
    fake_radii = radii(fake, k, half)
    is_precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    is_recalled = []
    for rows, block in _blocks(real, fake, half):
        is_precise |= (block <= real_radii[rows, None]).any(0)
        is_recalled.append((block <= fake_radii).any(1))
    return float(is_precise.double().mean()), float(torch.cat(is_recalled).double().mean())


def prdc(real, fake, k=5):
    """Return precision, recall, density and coverage of `fake` (M, D) against `real` (N, D) as a
    dict (GPIC protocol).

    Distances are in float64 and the boundary of a ball is outside. Density,
    mean_j #{i: d(r_i, f_j) < R_i} / k, may exceed 1; coverage is the share of real balls that
    contain a fake sample. Raises UserError as `precision_recall` does.
    """
    real = _rows(real).double()
    fake = _rows(fake).double()
    real_radii = radii(real, k)
    fake_radii = radii(fake, k)
    num_balls = torch.zeros(len(fake), dtype=torch.long, device=fake.device)
    is_recalled = []
    is_covered = []
    for rows, block in _blocks(real, fake, half=False):
        is_inside = block < real_radii[rows, None]
        num_balls += is_inside.sum(0)
        is_covered.append(is_inside.any(1))
        is_recalled.append((block < fake_radii).any(1))
    mean = lambda values: float(values.double().mean())  # noqa: E731
    return {
        "precision": mean(num_balls > 0),
        "recall": mean(torch.cat(is_recalled)),
        "density": mean(num_balls) / k,
        "coverage": mean(torch.cat(is_covered)),
    }


def polynomial_mmd(real, fake, subsets=100, size=1_000, seed=0):
    """Return (mean, standard deviation) over random subsets of the unbiased MMD^2 with the kernel
    (x y / D + 1)^3, known as KID and as GPIC's MMD.

    real: (N, D). fake: (M, D). Each subset draws `size` samples of either set without replacement.
    The mean may be negative; it is not multiplied by 1,000. Raises UserError if a set has fewer
    than `size` samples.
    """
    real = _rows(real)
    fake = _rows(fake)
    if min(len(real), len(fake)) < max(size, 2):
        raise UserError(
            f"subsets of {size} need as many samples: there are {len(real)} and {len(fake)}."
        )
    if subsets < 1 or size < 2:
        raise UserError(
            f"{subsets} subsets of {size} samples: at least one subset of at least two is needed."
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (rows[rng.choice(len(rows), size, replace=False)].double() for rows in (fake, real))
        values.append(mmd(x, y))
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def mmd(x, y):
    """Return the unbiased MMD^2 of two sets (m, D) of equal size; the cross term keeps its
    diagonal.
    """
    m = len(x)
    kernel = lambda products: products.div_(x.shape[1]).add_(1).pow_(3)  # noqa: E731
    within = sum((k.sum() - k.trace()) / (m * (m - 1)) for k in (kernel(gram(x)), kernel(gram(y))))
    return float(within - 2 * kernel(x @ y.T).mean())
