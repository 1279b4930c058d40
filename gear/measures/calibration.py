"""Permutation tests of alignments: p-values, and scores that are zero where chance explains the
value, also where the best of several layers is picked.

An alignment of unrelated representations is above zero, by an amount that depends on the metric,
the number of rows and the dimensions. Permuting the rows of one side breaks the relation and keeps
everything else, so the values after permutation are a sample of what chance gives. Definitions are
those of Gröger, Wen and Brbić 2026 (arXiv 2602.14486), Algorithms 1 and 2; what differs is said at
`calibrate_values`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from gear.measures.alignment import prepared
from gear.measures.paired import LEVEL

DRAWS = 199  # permutations: p-values are multiples of 1 / 200
LEAST = 1e-12  # least denominator of a score, and least width of a layer's null


@dataclass(frozen=True)
class Calibration:
    """An alignment beside its permutation null. All fields are NaN for a test that was not made.

    The corrected fields hold for the whole family of layers that was calibrated together: under the
    null, the probability that any of its corrected p-values is at most the level, or any of its
    corrected scores above zero, is at most the level.
    """

    value: float
    null: float  # mean over permutations
    p: float  # in [1 / (1 + draws), 1]
    corrected_p: float
    threshold: float  # tau: a value above it is significant at the level
    corrected_threshold: float
    score: float  # in [0, 1]: 0 up to the threshold, 1 for the best value
    corrected_score: float


def calibrate(
    x: torch.Tensor,
    y: torch.Tensor,
    metric: Callable[..., float],
    draws: int = DRAWS,
    block: int = 1,
    seed: int = 0,
    level: float = LEVEL,
    best: float = 1.0,
) -> Calibration:
    """Calibrate one alignment metric(x, y); see `calibrate_layers`, of which this is one layer.

    The corrected fields equal the others.
    """
    return calibrate_layers([x], y, metric, draws, block, seed, level, best)[0]


def calibrate_layers(
    layers: Sequence[torch.Tensor],
    y: torch.Tensor,
    metric: Callable[..., float],
    draws: int = DRAWS,
    block: int = 1,
    seed: int = 0,
    level: float = LEVEL,
    best: float = 1.0,
    standardise: bool = True,
) -> list[Calibration]:
    """Calibrate the alignments of several layers (N, p) with one target y (N, q); one Calibration
    per layer.

    Each draw permutes the rows of y once for all layers, so that the null of the largest value
    holds what the layers have in common. block: the number of successive rows that stay together.
    Rows of one image, its tokens, are dependent: permuting them one by one would compare a value of
    few independent images with a null of many independent rows, and call pure chance significant.
    Give the number of tokens per image there, and 1 for rows of different images. best: the value
    of perfect alignment. Raises ValueError as the metric does, and as `orders` does.
    """
    values = permuted_values(layers, y, metric, draws, block, seed)
    return calibrate_values(*values, level, best, standardise)


def permuted_values(
    layers: Sequence[torch.Tensor],
    y: torch.Tensor,
    metric: Callable[..., float],
    draws: int = DRAWS,
    block: int = 1,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the alignments of S layers with y, (S,), and those with y's rows permuted, (draws, S),
    both float64; see `calibrate_layers`.
    """
    functions = [prepared(metric, x, y) for x in layers]
    in_order = torch.arange(len(y))
    values = [
        [function(order.to(y.device)) for function in functions]
        for order in (in_order, *orders(len(y), draws, block, seed))
    ]
    observed, *null = torch.tensor(values, dtype=torch.float64)
    return observed, torch.stack(null)


def calibrate_pairs(
    pairs: Sequence[torch.Tensor],
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
    best: float = 1.0,
) -> list[Calibration]:
    """Calibrate the mean alignment within images, from tables (N, N) of all pairs of images; one
    Calibration per table, that is, per layer.

    Each draw pairs every image of one side with a random image of the other. An undefined pair
    (NaN) does not count; a layer without any defined pair is not tested.
    """
    tables = torch.stack(list(pairs)).double()
    images = torch.arange(tables.shape[1])
    mean_of = lambda order: tables[:, images, order].nanmean(1)  # noqa: E731
    null = torch.stack([mean_of(order) for order in orders(len(images), draws, seed=seed)])
    return calibrate_values(mean_of(images), null, level, best)


