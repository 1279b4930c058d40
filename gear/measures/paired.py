"""Differences paired by seed: mean, interval, tests, and corrections for several tests."""

from typing import NamedTuple

import numpy as np

LEVEL = 0.05  # significance level of every test; intervals cover 1 - LEVEL


class Effect(NamedTuple):
    """The mean of n paired differences with its 95 % interval by Student's t.

    Spread and interval are NaN for n < 2.
    """

    n: int
    mean: float
    spread: float  # standard deviation over the pairs
    low: float  # ends of the interval
    high: float

    def __str__(self):
        """Write the mean with its interval, if there is one: "-0.178 [-0.323, -0.0326]"."""
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
    """Return the two-sided p-value of the hypothesis that the mean difference is `bound`.

    differences: (n,). The value is NaN if n < 2. It is at most LEVEL exactly where the interval of
    `effect` excludes `bound`.
    """
    values = np.asarray(differences, dtype=float)
    return float(_t_test(values, bound).pvalue) if len(values) > 1 else np.nan


def equivalence(differences, margin) -> float:
    """Return the p-value of two one-sided tests at -margin and margin.

    differences: (n,). The value is NaN if n < 2. It is the two-sided p-value of the bound that is
    nearer to the mean: at most LEVEL exactly where the 95 % interval lies entirely inside the
    margin (equivalent to zero) or entirely outside (not equivalent). Two tests at LEVEL each
    (Schuirmann 1987) would use the 90 % interval. Ours, at half of LEVEL, are more conservative and
    judge "equivalent" and "different" by the same interval.
    """
    return p_value(differences, np.copysign(margin, effect(differences).mean))


def holm(p_values) -> np.ndarray:
    """Correct the p-values (n,) of a family of tests by Holm's step-down procedure (1979).

    If every hypothesis with a corrected value of at most LEVEL is rejected, the probability of any
    false rejection in the family is at most LEVEL. Values lie in [0, 1]. NaN stands for a test that
    was not made; it stays NaN and does not count.
    """
    p_values = np.asarray(p_values, dtype=float)
    order = p_values.argsort()  # NaN last
    # number of tests that are not rejected yet at each step
    num_left = np.isfinite(p_values).sum() - np.arange(len(p_values))
    corrected = np.empty_like(p_values)
    corrected[order] = np.maximum.accumulate(p_values[order] * num_left).clip(max=1)
    return corrected


def benjamini_hochberg(p_values) -> np.ndarray:
    """Correct the p-values (n,) of a family of tests by Benjamini and Hochberg (1995).

    If every hypothesis with a corrected value of at most LEVEL is rejected, the expected share of
    false rejections is at most LEVEL, for tests that are independent or positively dependent.
    Values lie in [0, 1]. NaN stands for a test that was not made; it stays NaN and does not count.
    """
    import scipy.stats

    p_values = np.asarray(p_values, dtype=float)
    corrected = np.full_like(p_values, np.nan)
    is_made = np.isfinite(p_values)
    if is_made.any():
        corrected[is_made] = scipy.stats.false_discovery_control(p_values[is_made])
    return corrected


def _t_test(values, bound):
    import scipy.stats  # slow, so it is imported only when an interval or test is computed

    return scipy.stats.ttest_1samp(values, bound)
