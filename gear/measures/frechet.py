"""Fréchet distance and Inception Score from streamed features (Tables 1, 5 to 14), in float64."""

import torch

from gear.config import UserError
from gear.images import check_finite

ROWS = 4_096  # rows that are collected before their product is computed
ASYMMETRY = 1e-5  # allowed in a covariance, relative to its largest entry: float32 rounding
IS_SPLIT = 5_000  # samples per split of the Inception Score, in the order of the file (ADM)


def gram(rows):
    """Return the inner products of all rows, X X^T: (N, D) -> (N, N).

    On a CPU it uses NumPy, which computes only half of a symmetric product.
    """
    if rows.device.type != "cpu":
        return rows @ rows.T
    array = rows.numpy()
    return torch.from_numpy(array @ array.T)


class Moments:
    """Mean and covariance of feature rows, accumulated in sums of constant size.

    `merge` combines the moments of parts, for example of several processes.
    """

    def __init__(self, dim, device="cpu"):
        self.count = 0
        # the mean of the first rows, subtracted from all rows: sums of squares about it stay small,
        # and the covariance loses no digits by cancellation
        self.shift = torch.zeros(dim, dtype=torch.float64, device=device)
        self.sum = torch.zeros_like(self.shift)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._waiting = []

    def update(self, features):
        """Add features (N, D). Raises UserError for a value that is not finite."""
        check_finite(features, "the features", "look at the images, or at the feature network")
        self._waiting.append(features.detach().to(self.sum.device, torch.float64))
        # one product of many rows takes less time than many products of few
        if sum(map(len, self._waiting)) >= ROWS:
            self._fold()
        return self

    def merge(self, other):
        """Add the rows of another Moments."""
        self._fold()
        other._fold()
        if not self.count:
            self.shift = other.shift.to(self.shift)
        offset = other.shift.to(self.shift) - self.shift
        cross = torch.outer(other.sum.to(offset), offset)
        squares = other.count * torch.outer(offset, offset)
        self.outer += other.outer.to(offset) + cross + cross.T + squares
        self.sum += other.sum.to(offset) + other.count * offset
        self.count += other.count
        return self

    def _fold(self):
        if not any(map(len, self._waiting)):
            return
        x = torch.cat(self._waiting)
        self._waiting = []
        if not self.count:
            self.shift = x.mean(0)
        x -= self.shift
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += gram(x.T)

    @property
    def mean(self):
        """The mean, (D,) float64. Raises UserError without samples."""
        self._fold()
        if not self.count:
            raise UserError("0 samples have no mean: give at least one.")
        return self.sum / self.count + self.shift

    @property
    def covariance(self):
        """The covariance, (D, D) float64, normalised by N - 1. Raises UserError for N < 2."""
        self._fold()
        if self.count < 2:
            raise UserError(f"{self.count} samples have no covariance: give at least two.")
        return (self.outer - torch.outer(self.sum, self.sum) / self.count) / (self.count - 1)


def frechet_distance(one, other):
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), a float >= 0.

    one, other: pairs (mean (D,), covariance (D, D)). With S1 = R R^T, the trace of the root is the
    sum of the square roots of the eigenvalues of R^T S2 R, which are real. Raises UserError for
    statistics of other shapes or of different widths, for values that are not finite, and for a
    covariance that is not symmetric or has an eigenvalue clearly below zero.
    """
    (m1, s1), (m2, s2) = (check_statistics(*pair) for pair in (one, other))
    if m1.shape != m2.shape:
        raise UserError(
            f"statistics of {len(m1)} and {len(m2)} features cannot be compared: both have to come "
            "from one feature network."
        )
    root = _root(s1)
    values = _non_negative(torch.linalg.eigvalsh(root.T @ s2 @ root))
    distance = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * values.sqrt().sum()
    return max(float(distance), 0.0)


def check_statistics(mean, covariance):
    """Return a mean (D,) and a covariance (D, D) in float64.

    Raises UserError for other shapes, values that are not finite, and an asymmetric covariance.
    """
    mean, covariance = (torch.as_tensor(t, dtype=torch.float64) for t in (mean, covariance))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise UserError(
            f"a mean and a covariance of shapes {shapes}: (D,) and (D, D) are expected."
        )
    check_finite(
        torch.cat([mean[None], covariance]),
        "a mean and a covariance",
        "look at the features that they were computed from",
    )
    if (covariance - covariance.T).abs().max() > ASYMMETRY * covariance.abs().max():
        raise UserError(
            "a covariance matrix is not symmetric, so it is not the covariance of any features: "
            "compute it again."
        )
    return mean, covariance


def _root(covariance):
    """Return R with R R^T = S: the Cholesky factor, or if S is singular a root by eigenvectors.

    The Cholesky factor takes a tenth of the time.
    """
    factor, singular = torch.linalg.cholesky_ex(covariance)
    if not singular:
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * _non_negative(values).sqrt()


def _non_negative(values):
    """Clip negative eigenvalues to 0; raises UserError for one that rounding does not explain."""
    if values.min() < -1e-6 * values.abs().max():
        raise UserError(
            f"a covariance has the eigenvalue {float(values.min()):.3g}: no features have a "
            "negative one. Compute it again."
        )
    return values.clamp_min(0)


class InceptionScore:
    """The Inception Score, averaged over splits of `split` samples in their order.

    The score of a split is exp(mean KL divergence of a sample's class probabilities from their
    mean). The order matters: samples sorted by class give each split fewer classes. Only sums are
    kept, so that memory does not grow with the number of samples.
    """

    def __init__(self, split=IS_SPLIT):
        self.split = split
        self.scores = []
        self.seen = 0
        self._begin()

    def _begin(self):
        self.count = 0
        self.negentropy = 0.0
        self.mean = 0.0

    def update(self, logits):
        """Add logits (N, classes). Raises UserError for a value that is not finite."""
        check_finite(logits, "the logits", "look at the images, or at the feature network")
        logp = logits.double().log_softmax(-1)
        self.seen += len(logp)
        while len(logp):
            num_missing = self.split - self.count
            rows = logp[:num_missing]
            logp = logp[num_missing:]
            p = rows.exp()
            self.negentropy = self.negentropy + (p * rows).sum()
            self.mean = self.mean + p.sum(0)
            self.count = self.count + len(rows)
            if self.count == self.split:
                self._close()
        return self

    def _close(self):
        mean = self.mean / self.count
        self.scores.append(
            float((self.negentropy / self.count + torch.special.entr(mean).sum()).exp())
        )
        self._begin()

    def value(self):
        """Return the mean over the splits, of which the last may be shorter.

        Raises UserError without samples.
        """
        if self.count:
            self._close()
        if not self.scores:
            raise UserError("the Inception Score of no samples is undefined: give at least one.")
        return sum(self.scores) / len(self.scores)