def orders(n: int, draws: int, block: int = 1, seed: int = 0) -> Iterator[torch.Tensor]:
    """Yield `draws` seeded permutations (n,) of n rows that move blocks of `block` successive rows
    as wholes.

    Raises ValueError if there is no draw, or if n is not a multiple of `block` with two blocks.
    """
    if draws < 1:
        raise ValueError("a null needs a draw")
    if block < 1 or n % block or n < 2 * block:
        raise ValueError(f"{n} rows are not two or more blocks of {block}")
    generator = torch.Generator().manual_seed(seed)
    inside = torch.arange(block)
    for _ in range(draws):
        starts = block * torch.randperm(n // block, generator=generator)
        yield (starts[:, None] + inside).flatten()


def calibrate_values(
    observed: torch.Tensor,
    null: torch.Tensor,
    level: float = LEVEL,
    best: float = 1.0,
    standardise: bool = True,
) -> list[Calibration]:
    """Calibrate observed values (S,) of S layers by their values after permutation, null (draws,
    S); row i of the null has one permutation for all layers.

    With K draws: p = (1 + #{null >= value}) / (1 + K). The threshold tau is the ceil((1 - level)
    (1 + K))-th smallest of the value and its null. The score is (value - tau) / (best - tau), cut
    to [0, 1] (Gröger et al. 2026, Algorithm 1). The corrected p compares the value with the largest
    value over layers of each draw, and the corrected tau is that of the largest values (Algorithm
    2; Westfall and Young 1993), so a corrected score is above zero exactly where the corrected p is
    at most `level`. The largest of the corrected scores is the aggregate score of Algorithm 2.

    standardise: layers may have nulls of different height and width, and the highest would then
    hide what the others show. Before the largest is taken, every layer is therefore shifted by the
    median of its K + 1 values and divided by the distance from there to its own tau; its corrected
    tau is scaled back. Both numbers count the observed value like any draw, so that the test stays
    exact, and both are quantiles, which one high value hardly moves. False compares raw values, as
    the source does.

    A layer with a value that is not finite is not tested and does not count. Raises ValueError if
    the shapes do not fit or the level is not between 0 and 1.
    """
    if null.ndim != 2 or len(null) < 1 or null.shape[1:] != observed.shape or not 0 < level < 1:
        raise ValueError(
            f"need values (S,), a null (draws, S) and a level in (0, 1), got "
            f"{tuple(observed.shape)}, {tuple(null.shape)} and {level}"
        )
    values = torch.cat([observed[None], null]).double().cpu()  # (1 + K, S)
    is_tested = values.isfinite().all(0)
    results = [Calibration(*[math.nan] * 8)] * len(observed)
    if not is_tested.any():
        return results
    values = values[:, is_tested]
    threshold = _threshold(values, level)
    shift = torch.zeros_like(threshold)
    spread = torch.ones_like(threshold)
    if standardise:
        shift = values.median(0).values
        spread = (threshold - shift).clamp(min=LEAST)
    scaled = (values - shift) / spread
    largest = scaled.amax(1)  # (1 + K,)
    # the largest value over layers is compared at the scale of each layer
    corrected_threshold = shift + spread * _threshold(largest[:, None], level)
    corrected_p = _p(scaled[0], largest[1:, None])
    corrected_score = _score(values[0], corrected_threshold, best)
    columns = (
        values[0],
        values[1:].mean(0),
        _p(values[0], values[1:]),
        corrected_p,
        threshold,
        corrected_threshold,
        _score(values[0], threshold, best),
        # a value at the threshold may be above it by rounding, after there and back in scale
        corrected_score.where(corrected_p <= level, 0.0),
    )
    tested = is_tested.nonzero().flatten().tolist()
    for layer, fields in zip(tested, torch.stack(columns, 1).tolist()):
        results[layer] = Calibration(*fields)
    return results


def _p(values, null):
    return (1 + (null >= values).sum(0).double()) / (1 + len(null))


def _threshold(values, level):
    """Return the critical value (S,) of values (1 + K, S), the observed ones included."""
    # a product such as 0.9 * 10 may come out just above the whole number that it is
    rank = math.ceil((1 - level) * len(values) - 1e-9)
    return values.sort(0).values[max(rank, 1) - 1]


def _score(values, threshold, best):
    return ((values - threshold) / (best - threshold).clamp(min=LEAST)).clamp(0, 1)
