"""Statistics of features, streamed: Fréchet distance and Inception Score (Tables 1, 5 to 14).
Float64 throughout.
"""

import torch

from gear.config import UserError
from gear.images import check_finite

ROWS = 4_096  # features that wait for their product
ASYMMETRY = 1e-5  # of a covariance, relative to its largest entry: rounding in float32
IS_SPLIT = 5_000  # samples a split of the Inception Score, in the order of the file (ADM)


def gram(rows):
    """Return all products of rows, X X^T: (N, D) -> (N, N). On a CPU by NumPy, which does half of a
    symmetric product.
    """
    if rows.device.type != "cpu":
        return rows @ rows.T
    array = rows.numpy()
    return torch.from_numpy(array @ array.T)


class Moments:
    """Mean and covariance of feature rows, from sums alone: memory does not grow with what has been
    seen.

    Of sets seen by several processes, or at several times, `merge` gives those of the whole.
    """

    def __init__(self, dim, device="cpu"):
        self.count = 0
        # becomes the first rows' mean
        self.shift = torch.zeros(dim, dtype=torch.float64, device=device)
        self.sum = torch.zeros_like(self.shift)  # of x - shift: squares about it do not cancel
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._waiting = []

    def update(self, features):
        """Take in features (N, D). Raises UserError for a value that is not finite."""
        check_finite(features, "the features", "look at the images, or at the feature network")
        self._waiting.append(features.detach().to(self.sum.device, torch.float64))
        # the product of many rows costs little more than that of few
        if sum(map(len, self._waiting)) >= ROWS:
            self._fold()
        return self

    def merge(self, other):
        """Take in the rows that another Moments has seen."""
        self._fold(), other._fold()
        if not self.count:
            self.shift = other.shift.to(self.shift)
        d = other.shift.to(self.shift) - self.shift
        cross = torch.outer(other.sum.to(d), d)
        self.outer += other.outer.to(d) + cross + cross.T + other.count * torch.outer(d, d)
        self.sum += other.sum.to(d) + other.count * d
        self.count += other.count
        return self

    def _fold(self):
        if not any(map(len, self._waiting)):
            return
        x, self._waiting = torch.cat(self._waiting), []
        if not self.count:
            self.shift = x.mean(0)
        x -= self.shift
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += gram(x.T)

    @property
    def mean(self):
        """(D,) float64. Raises UserError for no samples."""
        self._fold()
        if not self.count:
            raise UserError("no samples have no mean: give some.")
        return self.sum / self.count + self.shift

    @property
    def covariance(self):
        """(D, D) float64, over N - 1. Raises UserError for fewer than two samples."""
        self._fold()
        if self.count < 2:
            raise UserError(f"{self.count} samples have no covariance: give more.")
        return (self.outer - torch.outer(self.sum, self.sum) / self.count) / (self.count - 1)


def frechet_distance(one, other):
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), a float >= 0.

    `one` and `other` are pairs (mean (D,), covariance (D, D)). The trace of the root is the sum of
    the roots of the eigenvalues of R^T S2 R, S1 = R R^T, which are real. Raises UserError for what
    are no statistics, for those of another width, and for a covariance with an eigenvalue clearly
    below zero.
    """
    (m1, s1), (m2, s2) = (check_statistics(*pair) for pair in (one, other))
    if m1.shape != m2.shape:
        widths = f"{len(m1)} and {len(m2)} features"
        raise UserError(
            f"statistics of {widths} cannot be compared: both have to come from one feature "
            "network."
        )
    root = _root(s1)
    values = _non_negative(torch.linalg.eigvalsh(root.T @ s2 @ root))
    distance = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * values.sqrt().sum()
    return max(float(distance), 0.0)


def check_statistics(mean, covariance):
    """Return a mean (D,) and a covariance (D, D) in float64; raises UserError for what is none."""
    mean, covariance = (torch.as_tensor(t, dtype=torch.float64) for t in (mean, covariance))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise UserError(
            f"a mean and a covariance of shapes {shapes}: (D,) and (D, D) are expected."
        )
    check_finite(
        torch.cat([mean[None], covariance]),
        "a mean and a covariance",
        "look at what they were computed from",
    )
    if (covariance - covariance.T).abs().max() > ASYMMETRY * covariance.abs().max():
        raise UserError("a covariance is not symmetric: it is not that of any features.")
    return mean, covariance


def _root(covariance):
    """Return R with R R^T = S: Cholesky's, which costs a tenth, or where S is singular the one of
    its eigenvectors.
    """
    factor, singular = torch.linalg.cholesky_ex(covariance)
    if not singular:
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * _non_negative(values).sqrt()


def _non_negative(values):
    """Clip eigenvalues that rounding made negative; raises UserError for one that is negative by
    more.
    """
    if values.min() < -1e-6 * values.abs().max():
        raise UserError(
            f"a covariance has the eigenvalue {float(values.min()):.3g}: it is not that of any "
            "features."
        )
    return values.clamp_min(0)


class InceptionScore:
    """exp(mean KL of a sample's class probabilities from their mean) of each split of `split`
    samples in order, averaged.

    Order matters: class-sorted samples give each split fewer classes. Probabilities are streamed;
    only sums are kept.
    """

    def __init__(self, split=IS_SPLIT):
        self.split, self.scores, self.seen = split, [], 0
        self._begin()

    def _begin(self):
        self.count, self.negentropy, self.mean = 0, 0.0, 0.0

    def update(self, logits):
        """Take in logits (N, classes). Raises UserError for a value that is not finite."""
        check_finite(logits, "the logits", "look at the images, or at the feature network")
        logp = logits.double().log_softmax(-1)
        self.seen += len(logp)
        while len(logp):
            rows, logp = logp[: self.split - self.count], logp[self.split - self.count :]
            p = rows.exp()
            self.negentropy = self.negentropy + (p * rows).sum()
            self.mean, self.count = self.mean + p.sum(0), self.count + len(rows)
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
        """Return the mean over splits, the last one however short; raises UserError where there was
        no sample.
        """
        if self.count:
            self._close()
        if not self.scores:
            raise UserError("the Inception Score of no samples: give at least one.")
        return sum(self.scores) / len(self.scores)
