"""The speed-up of one training curve over another: how much sooner it reaches the level at which
the other ends (Fig. 3).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

# length of a bootstrap block as a share of the curve: residuals of nearby steps are correlated
BLOCK = 0.02
DRAWS = 200  # bootstrap draws


@dataclass(frozen=True)
class Speedup:
    """A speed-up and its 95 % bootstrap interval.

    All fields are None if the method never reaches the baseline's final loss.
    """

    value: float | None
    # at least 1: a draw that does not reach the target counts as 1, the largest value it can have
    low: float | None
    # inf if the crossing may lie before the first logged step; value is then a lower bound
    high: float | None


def speedup(
    steps: ArrayLike, baseline: ArrayLike, method: ArrayLike, tail: float = 0.02
) -> Speedup:
    """Divide the baseline's last step by the step at which the method reaches the baseline's final
    loss.

    steps, baseline, method: (n,), the logged steps and the two losses at them; losses fall. The
    final loss is the mean over the last share `tail` of the steps (0: the last point only). The
    method's curve is made non-increasing by isotonic least squares, because a noisy curve first
    crosses the level far too early; it is then interpolated linearly. The interval is a seeded
    moving-block bootstrap of the residuals of both curves. The definition is ours; the paper gives
    none. Raises ValueError if the curves differ in length or are not finite, steps are not positive
    and increasing, or tail is outside [0, 1).
    """
    steps, baseline, method = curves = [
        np.asarray(curve, dtype=np.float64) for curve in (steps, baseline, method)
    ]
    if (
        steps.ndim != 1
        or len(steps) < 2
        or any(c.shape != steps.shape or not np.isfinite(c).all() for c in curves)
    ):
        raise ValueError(
            f"need three finite curves of one length >= 2, got {[c.shape for c in curves]}"
        )
    if steps[0] <= 0 or (np.diff(steps) <= 0).any() or not 0 <= tail < 1:
        raise ValueError("steps must be positive and increasing, and tail in [0, 1)")

    first = min(np.searchsorted(steps, (1 - tail) * steps[-1], side="right"), len(steps) - 1)
    value = _ratio(steps, baseline[first:].mean(), method)
    if value is None:
        return Speedup(None, None, None)

    rng = np.random.default_rng(0)
    fits = [_non_increasing(steps, curve) for curve in (baseline, method)]
    residuals = [curve - fit for curve, fit in zip((baseline, method), fits)]
    draws = []
    for _ in range(DRAWS):
        b, m = (fit + _resample(residual, rng) for fit, residual in zip(fits, residuals))
        draws.append(_ratio(steps, b[first:].mean(), m) or 1.0)
    tails = int(0.025 * DRAWS)
    low, high = np.sort(draws)[[tails, -1 - tails]].tolist()
    reached_at_once = max(value, high) >= steps[-1] / steps[0]
    return Speedup(value, low, float("inf") if reached_at_once else high)


def _non_increasing(steps: np.ndarray, curve: np.ndarray) -> np.ndarray:
    import sklearn.isotonic  # takes 1.7 s, so it is imported only for speed-ups

    return sklearn.isotonic.IsotonicRegression(increasing=False).fit_transform(steps, curve)


def _ratio(steps: np.ndarray, target: float, curve: np.ndarray) -> float | None:
    fit = _non_increasing(steps, curve)
    i = int(np.argmax(fit <= target))
    if fit[i] > target:
        return None
    # np.interp expects ascending x, and the fit descends
    crossing = steps[0] if i == 0 else np.interp(target, fit[[i, i - 1]], steps[[i, i - 1]])
    return float(steps[-1] / crossing)


def _resample(residual: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    n = len(residual)
    block = max(1, round(BLOCK * n))
    starts = rng.integers(0, n - block + 1, size=-(-n // block))
    return residual[(starts[:, None] + np.arange(block)).ravel()[:n]]
