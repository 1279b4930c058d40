"""Differences paired by seed: their mean, its interval and tests, corrections of several."""

from typing import NamedTuple

import numpy as np

LEVEL = 0.05  # of every test; an interval covers the rest


class Effect(NamedTuple):
    """Mean of n paired differences and its 95 % interval by Student's t, NaN for fewer than two."""

    n: int
    mean: float
    spread: float  # standard deviation over the pairs
    low: float
    high: float

    def __str__(self):
        """Write the mean, and where there is one, its interval: "-0.178 [-0.323, -0.0326]"."""
        interval = "" if np.isnan(self.low) else f" [{self.low:+.3g}, {self.high:+.3g}]"
        return f"{self.mean:+.3g}{interval}"


def effect(differences) -> Effect:
    """Return the Effect of paired differences (n,)."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return Effect(len(values), values[0] if len(values) else np.nan, np.nan, np.nan, np.nan)
    low, high = _t_test(values, 0.0).confidence_interval(1 - LEVEL)
    return Effect(len(values), values.mean(), values.std(ddof=1), low, high)


def p_value(differences, bound=0.0) -> float:
    """Return the two-sided p-value of a mean of `bound`, from differences (n,); NaN if n < 2.

    It is at most LEVEL exactly where the interval of `effect` excludes `bound`.
    """
    values = np.asarray(differences, dtype=float)
    return float(_t_test(values, bound).pvalue) if len(values) > 1 else np.nan


def equivalence(differences, margin) -> float:
    """Return the p-value of two one-sided tests at -margin and margin, from differences (n,).

    It is the two-sided one of the bound nearer to the mean: at most LEVEL exactly where the 95 %
    interval lies wholly within the margin (equivalent to zero) or wholly outside (not equivalent).
    Two tests at LEVEL each (Schuirmann, 1987) take the 90 % interval: ours, at half of it, are the
    more conservative, and ask the same interval of "alike" as of "different". NaN if n < 2.
    """
    return p_value(differences, np.copysign(margin, effect(differences).mean))


def holm(p_values) -> np.ndarray:
    """Return a family's p-values (n,), corrected by Holm's step-down procedure (1979), in [0, 1].

    Rejecting those of at most LEVEL errs anywhere in the family with at most that probability. NaN
    stands for a test that was not made: it stays, and does not count.
    """
    p_values = np.asarray(p_values, dtype=float)
    order = p_values.argsort()  # NaN last
    num_left = np.isfinite(p_values).sum() - np.arange(len(p_values))  # tests not yet rejected
    corrected = np.empty_like(p_values)
    corrected[order] = np.maximum.accumulate(p_values[order] * num_left).clip(max=1)
    return corrected


def benjamini_hochberg(p_values) -> np.ndarray:
    """Return a family's p-values (n,), corrected by Benjamini and Hochberg (1995), in [0, 1].

    Of those rejected at most LEVEL, a share of LEVEL or less is expected to be wrong, where tests
    are independent or positively dependent. NaN stands for a test that was not made: it stays, and
    does not count.
    """
    import scipy.stats

    p_values = np.asarray(p_values, dtype=float)
    corrected, is_made = np.full_like(p_values, np.nan), np.isfinite(p_values)
    if is_made.any():
        corrected[is_made] = scipy.stats.false_discovery_control(p_values[is_made])
    return corrected


def _t_test(values, bound):
    import scipy.stats  # slow to import: a figure without an interval does not wait for it

    return scipy.stats.ttest_1samp(values, bound)
